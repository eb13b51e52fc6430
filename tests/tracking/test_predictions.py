"""The picture of a validation: labels beside detections, and what is false and missed kept apart."""

from __future__ import annotations

import numpy as np
import pytest

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.boxes import pairwise_iou
from dsyolo.tracking.predictions import CELL_PX, FALSE, MISSED, RIGHT, draw_pair, draw_sheet, matches

NAMES = ("cat", "dog")


def truth_of(*labels: tuple[tuple[float, ...], int], size_hw: tuple[int, int] = (400, 400)) -> GroundTruth:
    boxes = np.array([box for box, _ in labels], np.float32).reshape(-1, 4)
    return GroundTruth(0, size_hw, boxes, np.array([k for _, k in labels], np.int64), 1.0, (0.0, 0.0))


def found(*boxes: tuple[tuple[float, ...], int, float]) -> Detections:
    return Detections(
        np.array([box for box, _, _ in boxes], np.float32).reshape(-1, 4),
        np.array([score for _, _, score in boxes], np.float32),
        np.array([klass for _, klass, _ in boxes], np.int64),
    )


def shades(picture: np.ndarray) -> set[str]:
    """The names of the colours that are in a picture."""
    by_name = {"right": RIGHT, "false": FALSE, "missed": MISSED}
    return {name for name, rgb in by_name.items() if (picture == rgb).all(-1).any()}


def test_overlap_of_all_pairs_by_hand():
    a = np.array([[0, 0, 10, 10], [20, 20, 20, 20]], np.float32)
    b = np.array([[5, 0, 15, 10], [0, 0, 10, 10], [50, 50, 60, 60]], np.float32)
    assert pairwise_iou(a, b).tolist() == [[pytest.approx(1 / 3), 1, 0], [0, 0, 0]]
    assert pairwise_iou(a[:0], b).shape == (0, 3)


def test_each_label_is_found_once_by_the_best_box_of_its_class():
    a, b, c = (0, 0, 100, 100), (200, 200, 300, 300), (0, 200, 100, 300)
    truth = truth_of((a, 0), (b, 1), (c, 0))
    others = found(
        ((5, 5, 100, 100), 0, 0.6),  # a second time
        ((0, 0, 100, 100), 0, 0.9),
        (b, 0, 0.8),  # of another class
        ((0, 270, 100, 370), 0, 0.7),  # IoU 0.18
    )
    was_found, is_right = matches(truth, others)
    assert was_found.tolist() == [True, False, False]
    assert is_right.tolist() == [False, True, False, False]
    for truth_, detections in ((truth_of(), others), (truth, found()), (truth_of(), found())):
        was_found, is_right = matches(truth_, detections)
        assert not was_found.any()
        assert not is_right.any()
        assert (len(was_found), len(is_right)) == (len(truth_.classes), len(detections.classes))


@pytest.mark.parametrize("size", [50, 400, 3000])
def test_labels_are_left_and_detections_right_at_any_size(size):
    k = size / 400
    a, b, c = ((box * k) for box in np.array([[40, 60, 140, 160], [240, 240, 340, 340], [40, 240, 140, 340]]))
    image = np.full((size, size, 3), 200, np.uint8)
    pair = draw_pair(image, truth_of((a, 0), (b, 1)), found((a, 0, 0.9), (c, 1, 0.8)), NAMES)
    assert pair.shape == (CELL_PX, 2 * CELL_PX + 2, 3)
    left, right = pair[:, :CELL_PX], pair[:, CELL_PX + 2 :]
    assert shades(left) == {"right", "missed"}
    assert shades(right) == {"right", "false"}
    for half, box, rgb in ((left, a, RIGHT), (right, a, RIGHT), (right, c, FALSE)):
        x1, y1, x2, y2 = (np.array(box) / k).astype(int)
        assert tuple(half[(y1 + y2) // 2, x1]) == rgb
        plate = (half[y1 - 25 : y1 - 2, x1:x2] == rgb).all(-1)
        assert plate.any(1).sum() >= 14  # a name above it, whatever the image's size
    assert (image == 200).all()


def test_a_sheet_has_a_legend_of_all_colours():
    blank = np.full((400, 400, 3), 200, np.uint8)
    pairs = [draw_pair(blank, truth_of(), found(), NAMES)] * 3
    sheet = draw_sheet(pairs, 0.25)
    assert shades(sheet[:40]) == {"right", "false", "missed"}
    assert shades(sheet[40:]) == set()
    assert sheet.shape[0] > 40 + 2 * CELL_PX
