"""Labels that no anchor can match are those that the assignment leaves without a target."""

from __future__ import annotations

import numpy as np
import pytest

from dsyolo.detection.anchor_fit import fit_anchors
from dsyolo.detection.assigner import Assigner
from dsyolo.models.yolov5 import anchors_px, level_strides

ANCHORS = anchors_px("yolov5n").numpy()  # from 10 x 13 to 373 x 326


def test_it_counts_what_the_assignment_leaves_out():
    rng = np.random.default_rng(0)
    wh = rng.uniform(1, 640, (300, 2)) * rng.choice([0.01, 0.1, 1], (300, 1))
    assign = Assigner(ANCHORS, level_strides("yolov5n"), 4.0)
    unmatched = 0
    for one in wh:
        box = np.array([[320, 320, *one]], np.float32)
        targets = assign(np.zeros(1, np.int64), np.zeros(1, np.int64), box, 1, (640, 640))
        unmatched += not targets.num_matches.any()
    fit = fit_anchors(ANCHORS, wh / 640, np.full((300, 2), 640), 640, 4.0)
    assert 0 < unmatched < 300
    assert len(fit.unmatched_wh) == unmatched
    assert fit.best_possible_recall == pytest.approx(1 - unmatched / 300)


def test_sizes_are_those_at_the_size_of_training():
    """A box of 20 x 20 in an image of 1280 x 640 is 10 x 10 at 640, and 1 x 1 at 64."""
    share, image_wh = np.array([[20 / 1280, 20 / 640]]), np.array([[1280, 640]])
    fit = fit_anchors(ANCHORS, share, image_wh, 640, 4.0)
    assert fit.best_possible_recall == 1
    assert fit.summary() == "anchors: all 1 labels match one at 640 px, best possible recall 1.0000"
    fit = fit_anchors(ANCHORS, share, image_wh, 64, 4.0)
    np.testing.assert_allclose(fit.unmatched_wh, [[1, 1]])
    assert fit.needs_warning
    assert "1 of 1 labels (100.00%) match none at 64 px" in fit.summary()
    assert "best possible recall 0.0000. They are from 1.0 x 1.0 to 1.0 x 1.0 px" in fit.summary()


def test_a_recall_is_never_rounded_up_to_1():
    wh = np.full((50_000, 2), 0.1)
    wh[0] = 0.0001
    fit = fit_anchors(ANCHORS, wh, np.full((50_000, 2), 640), 640, 4.0)
    assert "1 of 50,000 labels" in fit.summary()
    assert "0.9999" in fit.summary()
    assert not fit.needs_warning


def test_without_labels_nothing_is_unmatched():
    fit = fit_anchors(ANCHORS, np.zeros((0, 2)), np.zeros((0, 2)), 640, 4.0)
    assert fit.best_possible_recall == 1
