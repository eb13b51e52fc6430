"""Curves against a direct count at every confidence."""

from __future__ import annotations

import numpy as np
import pytest

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.curves import NUM_POINTS, curves
from dsyolo.detection.metrics import Comparison, compare


@pytest.mark.parametrize("seed", range(5))
def test_against_a_direct_count(seed):
    draw = np.random.default_rng(seed)
    scores, classes = draw.integers(0, 11, 60) / 10, draw.choice([0, 2], 60)
    right, num_labels = draw.random(60) < 0.6, np.array([50, 0, 70])
    found = curves(Comparison(scores, classes, right, np.zeros((10, 101, 3)), num_labels, num_labels))
    assert found.classes.tolist() == [0, 2]
    for row, klass in enumerate((0, 2)):
        for point in range(0, NUM_POINTS, 10):
            kept = [i for i in range(60) if classes[i] == klass and scores[i] >= found.confidences[point]]
            correct = sum(bool(right[i]) for i in kept)
            precision, recall = correct / len(kept) if kept else 1, correct / num_labels[klass]
            assert found.precision[row, point] == pytest.approx(precision)
            assert found.recall[row, point] == pytest.approx(recall)
            f1 = 2 * precision * recall / (precision + recall) if correct else 0
            assert found.f1[row, point] == pytest.approx(f1)


def test_a_perfect_detector():
    box = np.array([[10, 10, 30, 30]], np.float32)
    truth = GroundTruth(0, (64, 64), box, np.array([1]), 1.0, (0, 0))
    found = curves(
        compare([truth], [Detections(box, np.array([0.8], np.float32), np.array([1]))], ("a", "b"))
    )
    assert found.classes.tolist() == [1]
    assert found.precision_at_recall.tolist() == [[1.0] * 101]
    taken = found.confidences <= np.float32(0.8)
    assert found.recall[0].tolist() == taken.astype(float).tolist()
    assert found.precision[0].min() == 1
