"""The validation loader: the same batches on any number of ranks, and a ground truth that leads back to the file's pixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from dsyolo.base.batch import Sample
from dsyolo.data.loader import EvalLoader
from dsyolo.detection.boxes import unletterbox

STRIDE = 32


class Drawn:
    """Images of given sizes, black with one white box each: a stand-in for a data set."""

    def __init__(self, sizes_hw: list[tuple[int, int]]) -> None:
        self.sizes_hw = np.array(sizes_hw, np.int32)
        self.boxes = [np.array([[0.25 * w, 0.25 * h, 0.75 * w, 0.5 * h]], np.float32) for h, w in sizes_hw]

    def __len__(self) -> int:
        return len(self.sizes_hw)

    def ground_truth(self, index: int):
        return tuple(self.sizes_hw[index].tolist()), self.boxes[index], np.array([index], np.int64)

    def load(self, index: int, long_side_px: int) -> Sample:
        high, wide = self.sizes_hw[index].tolist()
        image = np.zeros((high, wide, 3), np.uint8)
        left, top, right, bottom = self.boxes[index][0].round().astype(int)
        image[top:bottom, left:right] = 255
        ratio = long_side_px / max(high, wide)
        size = (max(round(wide * ratio), 1), max(round(high * ratio), 1))
        return Sample(cv2.resize(image, size), self.boxes[index] * ratio, np.array([index], np.int64))


SIZES_HW = [
    (100, 200),
    (200, 100),
    (150, 150),
    (60, 200),
    (199, 67),
    (100, 201),
    (128, 128),
    (90, 160),
    (101, 203),
]


def eval_batches(sizes_hw=SIZES_HW, *, rank=0, world_size=1, batch_size=2, rectangular=True, num_workers=0):
    loader = EvalLoader(
        Drawn(sizes_hw),
        image_size_px=128,
        stride=STRIDE,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        pin_memory=False,
        rectangular=rectangular,
    )
    return list(loader)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_validate_the_same_batches_each_image_once(world_size):
    whole = {
        tuple(ground_truth.image_id for ground_truth in batch.ground_truths): batch.images
        for batch in eval_batches(batch_size=2)
    }
    assert sorted(image for ids in whole for image in ids) == list(range(len(SIZES_HW)))
    ranks = [eval_batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {-(-len(whole) // world_size)}  # ranks wait for each other
    dealt = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    real = [batch for batch in dealt if batch.ground_truths]
    assert [tuple(t.image_id for t in batch.ground_truths) for batch in real] == list(whole)
    assert all(a.images.equal(b) for a, b in zip(real, whole.values(), strict=True))
    for filler in dealt[len(real) :]:
        assert filler.ground_truths == ()
        assert len(filler.images) > 0  # a rank has to run it


def test_the_input_of_an_image_does_not_depend_on_the_batch_size():
    def inputs(batch_size: int) -> dict[int, torch.Tensor]:
        return {
            ground_truth.image_id: image
            for batch in eval_batches(batch_size=batch_size)
            for image, ground_truth in zip(batch.images, batch.ground_truths, strict=False)
        }

    alone = inputs(1)
    for batch_size in (2, 3, 16):
        assert all(alone[i].equal(image) for i, image in inputs(batch_size).items())


def test_more_ranks_than_batches():
    ranks = [eval_batches([(100, 200)], rank=rank, world_size=3) for rank in range(3)]
    assert [[len(batch.ground_truths) for batch in batches] for batches in ranks] == [[1], [0], [0]]


def test_workers_make_the_same_validation_batches():
    for one, other in zip(eval_batches(), eval_batches(num_workers=2), strict=True):
        assert one.images.equal(other.images)
        assert [t.image_id for t in one.ground_truths] == [t.image_id for t in other.ground_truths]


def test_a_loader_can_be_gone_through_again():
    loader = EvalLoader(
        Drawn(SIZES_HW),
        image_size_px=128,
        stride=32,
        batch_size=4,
        rank=0,
        world_size=1,
        num_workers=1,
        pin_memory=False,
    )
    first, second = ([[t.image_id for t in batch.ground_truths] for batch in loader] for _ in range(2))
    assert first == second
    assert sorted(i for batch in first for i in batch) == list(range(len(SIZES_HW)))


def test_rectangles_are_small_multiples_of_the_stride():
    shapes = set()
    for batch in eval_batches(batch_size=1):
        (ground_truth,) = batch.ground_truths
        shape = tuple(batch.images.shape[2:])
        need = [side * 128 / max(ground_truth.size_hw) for side in ground_truth.size_hw]
        for side, needed in zip(shape, need, strict=True):
            assert side % STRIDE == 0
            assert needed - 0.5 <= side < needed + STRIDE + 0.5
        shapes.add(shape)
    assert shapes == {(64, 128), (128, 64), (128, 128), (96, 128)}
    assert {tuple(b.images.shape[2:]) for b in eval_batches(rectangular=False)} == {(128, 128)}
    whole = sum(batch.images[:, 0].numel() for batch in eval_batches(rectangular=False))
    assert sum(batch.images[:, 0].numel() for batch in eval_batches()) < 0.8 * whole


@pytest.mark.parametrize("rectangular", [True, False])
def test_the_ground_truth_has_where_boxes_are_in_the_input_and_how_they_go_back(rectangular):
    for batch in eval_batches(batch_size=4, rectangular=rectangular):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, ground_truth in zip(batch.images, batch.ground_truths, strict=True):
            high, wide = ground_truth.size_hw
            expected = [[0.25 * wide, 0.25 * high, 0.75 * wide, 0.5 * high]]
            assert ground_truth.boxes_xyxy.tolist() == expected
            assert ground_truth.size_hw == SIZES_HW[ground_truth.image_id]
            assert ground_truth.classes.tolist() == [ground_truth.image_id]
            inside = ground_truth.boxes_xyxy * ground_truth.scale + np.array(
                [*ground_truth.pad_xy, *ground_truth.pad_xy]
            )
            back = unletterbox(inside, ground_truth.scale, ground_truth.pad_xy, ground_truth.size_hw)
            np.testing.assert_allclose(back, expected, rtol=1e-5)
            rows, columns = np.nonzero(image[0].numpy() > 180)  # the white box, as painted
            seen = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
            np.testing.assert_allclose(inside, seen, atol=1.3)
