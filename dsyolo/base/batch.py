"""What crosses the borders between layers, with shapes.

Letters in shapes: B images, L levels, A anchors per cell and level, H W cells (or pixels of an image),
K classes, N boxes of one image, M matches per level (padded to a capacity).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Sample(NamedTuple):
    """One image with its labels, as the loader's workers handle it."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    boxes_xyxy: np.ndarray  # (N, 4) float32, pixels of `image`
    classes: np.ndarray  # (N,) int64
    polygons: tuple[np.ndarray | None, ...] = ()  # () or one per box: (P, 2) float32 pixels, or None


class Targets(NamedTuple):
    """The matches of a batch, assigned from labels and anchors alone. A flat tuple, as DeepSpeed's labels must be.

    Rows beyond a level's matches have weight 0, so shapes stay fixed. `num_matches` and `num_images` are
    what the loss divides by: collate writes this batch's own, the engine those of the global batch.
    """

    cells: torch.Tensor  # (L, M) int64, index into the flattened (B, A, H, W) of the level
    boxes: torch.Tensor  # (L, M, 4) float32: offset from the cell's corner and size, in cells
    classes: torch.Tensor  # (L, M) int64
    weights: torch.Tensor  # (L, M) float32: 1 for a match, 0 for padding
    num_matches: torch.Tensor  # (L,) float32
    num_images: torch.Tensor  # () float32


class Batch(NamedTuple):
    """A micro-batch for training: DeepSpeed's (inputs, labels)."""

    images: torch.Tensor  # (B, 3, H, W) uint8, RGB
    targets: Targets


class GroundTruth(NamedTuple):
    """The labels of one image in the image's own pixels, and how the network's input was made from it."""

    image_id: int  # index in the data set
    size_hw: tuple[int, int]  # of the original image
    boxes_xyxy: np.ndarray  # (N, 4) float32, pixels of the original image
    classes: np.ndarray  # (N,) int64
    scale: float  # input pixels per original pixel
    pad_xy: tuple[float, float]  # left and top padding in input pixels


class EvalBatch(NamedTuple):
    """A batch for validation: letterboxed images and the truth of each."""

    images: torch.Tensor  # (B, 3, H, W) uint8, RGB
    ground_truths: tuple[GroundTruth, ...]


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes_xyxy: np.ndarray  # (N, 4) float32, pixels of the original image
    scores: np.ndarray  # (N,) float32
    classes: np.ndarray  # (N,) int64


class StepStats(NamedTuple):
    """Of one optimizer step, over the global batch. Tensors stay on the device until somebody reads them."""

    losses: torch.Tensor  # (3,) float32: box, objectness, class; each times its gain, per image
    grad_norm: torch.Tensor | float | None  # before clipping, where the engine knows it
    num_images: int  # of the global batch
    was_applied: bool = True  # False: gradients were not finite, and the weights are those of before
