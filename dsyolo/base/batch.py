"""The types that cross the borders between layers, with their shapes.

Letters in shapes: B images, L levels, A anchors per cell and level, H W cells (or pixels of an image),
K classes, N boxes of one image, M matches per level (padded to a capacity).
"""

from typing import NamedTuple

import numpy as np
import torch


class Sample(NamedTuple):
    """One image with its labels, in the loader's workers."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    boxes_xyxy: np.ndarray  # (N, 4) float32, pixels of `image`
    classes: np.ndarray  # (N,) int64
    polygons: tuple[np.ndarray | None, ...] = ()  # () or one per box: (P, 2) float32 pixels, or None


class Targets(NamedTuple):
    """The matches of a batch, assigned from labels and anchors alone. A flat tuple, as DeepSpeed's labels must be.

    Rows beyond a level's matches have weight 0, so shapes stay fixed. The loss divides by `num_matches` and `num_images`:
    collate writes this batch's own, the engine those of the global batch.
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
    """The labels of one image in its own pixels, and the transform from it to the network's input."""

    image_id: int  # index in the data set
    size_hw: tuple[int, int]  # height and width of the original image
    boxes_xyxy: np.ndarray  # (N, 4) float32, pixels of the original image
    classes: np.ndarray  # (N,) int64
    scale: float  # input pixels per original pixel
    pad_xy: tuple[float, float]  # left and top padding in input pixels


class EvalBatch(NamedTuple):
    """A batch for validation: letterboxed images and their ground truths."""

    images: torch.Tensor  # (B, 3, H, W) uint8, RGB
    ground_truths: tuple[GroundTruth, ...]


class Detections(NamedTuple):
    """The detections in one image, best first."""

    boxes_xyxy: np.ndarray  # (N, 4) float32, pixels of the original image
    scores: np.ndarray  # (N,) float32
    classes: np.ndarray  # (N,) int64


class StepStats(NamedTuple):
    """Statistics of one optimizer step over the global batch. Tensors stay on the device until they are read."""

    losses: torch.Tensor  # (3,) float32: box, objectness, class; each times its gain, per image
    grad_norm: torch.Tensor | float | None  # before clipping; None if the engine does not know it
    num_images: int  # images of the global batch
    was_applied: bool = True  # False: gradients were not finite, and the weights are unchanged
