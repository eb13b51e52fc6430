"""The confusion matrix of a detector: which class was found where which one is."""

from collections.abc import Iterable

import numpy as np

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.boxes import pairwise_iou

SCORE, IOU = 0.25, 0.45  # YOLOv5's


def confusion_matrix(
    results: Iterable[tuple[GroundTruth, Detections]],
    num_classes: int,
    score: float = SCORE,
    iou: float = IOU,
) -> np.ndarray:
    """Count detections by their class and by that of the label they are on, whatever its class.

    Each detection above `score` goes with at most one label, and each label with one detection: pairs above `iou`, the
    greatest overlap first. Of equal overlaps the better detection comes first, then the earlier label.

    Returns:
        (K + 1, K + 1) int64: rows are what was found, columns what is there. The last column has detections on no
        label (false), the last row labels without a detection (missed).
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for ground_truth, found in results:
        order = np.argsort(-found.scores, kind="stable")
        order = order[found.scores[order] > score]
        boxes, classes = found.boxes_xyxy[order], found.classes[order]
        overlaps = pairwise_iou(boxes, ground_truth.boxes_xyxy)  # (D, G)
        rows, columns = np.nonzero(overlaps > iou)
        is_free, is_missed = np.ones(len(boxes), bool), np.ones(len(ground_truth.classes), bool)
        for pair in np.argsort(-overlaps[rows, columns], kind="stable").tolist():
            row, column = rows[pair], columns[pair]
            if is_free[row] and is_missed[column]:
                is_free[row] = is_missed[column] = False
                counts[classes[row], ground_truth.classes[column]] += 1
        counts[:-1, -1] += np.bincount(classes[is_free], minlength=num_classes)
        counts[-1, :-1] += np.bincount(ground_truth.classes[is_missed], minlength=num_classes)
    return counts
