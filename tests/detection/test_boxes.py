"""Boxes: formats, IoU, suppression and the letterbox, each against the plainest way to compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsyolo.detection.boxes import (
    PAD_GREY,
    cxcywh_to_xyxy,
    letterbox,
    nms,
    paired_ciou,
    unletterbox,
    xyxy_to_cxcywh,
)


def random_xyxy(rng: np.random.Generator, count: int, span: float = 100.0) -> np.ndarray:
    corners = rng.uniform(0, span, (count, 2, 2))
    return np.concatenate((corners.min(1), corners.max(1)), 1)


def scalar_iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def scalar_ciou(a, b, alpha: float | None = None) -> float:
    """Zheng et al. 2020, equations (7) to (10), for two boxes of centre and size."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    (al, at, ar, ab), (bl, bt, br, bb) = corners(a), corners(b)
    diagonal2 = (max(ar, br) - min(al, bl)) ** 2 + (max(ab, bb) - min(at, bt)) ** 2
    distance2 = (ax - bx) ** 2 + (ay - by) ** 2
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    alpha = scalar_alpha(a, b) if alpha is None else alpha
    return scalar_iou(corners(a), corners(b)) - distance2 / diagonal2 - alpha * v


def scalar_alpha(a, b) -> float:
    v = 4 / math.pi**2 * (math.atan(b[2] / b[3]) - math.atan(a[2] / a[3])) ** 2
    return v / (1 - scalar_iou(corners(a), corners(b)) + v) if v else 0.0


def corners(box) -> tuple[float, float, float, float]:
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


# ---- formats


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_formats_by_hand_keep_the_kind_of_array(make):
    corners = make([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 0.0, 0.0]])
    centred = make([[20.0, 40.0, 20.0, 40.0], [0.0, 0.0, 0.0, 0.0]])
    assert type(xyxy_to_cxcywh(corners)) is type(corners)
    assert xyxy_to_cxcywh(corners).tolist() == centred.tolist()
    assert cxcywh_to_xyxy(centred).tolist() == corners.tolist()


def test_formats_keep_leading_dimensions_and_take_no_boxes():
    boxes = np.random.default_rng(0).uniform(1, 9, (2, 3, 5, 4))
    np.testing.assert_allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-12)
    assert cxcywh_to_xyxy(np.zeros((0, 4), np.float32)).shape == (0, 4)
    assert xyxy_to_cxcywh(torch.zeros(0, 4)).shape == (0, 4)


# ---- IoU


def random_pairs(count: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of centre and size in float64: near ones, far ones, and of quite different shapes."""
    rng = np.random.default_rng(seed)
    a, b = (np.concatenate((rng.uniform(0, 8, (count, 2)), rng.uniform(0.5, 9, (count, 2))), 1) for _ in "ab")
    return torch.from_numpy(a), torch.from_numpy(b)


def test_paired_ciou_equals_the_scalar_formula():
    a, b = random_pairs(60)
    expected = [scalar_ciou(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert min(expected) < 0 < max(expected)  # apart and overlapping
    np.testing.assert_allclose(paired_ciou(a, b, eps=0.0).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(paired_ciou(a, b).numpy(), expected, atol=1e-6)  # eps hardly matters


def test_paired_ciou_of_a_box_with_itself_is_one_and_shape_alone_costs():
    box = torch.tensor([[3.0, 4.0, 2.0, 6.0]])
    assert paired_ciou(box, box).item() == pytest.approx(1, abs=1e-6)
    turned = torch.tensor([[3.0, 4.0, 6.0, 2.0]])
    iou = 4 / 20  # 2 x 2 of 12 + 12 - 4; the centres are one
    assert paired_ciou(box, turned).item() < iou - 0.02


def test_paired_ciou_has_the_gradient_of_the_formula_with_alpha_held():
    a, b = (boxes.requires_grad_() for boxes in random_pairs(12, seed=3))
    paired_ciou(a, b, eps=0.0).sum().backward()
    step = 1e-6
    for row, pair in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        alpha = scalar_alpha(*pair)
        for side, tensor in enumerate((a, b)):
            for k in range(4):
                values = []
                for moved in (step, -step):
                    boxes = [list(box) for box in pair]
                    boxes[side][k] += moved
                    values.append(scalar_ciou(*boxes, alpha))
                slope = (values[0] - values[1]) / (2 * step)
                assert tensor.grad[row, k].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_paired_ciou_and_its_gradient_stay_finite_for_empty_boxes():
    a = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1e-9, 5.0]], requires_grad=True)
    b = torch.tensor([[1.0, 1.0, 0.0, 0.0], [4.0, 4.0, 2.0, 2.0]])
    ciou = paired_ciou(a, b)
    ciou.sum().backward()
    assert torch.isfinite(ciou).all()
    assert torch.isfinite(a.grad).all()


# ---- suppression


def greedy(boxes, scores, classes, iou_threshold, max_detections) -> list[int]:
    """The definition: the best box left, out with those of its class that overlap it too much, and again."""
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    keep = []
    while left and len(keep) < max_detections:
        best = left.pop(0)
        keep.append(best)
        left = [
            i
            for i in left
            if classes[i] != classes[best] or scalar_iou(boxes[best], boxes[i]) <= iou_threshold
        ]
    return keep


@pytest.mark.parametrize("seed", range(6))
def test_nms_equals_the_greedy_loop(seed):
    rng = np.random.default_rng(seed)
    boxes = (random_xyxy(rng, 120) - 30 * (seed % 2)).astype(np.float32)  # below zero too
    scores = np.round(rng.random(120), 1).astype(np.float32)  # many ties
    classes = rng.integers(0, 3, 120)
    for threshold, most in ((0.45, 300), (0.1, 300), (0.45, 7)):
        expected = greedy(boxes.astype(np.float64), scores, classes, threshold, most)
        assert nms(boxes, scores, classes, threshold, most).tolist() == expected
        assert len(expected) < 120


def test_nms_by_hand():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 8], [50, 50, 60, 60]], np.float32)
    scores = np.array([0.5, 0.9, 0.8, 0.1], np.float32)
    classes = np.array([0, 0, 1, 0])
    assert nms(boxes, scores, classes, 0.79, 300).tolist() == [1, 2, 3]  # IoU 0.8 within class 0
    assert nms(boxes, scores, classes, 0.81, 300).tolist() == [1, 2, 0, 3]
    assert nms(boxes, scores, classes, 0.79, 2).tolist() == [1, 2]
    assert nms(boxes, scores, classes, 0.79, 0).tolist() == []
    assert nms(boxes[:0], scores[:0], classes[:0], 0.5, 300).tolist() == []


def test_nms_keeps_a_box_at_the_threshold_and_not_above():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)
    args = (np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64))
    assert nms(boxes, *args, 0.5, 300).tolist() == [0, 1]
    assert nms(boxes, *args, 0.4999, 300).tolist() == [0]


def test_nms_keeps_the_first_of_equals():
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (5, 1))
    assert nms(boxes, np.full(5, 0.3, np.float32), np.zeros(5, np.int64), 0.5, 300).tolist() == [0]


def test_nms_keeps_many_classes_apart_to_the_last_pixel():
    """Moving classes apart must not cost precision: neighbours of class 79 that just do not overlap too much."""
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 49.9], [600, 600, 640, 640]], np.float32)
    args = (np.array([0.9, 0.8, 0.7], np.float32), np.array([79, 79, 0]))
    assert nms(boxes, *args, 0.499005, 300).tolist() == [0, 1, 2]
    assert nms(boxes, *args, 0.498995, 300).tolist() == [0, 2]


# ---- letterbox


@pytest.mark.parametrize(
    ("size_hw", "shape_hw", "expected"),
    [
        ((50, 100), (64, 64), (0.64, (0, 16))),
        ((100, 50), (64, 64), (0.64, (16, 0))),
        ((32, 20), (64, 64), (2.0, (12, 0))),  # enlarged
        ((64, 64), (64, 64), (1.0, (0, 0))),
        ((48, 64), (64, 96), (4 / 3, (5, 0))),
    ],
)
def test_letterbox_by_hand(size_hw, shape_hw, expected):
    image = np.full((*size_hw, 3), 250, np.uint8)
    padded, scale, pad_xy = letterbox(image, shape_hw)
    assert padded.shape == (*shape_hw, 3)
    assert scale == pytest.approx(expected[0])
    assert tuple(pad_xy) == expected[1]
    left, top = pad_xy
    high, wide = round(size_hw[0] * scale), round(size_hw[1] * scale)
    inside = np.zeros(shape_hw, bool)
    inside[top : top + high, left : left + wide] = True
    assert (padded[inside] == 250).all()
    assert (padded[~inside] == PAD_GREY).all()
    assert 0 <= (shape_hw[1] - wide) - 2 * left <= 1  # evenly
    assert 0 <= (shape_hw[0] - high) - 2 * top <= 1


@pytest.mark.parametrize("shape_hw", [(96, 96), (64, 160), (224, 320)])
def test_unletterbox_takes_boxes_back(shape_hw):
    size_hw = (117, 203)
    _, scale, pad_xy = letterbox(np.zeros((*size_hw, 3), np.uint8), shape_hw)
    rng = np.random.default_rng(5)
    boxes = (random_xyxy(rng, 20, 1.0) * [203, 117, 203, 117]).astype(np.float32)
    inside = boxes * scale + np.array([*pad_xy, *pad_xy])
    back = unletterbox(inside, scale, pad_xy, size_hw)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, boxes, atol=1e-3)


def test_unletterbox_clips_to_the_image():
    back = unletterbox(np.array([[0, 0, 64, 64]], np.float32), 0.64, (0, 16), (50, 100))
    np.testing.assert_allclose(back, [[0, 0, 100, 50]], atol=1e-4)


def test_a_painted_box_is_where_unletterbox_says():
    image = np.zeros((120, 200, 3), np.uint8)
    image[30:90, 50:150] = 255
    padded, scale, pad_xy = letterbox(image, (96, 128))
    rows, columns = np.nonzero(padded[..., 0] > 180)
    seen = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    np.testing.assert_allclose(unletterbox(seen, scale, pad_xy, (120, 200)), [[50, 30, 150, 90]], atol=1.6)
