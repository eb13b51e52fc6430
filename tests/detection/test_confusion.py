"""The confusion matrix against a direct count."""

from __future__ import annotations

import numpy as np
import pytest

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.confusion import confusion_matrix


def truth(boxes: list, classes: list[int]) -> GroundTruth:
    return GroundTruth(
        0, (100, 100), np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int64), 1.0, (0, 0)
    )


def found(boxes: list, classes: list[int], scores: list[float]) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(classes, np.int64)
    )


def area(a) -> float:
    return max(a[2] - a[0], 0.0) * max(a[3] - a[1], 0.0)


def direct(results, num_classes: int, score: float, iou: float) -> list[list[int]]:
    """Pairs one by one, as written down: no arrays."""
    counts = [[0] * (num_classes + 1) for _ in range(num_classes + 1)]
    for label, one in results:
        kept = sorted(
            (i for i in range(len(one.scores)) if one.scores[i] > score), key=lambda i: -one.scores[i]
        )
        pairs = []
        for place, i in enumerate(kept):
            for g in range(len(label.classes)):
                a, b = one.boxes_xyxy[i].astype(float), label.boxes_xyxy[g].astype(float)
                inner = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
                value = inner / (area(a) + area(b) - inner)
                if value > iou:
                    pairs.append((-value, place, g, i))
        used, taken = set(), set()
        for _, _, g, i in sorted(pairs):
            if i not in used and g not in taken:
                used.add(i)
                taken.add(g)
                counts[one.classes[i]][label.classes[g]] += 1
        for i in kept:
            counts[one.classes[i]][num_classes] += i not in used
        for g in range(len(label.classes)):
            counts[num_classes][label.classes[g]] += g not in taken
    return counts


def test_by_hand():
    labels = truth([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]], [0, 1, 0])
    boxes = found(
        [[0, 0, 10, 10], [0, 0, 9, 10], [20, 20, 30, 29], [80, 80, 90, 90], [50, 50, 60, 60]],
        [0, 0, 0, 1, 0],
        [0.9, 0.95, 0.8, 0.7, 0.2],
    )
    assert confusion_matrix([(labels, boxes)], 2).tolist() == [
        [1, 1, 1],  # right; on a label of class 1; twice on one label
        [0, 0, 1],  # on nothing
        [1, 0, 0],  # missed: its detection is below the score
    ]


@pytest.mark.parametrize("seed", range(20))
def test_against_a_direct_count(seed):
    draw = np.random.default_rng(seed)
    results = []
    for _ in range(6):
        sizes = draw.integers(0, 9, 2)
        corners = [draw.integers(0, 40, (n, 2)) for n in sizes]
        boxes = [np.concatenate([c, c + draw.integers(4, 30, c.shape)], 1) for c in corners]
        classes = [draw.integers(0, 3, n) for n in sizes]
        scores = draw.permutation(100)[: sizes[1]] / 100
        results.append(
            (
                truth(boxes[0].tolist(), classes[0].tolist()),
                found(boxes[1].tolist(), classes[1].tolist(), scores.tolist()),
            )
        )
    for score, iou in ((0.25, 0.45), (0.0, 0.2)):
        assert confusion_matrix(results, 3, score, iou).tolist() == direct(results, 3, score, iou)


def test_nothing_at_all():
    assert confusion_matrix([], 2).tolist() == [[0] * 3] * 3
    assert confusion_matrix([(truth([], []), found([], [], []))], 1).sum() == 0
