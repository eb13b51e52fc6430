"""Assigns labels to anchors and cells, independently of the predictions (docs/yolov5.md, Assignment).

So it runs on the host, in the loader's workers, and the device gets tensors of fixed shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsyolo.base.batch import Targets

MIN_CAPACITY = 256  # rows per level; above it the next power of two, so that few shapes occur


@dataclass(frozen=True, eq=False)
class Assigner:
    """Assigns labels to the anchors of every level."""

    anchors_px: np.ndarray  # (L, A, 2) float32 widths and heights
    strides: Sequence[int]  # pixels per cell of each level
    anchor_t: float  # a label matches an anchor if their widths and heights differ by less than this factor

    def __call__(
        self,
        images: np.ndarray,
        classes: np.ndarray,
        boxes_cxcywh: np.ndarray,
        num_images: int,
        size_hw: tuple[int, int],
    ) -> Targets:
        """Return the padded targets of a batch.

        Args:
            images: (T,) int64, the image in the batch that each label belongs to.
            classes: (T,) int64.
            boxes_cxcywh: (T, 4) float32, in pixels.
            num_images: B.
            size_hw: of the batch's images in pixels, multiples of every stride.
        """
        levels = []
        for i, stride in enumerate(self.strides):
            grid_hw = (size_hw[0] // stride, size_hw[1] // stride)
            levels.append(self._level(i, images, classes, boxes_cxcywh / np.float32(stride), grid_hw))
        most = max(len(level[0]) for level in levels)
        capacity = max(MIN_CAPACITY, 1 << (most - 1).bit_length() if most else 0)
        shape = (len(levels), capacity)
        cells, kinds = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        boxes, weights = np.full((*shape, 4), 0.5, np.float32), np.zeros(shape, np.float32)
        for i, level in enumerate(levels):
            count = len(level[0])
            cells[i, :count], boxes[i, :count], kinds[i, :count] = level
            weights[i, :count] = 1
        arrays = (cells, boxes, kinds, weights, weights.sum(1), np.float32(num_images))
        return Targets(*(torch.as_tensor(array) for array in arrays))

    def _level(
        self, level: int, images: np.ndarray, classes: np.ndarray, boxes: np.ndarray, grid_hw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return cells (M,), boxes (M, 4) and classes (M,) of a level; `boxes` (T, 4) are in its cells.

        Rows are in the order: own cell, left, upper, right, lower.
        """
        anchors = self.anchors_px[level] / self.strides[level]
        num_anchors = len(anchors)
        ratio = boxes[:, None, 2:] / anchors[None]  # (T, A, 2)
        label, anchor = np.nonzero(np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)).max(-1) < self.anchor_t)
        centre = boxes[label, :2]  # (M, 2)
        limit = np.array([grid_hw[1], grid_hw[0]], np.float32)
        near_low = (centre % 1 < 0.5) & (centre > 1)
        # A centre on the border of two cells has its far neighbour out of reach of 2 s - 0.5: hence "> 0".
        far = (limit - centre) % 1
        near_high = (far < 0.5) & (far > 0) & (limit - centre > 1)
        own = np.floor(centre).astype(np.int64)
        left_top, right_bottom = near_low.T, near_high.T
        picks = [np.arange(len(label)), *map(np.flatnonzero, (*left_top, *right_bottom))]
        shifts = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))
        cell = np.concatenate([own[pick] + shift for pick, shift in zip(picks, shifts, strict=True)])
        pick = np.concatenate(picks)
        cell = np.clip(cell, 0, limit.astype(np.int64) - 1)
        label, anchor, centre = label[pick], anchor[pick], centre[pick]
        flat = ((images[label] * num_anchors + anchor) * grid_hw[0] + cell[:, 1]) * grid_hw[1] + cell[:, 0]
        targets = np.concatenate((centre - cell, boxes[label, 2:]), 1, dtype=np.float32)
        return flat, targets, classes[label]
