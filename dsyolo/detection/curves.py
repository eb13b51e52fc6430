"""Precision, recall and F1 of each class over the confidence at which detections are taken, and over recall."""

from typing import NamedTuple

import numpy as np

from dsyolo.detection.metrics import Comparison

NUM_POINTS = 501  # confidences from 0 to 1


class Curves(NamedTuple):
    """Curves at IoU 0.5 of the K' classes that have labels. C confidences, R = 101 recalls."""

    classes: np.ndarray  # (K',) int64
    confidences: np.ndarray  # (C,)
    precision: np.ndarray  # (K', C); 1 where nothing is found
    recall: np.ndarray  # (K', C)
    f1: np.ndarray  # (K', C)
    recalls: np.ndarray  # (R,)
    precision_at_recall: np.ndarray  # (K', R), COCO's: the best precision at this recall or a higher one


def curves(one: Comparison) -> Curves:
    """Return the curves. A detection counts where its score is at least the confidence."""
    classes = np.flatnonzero(one.num_labels)
    confidences = np.linspace(0, 1, NUM_POINTS)
    precision, recall = np.ones((2, len(classes), NUM_POINTS))
    for row, klass in enumerate(classes.tolist()):
        of_class = one.classes == klass
        scores, right = one.scores[of_class], one.is_true_positive[of_class]
        order = np.argsort(scores, kind="stable")
        below = np.searchsorted(scores[order], confidences, side="left")  # detections that are left out
        num_found = len(scores) - below
        num_right = right.sum() - np.concatenate([[0], np.cumsum(right[order])])[below]
        precision[row] = np.where(num_found > 0, num_right / np.maximum(num_found, 1), 1.0)
        recall[row] = num_right / one.num_labels[klass]
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    at_recall = one.precision_curves[0].T[classes]  # (K', R)
    return Curves(
        classes, confidences, precision, recall, f1, np.linspace(0, 1, at_recall.shape[1]), at_recall
    )
