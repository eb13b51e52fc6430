"""Boxes: formats, IoU and CIoU, non-maximum suppression, letterbox and its inverse.

`xyxy` is left, top, right, bottom; `cxcywh` centre and size; both in pixels unless stated.
"""

import math
from typing import TypeVar

import cv2
import numpy as np
import torch

PAD_GREY = 114

Boxes = TypeVar("Boxes", np.ndarray, torch.Tensor)


def cxcywh_to_xyxy(boxes: Boxes) -> Boxes:
    """Return (..., 4) centre and size as corners."""
    half = boxes[..., 2:4] / 2
    return _join(boxes[..., :2] - half, boxes[..., :2] + half)


def xyxy_to_cxcywh(boxes: Boxes) -> Boxes:
    """Return (..., 4) corners as centre and size."""
    return _join((boxes[..., :2] + boxes[..., 2:4]) / 2, boxes[..., 2:4] - boxes[..., :2])


def _join(first: Boxes, second: Boxes) -> Boxes:
    if isinstance(first, torch.Tensor):
        return torch.cat((first, second), -1)
    return np.concatenate((first, second), -1)


def paired_ciou(a_cxcywh: torch.Tensor, b_cxcywh: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Return the complete IoU of a[i] with b[i], (N, 4) and (N, 4) to (N,), differentiable in both.

    CIoU = IoU - d^2 / c^2 - alpha v, with d the distance of the centres, c the diagonal of the enclosing box,
    v = 4 / pi^2 (atan(w_b / h_b) - atan(w_a / h_a))^2 and alpha = v / (1 - IoU + v) taken as a constant
    (Zheng et al. 2020, arXiv:1911.08287).
    """
    a, b = cxcywh_to_xyxy(a_cxcywh), cxcywh_to_xyxy(b_cxcywh)
    (aw, ah), (bw, bh) = a_cxcywh[:, 2:].unbind(1), b_cxcywh[:, 2:].unbind(1)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = overlap / (aw * ah + bw * bh - overlap + eps)
    enclosing = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    diagonal2 = enclosing.square().sum(1) + eps
    distance2 = (a_cxcywh[:, :2] - b_cxcywh[:, :2]).square().sum(1)
    v = (4 / math.pi**2) * (torch.atan(bw / (bh + eps)) - torch.atan(aw / (ah + eps))).square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return iou - distance2 / diagonal2 - alpha * v


def pairwise_iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """Return the IoU of each a (N, 4) with each b (M, 4), (N, M) float64; 0 where both are empty."""
    a, b = (boxes.astype(np.float64) for boxes in (a_xyxy[:, None], b_xyxy[None]))
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.maximum(size, 0).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return overlap / np.maximum(areas - overlap, 1e-9)


def nms(
    boxes_xyxy: np.ndarray, scores: np.ndarray, classes: np.ndarray, iou_threshold: float, max_detections: int
) -> np.ndarray:
    """Return the indices of the boxes that survive greedy NMS within each class, best first.

    Args:
        boxes_xyxy: (N, 4). scores: (N,). classes: (N,).
        iou_threshold: a box is dropped if its IoU with a better one of its class is above this.
        max_detections: the search ends when so many are kept. So the cost is at most `max_detections` * N, however
            crowded the output of an untrained network is.

    Ties are broken by the order given, so the result is the same on every machine.
    """
    order = np.argsort(-scores, kind="stable")
    # Move the boxes of different classes apart, so that one pass serves all classes.
    span = float(boxes_xyxy.max(initial=0) - boxes_xyxy.min(initial=0)) + 1.0
    boxes = (boxes_xyxy + classes[:, None] * span)[order].astype(np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    keep: list[int] = []
    while order.size and len(keep) < max_detections:
        keep.append(order[0])
        width = np.minimum(boxes[0, 2], boxes[1:, 2]) - np.maximum(boxes[0, 0], boxes[1:, 0])
        height = np.minimum(boxes[0, 3], boxes[1:, 3]) - np.maximum(boxes[0, 1], boxes[1:, 1])
        overlap = np.maximum(width, 0) * np.maximum(height, 0)
        rest = 1 + np.flatnonzero(overlap <= iou_threshold * (areas[0] + areas[1:] - overlap))
        order, boxes, areas = order[rest], boxes[rest], areas[rest]
    return np.array(keep, dtype=np.int64)


def letterbox(image: np.ndarray, shape_hw: tuple[int, int]) -> tuple[np.ndarray, float, tuple[int, int]]:
    """Scale an image to fit a shape, and pad it evenly with grey.

    Returns:
        The (H, W, 3) image of `shape_hw`, the scale (pixels out per pixel in), and the padding (left, top).
        Boxes are mapped by `boxes * scale + (left, top, left, top)`, and back by `unletterbox`.
    """
    height, width = image.shape[:2]
    scale = min(shape_hw[0] / height, shape_hw[1] / width)
    inner_h, inner_w = round(height * scale), round(width * scale)
    if (inner_h, inner_w) != (height, width):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = cv2.resize(image, (inner_w, inner_h), interpolation=interpolation)
    left, top = (shape_hw[1] - inner_w) // 2, (shape_hw[0] - inner_h) // 2
    if (inner_h, inner_w) == tuple(shape_hw):
        return image, scale, (0, 0)
    padded = np.full((*shape_hw, 3), PAD_GREY, np.uint8)
    padded[top : top + inner_h, left : left + inner_w] = image
    return padded, scale, (left, top)


def unletterbox(
    boxes_xyxy: np.ndarray, scale: float, pad_xy: tuple[float, float], size_hw: tuple[int, int]
) -> np.ndarray:
    """Return boxes (N, 4) of a letterboxed image in pixels of the original, clipped to its size."""
    boxes = (boxes_xyxy - np.array([*pad_xy, *pad_xy], np.float32)) / scale
    height, width = size_hw
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)
