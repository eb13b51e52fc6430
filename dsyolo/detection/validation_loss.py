"""The training's loss over a validation split, from the raw maps that its detections are decoded from.

The whole split counts as one batch: box and class losses are means over all its matches of a level, the objectness loss
is a mean over its images, each a mean over that image's cells. So the figures depend neither on the number of ranks, nor
on the batch size, nor on rows and batches that fill up.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dsyolo.base.batch import EvalBatch, GroundTruth, Targets
from dsyolo.detection.boxes import xyxy_to_cxcywh
from dsyolo.detection.loss import DetectionLoss

Assign = Callable[[np.ndarray, np.ndarray, np.ndarray, int, tuple[int, int]], Targets]


class BatchLoss(NamedTuple):
    """The loss of some images of one shape, before it is normalised."""

    first_image: int  # `image_id`, which orders the sums: they are the same on any number of ranks
    sums: tuple[
        tuple[float, float, float], ...
    ]  # by level: box and class summed over matches, objectness over images
    num_matches: tuple[float, ...]  # by level
    num_images: int


class Prediction(NamedTuple):
    """The network's prediction for a batch."""

    decoded: torch.Tensor  # (B, boxes, 5 + K)
    losses: tuple[BatchLoss, ...] = ()  # of parts of the batch; none where they are not asked for


PredictBatch = Callable[[EvalBatch], Prediction]


class ValidationLoss(NamedTuple):
    """Box, objectness and class loss of a validation split, with gains, as those of a training step."""

    box: float
    obj: float
    cls: float


def predict_with_loss(
    predict: Callable[[torch.Tensor, Targets], tuple[torch.Tensor, torch.Tensor]],
    assign: Assign,
    batch: EvalBatch,
) -> Prediction:
    """Predict a batch that has ground truths, and measure its loss in the same pass.

    Args:
        predict: maps images (B, 3, H, W) and their targets to decoded boxes and the sums (L, 3) of
            `DetectionLoss.level_sums`.
        assign: the training's assigner.
    """
    height, width = batch.images.shape[2:]
    targets = targets_of(batch.ground_truths, assign, (height, width))
    decoded, sums = predict(batch.images, targets)
    box, obj, cls = (column.tolist() for column in sums.cpu().unbind(1))
    matches = tuple(targets.num_matches.tolist())
    first = batch.ground_truths[0].image_id
    loss = BatchLoss(first, tuple(zip(box, obj, cls, strict=True)), matches, len(batch.ground_truths))
    return Prediction(decoded, (loss,))


def targets_of(ground_truths: Sequence[GroundTruth], assign: Assign, size_hw: tuple[int, int]) -> Targets:
    """Return the targets of letterboxed images of one shape, as a training would assign them, without padding."""
    of_image = np.repeat(np.arange(len(ground_truths)), [len(one.classes) for one in ground_truths])
    classes = np.concatenate([one.classes for one in ground_truths])
    boxes = [one.boxes_xyxy * one.scale + np.array(one.pad_xy * 2) for one in ground_truths]
    boxes_cxcywh = xyxy_to_cxcywh(np.concatenate(boxes)).astype(np.float32)
    targets = assign(of_image, classes, boxes_cxcywh, len(ground_truths), size_hw)
    most = max(int(targets.num_matches.max()), 1)  # shapes need not be fixed here, and rows cost memory
    return Targets._make((*(rows[:, :most].contiguous() for rows in targets[:-2]), *targets[-2:]))


def total(loss: DetectionLoss, parts: Iterable[BatchLoss]) -> ValidationLoss | None:
    """Return the loss over all images of `parts`, which come from all ranks; None without any."""
    ordered = sorted(parts)
    if not ordered:
        return None
    num_images = sum(part.num_images for part in ordered)
    box = obj = cls = 0.0
    for level, balance in enumerate(loss.balance):
        num_matches = max(sum(part.num_matches[level] for part in ordered), 1)
        box_sum, obj_sum, cls_sum = (math.fsum(part.sums[level][i] for part in ordered) for i in range(3))
        box += box_sum / num_matches
        obj += balance * obj_sum / num_images
        cls += cls_sum / num_matches
    box_gain, obj_gain, cls_gain = loss.gains
    return ValidationLoss(box * box_gain, obj * obj_gain, cls * cls_gain)
