"""Assignment: the rules of the spec by hand on a small grid, and what padding and order may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsyolo.base.batch import Targets
from dsyolo.detection.assigner import MIN_CAPACITY, Assigner
from dsyolo.models.yolov5 import anchors_px, level_strides

STRIDE, GRID = 8, 4  # one level of 4 x 4 cells, an image of 32 x 32 px
ONE = Assigner(np.array([[[8, 8]]], np.float32), (STRIDE,), 4.0)
SIZE = (GRID * STRIDE, GRID * STRIDE)


def assign(
    labels: list[tuple[float, ...]], assigner: Assigner = ONE, num_images: int = 1, size_hw=SIZE
) -> Targets:
    """`labels`: (image, class, centre x, centre y, width, height), the last four in cells of 8 px."""
    rows = np.array(labels, np.float32).reshape(-1, 6)
    images, classes = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
    return assigner(images, classes, rows[:, 2:] * STRIDE, num_images, size_hw)


def rows(targets: Targets, level: int = 0) -> set[tuple]:
    """The matches of a level, without padding and order."""
    real = targets.weights[level] > 0
    cells, boxes = targets.cells[level][real].tolist(), targets.boxes[level][real].tolist()
    found = [
        (cell, kind, *(round(value, 4) for value in box))
        for cell, kind, box in zip(cells, targets.classes[level][real].tolist(), boxes, strict=True)
    ]
    assert len(set(found)) == len(found), "a match comes twice"
    return set(found)


def assigned(x: float, y: float) -> set[tuple[int, int]]:
    """(column, row) of the cells that a label of one cell's size with this centre is assigned to."""
    targets = assign([(0, 0, x, y, 1, 1)])
    cells = targets.cells[0, : int(targets.num_matches[0])].tolist()
    return {(cell % GRID, cell // GRID) for cell in cells}


# ---- which cells


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((1.2, 1.3), {(1, 1), (0, 1), (1, 0)}),  # left and upper
        ((1.7, 1.3), {(1, 1), (2, 1), (1, 0)}),  # right and upper
        ((1.2, 1.8), {(1, 1), (0, 1), (1, 2)}),  # left and lower
        ((2.7, 2.8), {(2, 2), (3, 2), (2, 3)}),  # right and lower
        ((0.3, 1.3), {(0, 1), (0, 0)}),  # nothing is left of the first column
        ((1.3, 0.2), {(1, 0), (0, 0)}),  # nor above the first row
        ((0.3, 0.3), {(0, 0)}),
        ((3.7, 3.8), {(3, 3)}),  # nor right of the last column, nor under the last row
        ((3.2, 3.3), {(3, 3), (2, 3), (3, 2)}),
        ((1.5, 2.5), {(1, 2)}),  # the very middle of a cell: neither half
    ],
)
def test_a_label_is_assigned_to_its_cell_and_the_neighbours_it_is_near(centre, expected):
    assert assigned(*centre) == expected


@pytest.mark.parametrize(
    ("centre", "expected"),
    [
        ((2.0, 1.5), {(2, 1), (1, 1)}),  # own and left; the right cell's corner would be a whole cell away
        ((1.5, 2.0), {(1, 2), (1, 1)}),
        ((2.0, 2.0), {(2, 2), (1, 2), (2, 1)}),
        ((1.0, 1.5), {(1, 1)}),  # x > 1 is asked for the left cell
        ((1.0, 1.0), {(1, 1)}),
        ((3.0, 2.5), {(3, 2), (2, 2)}),  # W - x is not over 1
    ],
)
def test_a_centre_exactly_on_a_border(centre, expected):
    assert assigned(*centre) == expected


@pytest.mark.parametrize(
    ("centre", "expected"),
    [((0.0, 0.0), (0, 0)), ((4.0, 4.0), (3, 3)), ((4.0, 0.0), (3, 0)), ((0.0, 4.0), (0, 3))],
)
def test_a_centre_on_the_image_border_is_clamped_into_the_map(centre, expected):
    assert assigned(*centre) == {expected}


def test_a_map_may_be_wider_than_high():
    targets = assign([(0, 0, 5.7, 1.5, 1, 1)], size_hw=(2 * STRIDE, 7 * STRIDE))
    assert rows(targets) == {(1 * 7 + 5, 0, 0.7, 0.5, 1, 1), (1 * 7 + 6, 0, -0.3, 0.5, 1, 1)}


# ---- what a match says


def test_offsets_sizes_and_classes():
    found = rows(assign([(0, 5, 1.2, 2.75, 1.5, 0.5)]))
    assert found == {
        (2 * GRID + 1, 5, 0.2, 0.75, 1.5, 0.5),
        (2 * GRID + 0, 5, 1.2, 0.75, 1.5, 0.5),
        (3 * GRID + 1, 5, 0.2, -0.25, 1.5, 0.5),
    }


def test_the_flat_index_counts_image_anchor_row_column():
    two = Assigner(np.array([[[8, 8], [16, 8], [800, 8]]], np.float32), (STRIDE,), 4.0)
    cells = {cell for cell, *_ in rows(assign([(2, 0, 1.5, 2.5, 1, 1)], two, num_images=3))}
    assert cells == {((2 * 3 + anchor) * GRID + 2) * GRID + 1 for anchor in (0, 1)}


def test_every_level_measures_in_its_own_cells():
    levels = Assigner(np.array([[[8, 8]], [[16, 16]]], np.float32), (8, 16), 4.0)
    targets = assign([(0, 0, 1.5, 1.5, 1, 1)], levels)  # 12 px from the corner, 8 px large
    assert rows(targets, 0) == {(1 * 4 + 1, 0, 0.5, 0.5, 1, 1)}
    # in cells of 16 px it is at 0.75, half a cell large: also near the right and the lower cell
    assert rows(targets, 1) == {
        (0, 0, 0.75, 0.75, 0.5, 0.5),
        (1, 0, -0.25, 0.75, 0.5, 0.5),
        (2, 0, 0.75, -0.25, 0.5, 0.5),
    }
    assert targets.num_matches.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("size", "goes"),
    [
        ((1, 1), True),
        ((3.99, 1), True),
        ((4, 1), False),  # under anchor_t, not at it
        ((1, 4), False),
        ((0.251, 1), True),
        ((0.25, 1), False),
        ((1, 0.249), False),
        ((3.9, 0.26), True),  # each side against its own, not one against the other
        ((0, 1), False),
    ],
)
def test_a_label_goes_with_anchors_of_like_size_only(size, goes):
    assert bool(rows(assign([(0, 0, 1.5, 1.5, *size)]))) == goes


def test_a_larger_anchor_t_takes_more():
    wide = Assigner(ONE.anchors_px, (STRIDE,), 8.0)
    assert len(rows(assign([(0, 0, 1.5, 1.5, 7.9, 1)], wide))) == 1
    assert len(rows(assign([(0, 0, 1.5, 1.5, 7.9, 1)]))) == 0


# ---- the batch


def yolo(seed: int, num_labels: int, num_images: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    centres, sizes = rng.uniform(0, 128, (num_labels, 2)), np.exp(rng.uniform(1, 4.8, (num_labels, 2)))
    boxes = np.concatenate((centres, sizes), 1).astype(np.float32)
    return np.sort(rng.integers(0, num_images, num_labels)), rng.integers(0, 9, num_labels), boxes


YOLO = Assigner(anchors_px("yolov5n").numpy(), level_strides("yolov5n"), 4.0)


def test_padding_has_weight_zero_and_rows_that_hurt_nobody():
    targets = YOLO(*yolo(0, 12, 2), 2, (128, 128))
    assert targets.cells.shape == targets.classes.shape == targets.weights.shape == (3, MIN_CAPACITY)
    assert targets.boxes.shape == (3, MIN_CAPACITY, 4)
    assert [t.dtype for t in targets] == [torch.int64, torch.float32, torch.int64] + 3 * [torch.float32]
    assert set(targets.weights.unique().tolist()) == {0.0, 1.0}
    assert targets.num_matches.tolist() == targets.weights.sum(1).tolist()
    assert len(set(targets.num_matches.tolist())) > 1  # levels differ
    assert targets.num_images.item() == 2
    padding = targets.weights == 0
    assert (targets.cells[padding] == 0).all()
    assert (targets.boxes[padding][:, 2:] > 0).all()  # CIoU divides by sizes


def test_the_capacity_is_a_power_of_two_that_holds_all_matches():
    labels = [(0, 0, 1.5, 1.5, 1, 1)] * 300
    assert assign(labels).cells.shape == (1, 512)
    assert assign(labels).weights.sum() == 300
    assert assign(labels[:257]).cells.shape == (1, 512)
    assert assign(labels[:256]).cells.shape == (1, 256)


def test_no_labels():
    targets = YOLO(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.float32), 3, (64, 96))
    assert targets.num_matches.tolist() == [0, 0, 0]
    assert targets.num_images.item() == 3
    assert targets.weights.sum() == 0
    assert targets.cells.shape == (3, MIN_CAPACITY)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_order_of_labels_does_not_matter(seed):
    images, classes, boxes = yolo(seed, 15, 3)
    order = np.random.default_rng(seed + 1).permutation(15)
    plain = YOLO(images, classes, boxes, 3, (128, 128))
    mixed = YOLO(images[order], classes[order], boxes[order], 3, (128, 128))
    assert plain.num_matches.equal(mixed.num_matches)
    assert all(rows(plain, level) == rows(mixed, level) for level in range(3))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_batch_is_its_images_one_after_the_other(seed):
    num_images = 4
    images, classes, boxes = yolo(seed, 18, num_images)
    batch = YOLO(images, classes, boxes, num_images, (128, 192))
    for level, stride in enumerate(YOLO.strides):
        per_image = 3 * (128 // stride) * (192 // stride)
        expected: list[tuple] = []
        for image in range(num_images):
            own = images == image
            alone = YOLO(np.zeros(own.sum(), np.int64), classes[own], boxes[own], 1, (128, 192))
            expected += [(cell + image * per_image, *rest) for cell, *rest in rows(alone, level)]
        assert rows(batch, level) == set(expected)
        assert batch.num_matches[level] == len(expected)


@given(x=st.floats(0, 128, width=32), y=st.floats(0, 128, width=32))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_assigned_offset_is_one_that_the_decoding_can_reach(x, y):
    """centre = 2 s - 0.5 + cell: between -0.5 and 1.5 cells from the corner."""
    boxes = np.array([[x, y, 30, 30]], np.float32)
    targets = YOLO(np.zeros(1, np.int64), np.zeros(1, np.int64), boxes, 1, (128, 128))
    assert targets.num_matches.sum() > 0
    offsets = targets.boxes[targets.weights > 0][:, :2]
    assert offsets.min() >= -0.5
    assert offsets.max() <= 1.5
