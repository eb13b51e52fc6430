"""Validation: every rank predicts its share, and all compute the same metrics from all of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from dsyolo.base.batch import Detections, EvalBatch, GroundTruth
from dsyolo.detection.boxes import unletterbox
from dsyolo.detection.loss import DetectionLoss
from dsyolo.detection.metrics import Metrics, evaluate
from dsyolo.detection.postprocess import PostProcessor
from dsyolo.detection.validation_loss import BatchLoss, PredictBatch, total

ImageResult = tuple[GroundTruth, Detections]


def detect_all(
    predict: PredictBatch, batches: Iterable[EvalBatch], post_process: PostProcessor
) -> tuple[list[ImageResult], list[BatchLoss]]:
    """Return the detections in every image of `batches`, in pixels of the original images, and the losses of `predict`."""
    results: list[ImageResult] = []
    losses: list[BatchLoss] = []
    for batch in batches:
        prediction = predict(batch)
        losses += prediction.losses
        for labels, one in zip(batch.ground_truths, prediction.decoded, strict=False):  # a filler has none
            inside = post_process(one)
            boxes = unletterbox(inside.boxes_xyxy, labels.scale, labels.pad_xy, labels.size_hw)
            results.append((labels, inside._replace(boxes_xyxy=boxes)))
    return results, losses


def validate(
    predict: PredictBatch,
    batches: Iterable[EvalBatch],
    post_process: PostProcessor,
    class_names: Sequence[str],
    all_gather: Callable[[Any], list[Any]],
    loss: DetectionLoss | None = None,
) -> tuple[Metrics, list[ImageResult]]:
    """Return the metrics over all ranks' images, and the detections in each image, by image.

    They are the same on every rank, and for any number of ranks: `all_gather` returns every rank's item. With `loss` the
    metrics have the losses of the split too, where `predict` measures them.
    """
    gathered = all_gather(detect_all(predict, batches, post_process))
    results = sorted((pair for own, _ in gathered for pair in own), key=lambda pair: pair[0].image_id)
    ground_truths, detections = [one for one, _ in results], [one for _, one in results]
    metrics = evaluate(ground_truths, detections, class_names)
    losses = total(loss, [part for _, own in gathered for part in own]) if loss else None
    if losses:
        metrics = replace(metrics, val_box=losses.box, val_obj=losses.obj, val_cls=losses.cls)
    return metrics, results
