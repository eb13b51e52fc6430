"""The losses of a validation split: those of the plain loss on one process, for any batches, ranks and fillers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from dsyolo.base.batch import EvalBatch, GroundTruth
from dsyolo.config.recipe import Recipe
from dsyolo.config.spec import Precision
from dsyolo.detection.assigner import Assigner
from dsyolo.detection.boxes import cxcywh_to_xyxy, letterbox
from dsyolo.detection.evaluator import validate
from dsyolo.detection.loss import DetectionLoss
from dsyolo.detection.postprocess import OomSafePredictor, PlainPredictor, PostProcessor
from dsyolo.detection.validation_loss import Prediction, predict_with_loss, targets_of, total
from dsyolo.models.yolov5 import anchors_px, build_yolov5, level_strides
from dsyolo.planner import model_profile

NAMES, SIZE_PX = ("cat", "dog", "emu"), 64
ASSIGN = Assigner(anchors_px("yolov5n").numpy(), level_strides("yolov5n"), 4.0)
POST_PROCESS = PostProcessor(0.001, 0.6)
OTHERS = {"fl_gamma": 1.5, "label_smoothing": 0.1, "obj_pw": 2.0, "cls_pw": 0.5, "box": 0.2}


def make_batches(batch_size: int, shapes: tuple[tuple[int, int], ...] = ((64, 64),)) -> list[EvalBatch]:
    """Ten letterboxed images of noise for each shape, with 0 to 4 boxes each; the same for every batch size."""
    batches = []
    for shape_number, shape in enumerate(shapes):
        images, truths = [], []
        for i in range(10):
            rng = np.random.default_rng((shape_number, i))
            size_hw = (shape[0] * 2 - 10, shape[1] * 2)
            _, scale, pad_xy = letterbox(np.zeros((*size_hw, 3), np.uint8), shape)
            corners = np.sort(rng.uniform(0, 1, (i % 5, 2, 2)), 1) * [size_hw[1], size_hw[0]]
            boxes = corners.reshape(-1, 4).astype(np.float32)
            number = shape_number * 10 + i
            truths.append(GroundTruth(number, size_hw, boxes, rng.integers(0, 3, i % 5), scale, pad_xy))
            images.append(torch.from_numpy(rng.integers(0, 256, (3, *shape), dtype=np.uint8)))
        batches += [
            EvalBatch(torch.stack(images[k : k + batch_size]), tuple(truths[k : k + batch_size]))
            for k in range(0, 10, batch_size)
        ]
    return batches


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_yolov5("yolov5n", len(NAMES)).eval()


def loss_of(network, **settings) -> DetectionLoss:
    return DetectionLoss(network.anchors, len(NAMES), SIZE_PX, Recipe(**settings))


def measured(network, loss: DetectionLoss, batches, all_gather=lambda item: [item]):
    plain = PlainPredictor(network, torch.device("cpu"))
    predict = partial(predict_with_loss, partial(plain.with_loss, loss), ASSIGN)

    def of_batch(batch: EvalBatch) -> Prediction:
        return predict(batch) if batch.ground_truths else Prediction(plain(batch.images))

    return validate(of_batch, batches, POST_PROCESS, NAMES, all_gather, loss)[0]


def losses(metrics) -> tuple[float, float, float]:
    return metrics.val_box, metrics.val_obj, metrics.val_cls


@pytest.mark.parametrize("settings", [{}, OTHERS])
def test_they_are_the_plain_loss_of_the_split_as_one_batch(network, settings):
    loss = loss_of(network, **settings)
    (whole,) = make_batches(10)
    targets = targets_of(whole.ground_truths, ASSIGN, (64, 64))
    assert (targets.num_matches > 0).all()
    with torch.no_grad():
        _, expected = loss(network(whole.images), targets)
    assert losses(measured(network, loss, [whole])) == pytest.approx(expected.tolist(), rel=1e-5)
    for batch_size in (1, 3):
        got = measured(network, loss, make_batches(batch_size))
        assert losses(got) == pytest.approx(expected.tolist(), rel=1e-4)


def test_targets_are_those_of_boxes_in_pixels_of_the_input():
    truth = GroundTruth(
        7, (60, 120), np.array([[20, 10, 60, 50]], np.float32), np.array([2]), 0.5, (2.0, 17.0)
    )
    found = targets_of([truth], ASSIGN, (64, 64))
    expected = ASSIGN(np.array([0]), np.array([2]), np.array([[22, 32, 20, 20]], np.float32), 1, (64, 64))
    assert found.num_matches.sum() > 0
    most = int(expected.num_matches.max())
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted[:, :most] if wanted.dim() > 1 else wanted)


def test_images_of_other_shapes_count_as_much(network):
    """The objectness of each is a mean over its own cells."""
    loss = loss_of(network)
    each = [losses(measured(network, loss, [b])) for b in make_batches(10, ((64, 64), (32, 96)))]
    both = losses(measured(network, loss, make_batches(10, ((64, 64), (32, 96)))))
    assert both[1] == pytest.approx((each[0][1] + each[1][1]) / 2, rel=1e-6)
    assert each[0][1] != pytest.approx(each[1][1], rel=1e-3)


def test_metrics_are_the_same_with_and_without(network):
    batches, loss = make_batches(3), loss_of(network)
    plain = PlainPredictor(network, torch.device("cpu"))

    def without(batch: EvalBatch) -> Prediction:
        return Prediction(plain(batch.images))

    expected, found = validate(without, batches, POST_PROCESS, NAMES, lambda item: [item])
    assert losses(expected) == (None, None, None)
    assert sum(len(one.classes) for _, one in found) > 100
    got = measured(network, loss, batches)
    assert {**got.to_json(), "val_box": None, "val_obj": None, "val_cls": None} == expected.to_json()


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_ranks_and_fillers_change_nothing(network, num_ranks):
    loss, batches = loss_of(network), make_batches(2, ((64, 64), (32, 64)))
    expected = measured(network, loss, batches)
    rounds = -(-len(batches) // num_ranks)
    filler = EvalBatch(batches[0].images, ())
    shares = []
    for rank in range(num_ranks):
        turns = range(rank, rounds * num_ranks, num_ranks)
        own = [batches[k] if k < len(batches) else filler for k in turns]
        measured(network, loss, own, lambda item: shares.append(item) or [item])
    assert measured(network, loss, [], lambda _: shares) == expected


def test_memory_that_runs_out_in_the_middle_counts_no_image_twice(network):
    loss = loss_of(network)
    plain = PlainPredictor(network, torch.device("cpu"))

    def little(images, targets):
        result = plain.with_loss(loss, images, targets)
        if len(images) > 2:
            raise MemoryError
        return result

    in_parts = OomSafePredictor(partial(predict_with_loss, little, ASSIGN), lambda _: None, lambda: None)
    got = validate(in_parts, make_batches(5), POST_PROCESS, NAMES, lambda item: [item], loss)[0]
    expected = measured(network, loss, make_batches(5))
    assert losses(got) == pytest.approx(losses(expected), rel=1e-4)
    assert got.num_images == 10


def test_a_split_without_objects_has_an_objectness_loss_alone(network):
    (batch,) = make_batches(10)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    truths = tuple(one._replace(boxes_xyxy=nothing[0], classes=nothing[1]) for one in batch.ground_truths)
    box, obj, cls = losses(measured(network, loss_of(network), [EvalBatch(batch.images, truths)]))
    assert (box, cls) == (0, 0)
    assert obj > 0
    assert total(loss_of(network), []) is None


@pytest.mark.parametrize(
    ("num_classes", "size_px", "num_labels"), [(1, 64, 20), (3, 320, 200), (80, 320, 400)]
)
@pytest.mark.parametrize("settings", [{}, OTHERS])
def test_the_peak_of_memory_is_that_of_prediction_alone(num_classes, size_px, num_labels, settings):
    """The plan counts prediction to the byte, and the loss is measured beside it."""
    precision = Precision("fp32", "fp32", "fp32", "fp32")
    net = build_yolov5("yolov5n", num_classes).eval()
    loss = DetectionLoss(net.anchors, num_classes, size_px, Recipe(**settings))
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(8, size_px - 8, (num_labels, 2)), rng.uniform(6, 60, (num_labels, 2))
    boxes = cxcywh_to_xyxy(np.concatenate((centres, sizes), 1).astype(np.float32))
    images = np.sort(rng.integers(0, 2, num_labels))
    classes = rng.integers(0, num_classes, num_labels)
    labels = [(boxes[images == i], classes[images == i]) for i in range(2)]
    truths = [GroundTruth(i, (size_px, size_px), *own, 1.0, (0.0, 0.0)) for i, own in enumerate(labels)]
    targets = targets_of(truths, ASSIGN, (size_px, size_px))
    plain = model_profile.inference_bytes(net, (2, 3, size_px, size_px), precision)
    batch = torch.zeros((2, 3, size_px, size_px), dtype=torch.uint8)
    with torch.no_grad(), model_profile._LiveBytes() as live:
        maps = net(batch)
        loss.level_sums(maps, targets)
        net.decode(maps)
    assert live.peak == plain
