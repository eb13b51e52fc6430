"""Validation: every rank predicts its share, and all compute the same metrics from all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsyolo.base.batch import Detections, EvalBatch, GroundTruth
from dsyolo.detection.boxes import unletterbox
from dsyolo.detection.metrics import Metrics, evaluate
from dsyolo.detection.postprocess import PostProcessor, Predict

Found = tuple[GroundTruth, Detections]


def detect_all(predict: Predict, batches: Iterable[EvalBatch], finder: PostProcessor) -> list[Found]:
    """The detections in every image of `batches`, in pixels of the original images."""
    found = []
    for batch in batches:
        decoded = predict(batch.images)
        for ground_truth, one in zip(
            batch.ground_truths, decoded, strict=False
        ):  # a batch that fills up a round has no truths
            inside = finder(one)
            boxes = unletterbox(
                inside.boxes_xyxy, ground_truth.scale, ground_truth.pad_xy, ground_truth.size_hw
            )
            found.append((ground_truth, inside._replace(boxes_xyxy=boxes)))
    return found


def validate(
    predict: Predict,
    batches: Iterable[EvalBatch],
    finder: PostProcessor,
    class_names: Sequence[str],
    all_gather: Callable[[Any], list[Any]],
) -> tuple[Metrics, list[Found]]:
    """Metrics over all ranks' images, the same on every rank and on any number of them.

    Args:
        all_gather: gives every rank's item on every rank.

    Returns:
        the metrics, and what was found in each image, by image.
    """
    own = detect_all(predict, batches, finder)
    found = sorted((pair for part in all_gather(own) for pair in part), key=lambda pair: pair[0].image_id)
    ground_truths, detections = [pair[0] for pair in found], [pair[1] for pair in found]
    return evaluate(ground_truths, detections, class_names), found
