"""From decoded boxes to metrics: thresholds, pixels of the original images, and any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsyolo.base.batch import EvalBatch, GroundTruth
from dsyolo.detection.boxes import letterbox
from dsyolo.detection.evaluator import detect_all, validate
from dsyolo.detection.postprocess import MAX_CANDIDATES, PlainPredictor, PostProcessor
from dsyolo.detection.validation_loss import Prediction
from dsyolo.models.yolov5 import build_yolov5

NAMES = ("cat", "dog", "emu")
SIZE_PX = 128


def rows(*boxes: tuple[float, ...]) -> torch.Tensor:
    """(boxes, 5 + K): centre, size, objectness, class probabilities."""
    return torch.tensor(boxes).view(-1, 5 + len(NAMES))


# ---- Finder


def test_post_processing_by_hand():
    decoded = rows(
        (20, 20, 10, 10, 0.8, 0.5, 0.0, 0.0),  # 0.4 of class 0
        (60, 60, 20, 40, 0.9, 0.1, 1.0, 0.0),  # 0.9 of class 1; 0.09 of class 0
        (90, 90, 10, 10, 0.2, 1.0, 1.0, 1.0),  # 0.2 of all
        (21, 20, 10, 10, 0.7, 0.5, 0.0, 0.0),  # 0.35 of class 0, on top of the first
    )
    found = PostProcessor(0.25, 0.45)(decoded)
    assert found.boxes_xyxy.tolist() == [[50, 40, 70, 80], [15, 15, 25, 25]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.4])
    assert found.classes.tolist() == [1, 0]
    apart = PostProcessor(0.25, 0.9)(decoded)
    assert apart.scores.tolist() == pytest.approx([0.9, 0.4, 0.35])


@pytest.mark.parametrize("multi_label", [True, False])
def test_the_score_must_be_above_the_threshold(multi_label):
    decoded = rows((20, 20, 9, 9, 0.5, 0.5, 0.1, 0.0), (90, 90, 9, 9, 1.0, 0.0, 0.26, 0.1))
    scores = {
        t: sorted(PostProcessor(t, 0.6, multi_label=multi_label)(decoded).scores.tolist())
        for t in (0.25, 0.255, 0.27)
    }
    assert scores == {
        0.25: pytest.approx([0.26]),
        0.255: pytest.approx([0.26]),
        0.27: [],
    }  # 0.5 x 0.5 is not above


def test_several_labels_a_box_or_its_best():
    decoded = rows((20, 20, 10, 10, 1.0, 0.3, 0.6, 0.5))
    several, best = PostProcessor(0.25, 0.6)(decoded), PostProcessor(0.25, 0.6, multi_label=False)(decoded)
    assert several.classes.tolist() == [1, 2, 0]
    assert several.scores.tolist() == pytest.approx([0.6, 0.5, 0.3])
    assert (several.boxes_xyxy == [15, 15, 25, 25]).all()
    assert (best.classes.tolist(), best.scores.tolist()) == ([1], pytest.approx([0.6]))


def crowd(count: int, seed: int = 0) -> torch.Tensor:
    """Boxes of 1 px on a grid, each of one class, none overlapping another."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(count)
    decoded = torch.zeros(count, 8)
    decoded[:, 0], decoded[:, 1] = (place % 100) * 2.0 + 1, (place // 100) * 2.0 + 1
    decoded[:, 2:4] = 1.0
    decoded[:, 4] = torch.rand(count, generator=generator) * 0.9 + 0.1
    decoded[place, 5 + place % 3] = 1.0
    return decoded


@pytest.mark.parametrize("multi_label", [True, False])
def test_the_most_detections_are_the_best(multi_label):
    decoded = crowd(900)
    found = PostProcessor(0.05, 0.6, 40, multi_label=multi_label)(decoded)
    best = decoded[:, 4].sort(descending=True).values[:40]
    assert found.scores.tolist() == best.tolist()
    assert len(PostProcessor(0.05, 0.6)(decoded).scores) == 300


def test_of_too_many_candidates_the_best_are_looked_at():
    count = MAX_CANDIDATES + 2000
    decoded = crowd(count)
    found = PostProcessor(0.01, 0.6, count)(decoded)
    assert found.scores.tolist() == decoded[:, 4].sort(descending=True).values[:MAX_CANDIDATES].tolist()
    # and each with its own box and class
    by_score = {row[4].item(): row for row in decoded}
    for box, score, kind in list(zip(*found, strict=True))[::500]:
        row = by_score[float(score)]
        assert row[5 + kind] == 1
        assert ((box[:2] + box[2:]) / 2).tolist() == pytest.approx(row[:2].tolist())


def test_nothing_found():
    for decoded in (rows(), rows((20, 20, 10, 10, 0.001, 0.5, 0.5, 0.5))):
        found = PostProcessor(0.25, 0.6)(decoded)
        assert found.boxes_xyxy.shape == (0, 4)
        assert len(found.scores) == len(found.classes) == 0


# ---- find_all, validate

SIZES_HW = [(100, 200), (240, 120), (64, 64), (77, 131), (300, 180)]


def ground_truths(count: int = 10, seed: int = 0) -> list[GroundTruth]:
    """Return ground truths of images of several sizes, with 0 to 3 boxes each."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        size_hw = SIZES_HW[i % len(SIZES_HW)]
        _, scale, pad_xy = letterbox(np.zeros((*size_hw, 3), np.uint8), (SIZE_PX, SIZE_PX))
        corners = np.sort(rng.uniform(0, 1, (i % 4, 2, 2)), 1) * 0.5 + [[[0, 0]], [[0.5, 0.5]]][i % 2]
        boxes = corners.reshape(-1, 4) * [size_hw[1], size_hw[0], size_hw[1], size_hw[0]]
        boxes[:, 2:] += 8  # not too thin
        boxes = np.clip(boxes, 0, [size_hw[1], size_hw[0], size_hw[1], size_hw[0]]).astype(np.float32)
        made.append(GroundTruth(i, size_hw, boxes, rng.integers(0, len(NAMES), i % 4), scale, pad_xy))
    return made


def batches_of(all_ground_truths: list[GroundTruth], batch_size: int = 2) -> list[EvalBatch]:
    """Each image is filled with its own number, so that `Oracle` knows it again."""
    return [
        EvalBatch(
            torch.tensor([t.image_id for t in part], dtype=torch.uint8)
            .view(-1, 1, 1, 1)
            .expand(-1, 3, SIZE_PX, SIZE_PX),
            tuple(part),
        )
        for part in (
            all_ground_truths[i : i + batch_size] for i in range(0, len(all_ground_truths), batch_size)
        )
    ]


class Oracle:
    """Predicts the labels in pixels of the input, moved by `shift_px`, with scores from the image and the box."""

    def __init__(self, all_ground_truths: list[GroundTruth], shift_px: float = 0.0) -> None:
        self.ground_truths = {ground_truth.image_id: ground_truth for ground_truth in all_ground_truths}
        self.shift_px, self.calls = shift_px, 0

    def __call__(self, batch: EvalBatch) -> Prediction:
        self.calls += 1
        images = batch.images
        decoded = torch.zeros(len(images), 4, 5 + len(NAMES))
        for row, image in zip(decoded, images, strict=True):
            ground_truth = self.ground_truths[int(image[0, 0, 0])]
            inside = (
                ground_truth.boxes_xyxy * ground_truth.scale
                + np.array([*ground_truth.pad_xy, *ground_truth.pad_xy])
                + self.shift_px
            )
            for k, (box, kind) in enumerate(zip(inside, ground_truth.classes, strict=True)):
                row[k, :2] = torch.from_numpy((box[:2] + box[2:]) / 2)
                row[k, 2:4] = torch.from_numpy(box[2:] - box[:2])
                row[k, 4] = 0.9 - 0.01 * ground_truth.image_id - 0.1 * k
                row[k, 5 + kind] = 1.0
        return Prediction(decoded)


def alone(item):
    return [item]


POST_PROCESS = PostProcessor(0.001, 0.6)


def test_boxes_come_back_in_pixels_of_the_original_images():
    made = ground_truths()
    found, losses = detect_all(Oracle(made), batches_of(made), POST_PROCESS)
    assert losses == []
    assert [ground_truth.image_id for ground_truth, _ in found] == list(range(10))
    for ground_truth, one in found:
        assert len(one.classes) == len(ground_truth.classes)
        order = np.argsort(one.boxes_xyxy[:, 0])
        expected = np.argsort(ground_truth.boxes_xyxy[:, 0])
        np.testing.assert_allclose(one.boxes_xyxy[order], ground_truth.boxes_xyxy[expected], atol=1e-3)
        assert one.classes[order].tolist() == ground_truth.classes[expected].tolist()
    assert sum(len(one.classes) for _, one in found) > 8


def test_boxes_are_clipped_to_the_original_image():
    made = ground_truths()
    for ground_truth, one in detect_all(Oracle(made, shift_px=60), batches_of(made), POST_PROCESS)[0]:
        high, wide = ground_truth.size_hw
        assert (one.boxes_xyxy >= 0).all()
        assert (one.boxes_xyxy <= [wide, high, wide, high]).all()


def test_a_batch_that_fills_up_is_run_and_not_counted():
    made = ground_truths()
    batches = batches_of(made)
    oracle = Oracle(made)
    found, _ = detect_all(oracle, [*batches, EvalBatch(batches[0].images, ())], POST_PROCESS)
    assert oracle.calls == len(batches) + 1  # every rank runs the network as often
    assert len(found) == 10


def test_perfect_predictions_are_worth_one():
    made = ground_truths()
    metrics, _ = validate(Oracle(made), batches_of(made), POST_PROCESS, NAMES, alone)
    assert metrics.map50_95 == pytest.approx(1, abs=0.01)
    assert metrics.map50 == metrics.precision == metrics.recall == pytest.approx(1)
    assert (metrics.num_images, metrics.num_labels) == (10, sum(len(t.classes) for t in made))


def test_shifted_predictions_are_worth_less_at_high_iou_first():
    made = ground_truths()
    near, far = (
        validate(Oracle(made, shift), batches_of(made), POST_PROCESS, NAMES, alone)[0]
        for shift in (1.5, 12.0)
    )
    assert far.map50_95 < near.map50_95 < 0.95
    assert near.map50_95 < near.map50


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_see_the_metrics_of_one(num_ranks):
    made = ground_truths()
    batches = batches_of(made)
    expected, everything = validate(Oracle(made, 2.0), batches, POST_PROCESS, NAMES, alone)
    assert 0 < expected.map50_95 < 1
    rounds = -(-len(batches) // num_ranks)
    filler = EvalBatch(batches[0].images, ())
    dealt = [
        [batches[k] if k < len(batches) else filler for k in range(rank, rounds * num_ranks, num_ranks)]
        for rank in range(num_ranks)
    ]
    shares = [detect_all(Oracle(made, 2.0), own, POST_PROCESS) for own in dealt]
    assert sum(len(own) for own, _ in shares) == 10
    for rank in range(num_ranks):

        def gather(item, rank=rank):
            assert [t.image_id for t, _ in item[0]] == [t.image_id for t, _ in shares[rank][0]]
            return shares

        metrics, found = validate(Oracle(made, 2.0), dealt[rank], POST_PROCESS, NAMES, gather)
        assert metrics == expected
        assert [t.image_id for t, _ in found] == [t.image_id for t, _ in everything]
        for (_, one), (_, other) in zip(found, everything, strict=True):
            assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_a_plain_network_predicts_without_an_engine():
    torch.manual_seed(0)
    network = build_yolov5("yolov5n", len(NAMES)).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected = network.decode(network(images))
    predicted = PlainPredictor(network, torch.device("cpu"))(images)
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)
    assert not predicted.requires_grad
