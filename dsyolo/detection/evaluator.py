"""Validation: every rank predicts its share, and all compute the same metrics from all of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsyolo.base.batch import Detections, EvalBatch, GroundTruth
from dsyolo.detection.boxes import unletterbox
from dsyolo.detection.metrics import Metrics, evaluate
from dsyolo.detection.postprocess import PostProcessor, Predict

ImageResult = tuple[GroundTruth, Detections]


def detect_all(
    predict: Predict, batches: Iterable[EvalBatch], post_process: PostProcessor
) -> list[ImageResult]:
    """Return the detections in every image of `batches`, in pixels of the original images."""
    results = []
    for batch in batches:
        decoded = predict(batch.images)
        for labels, one in zip(batch.ground_truths, decoded, strict=False):  # a filler batch has none
            inside = post_process(one)
            boxes = unletterbox(inside.boxes_xyxy, labels.scale, labels.pad_xy, labels.size_hw)
            results.append((labels, inside._replace(boxes_xyxy=boxes)))
    return results


def validate(
    predict: Predict,
    batches: Iterable[EvalBatch],
    post_process: PostProcessor,
    class_names: Sequence[str],
    all_gather: Callable[[Any], list[Any]],
) -> tuple[Metrics, list[ImageResult]]:
    """Return the metrics over all ranks' images, and the detections in each image, by image.

    They are the same on every rank, and for any number of ranks: `all_gather` returns every rank's item.
    """
    own = detect_all(predict, batches, post_process)
    results = sorted((pair for part in all_gather(own) for pair in part), key=lambda pair: pair[0].image_id)
    ground_truths, detections = [one for one, _ in results], [one for _, one in results]
    return evaluate(ground_truths, detections, class_names), results
