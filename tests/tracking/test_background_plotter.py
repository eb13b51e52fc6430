"""The thread that draws: nobody waits for it, the latest wins, nothing is lost at the end, and no failure matters."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.metrics import evaluate
from dsyolo.models.weights import WeightsInfo
from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.tracking.background_plotter import BackgroundPlotter


def test_nobody_waits_and_of_each_picture_the_latest_is_drawn():
    plotter, may_go_on, begun, drawn = BackgroundPlotter(), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        assert may_go_on.wait(30)
        drawn.append("slow")

    plotter.draw("a", slow)
    assert begun.wait(30)  # and yet this thread goes on
    for number in range(3):
        plotter.draw("a", lambda number=number: drawn.append(f"a{number}"))
        plotter.draw("b", lambda number=number: drawn.append(f"b{number}"))
    assert drawn == []
    may_go_on.set()
    plotter.close()
    assert drawn == ["slow", "a2", "b2"]
    plotter.close()
    plotter.draw("a", lambda: drawn.append("late"))
    assert drawn[-1] == "late"


def test_a_failure_is_a_warning_and_the_next_picture_is_drawn():
    plotter, drawn = BackgroundPlotter(), []

    def fail() -> None:
        plotter.draw("a", lambda: drawn.append(1 / 0))
        plotter.wait()

    with pytest.warns(UserWarning, match=r"a was not drawn. ZeroDivisionError: division"):
        fail()
    plotter.draw("b", lambda: drawn.append("b"))
    plotter.close()
    assert drawn == ["b"]


def test_a_plotter_without_work_has_no_thread():
    before = threading.active_count()
    plotter = BackgroundPlotter()
    assert threading.active_count() == before
    plotter.wait()
    plotter.close()


def test_a_program_that_breaks_does_not_wait_for_pictures():
    program = (
        "import threading\nfrom dsyolo.tracking.background_plotter import BackgroundPlotter\n"
        "BackgroundPlotter().draw('a', threading.Event().wait)\nraise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30, env=os.environ).returncode == 3


def test_predictions_are_drawn_as_they_were_when_they_were_given(tmp_path: Path):
    boxes = np.array([[10, 10, 50, 50]], np.float32)
    ground_truth = GroundTruth(0, (64, 64), boxes, np.array([0]), 1.0, (0.0, 0.0))
    found = [(ground_truth, Detections(boxes, np.array([0.9], np.float32), np.array([0])))]
    plotter, told = BackgroundPlotter(), []
    record = RunArtifacts(
        tmp_path,
        config={},
        deepspeed_json={},
        info=WeightsInfo(variant="yolov5n", names=("thing",), image_size_px=64, anchors_px=()),
        load_rgb=lambda index: np.full((64, 64, 3), 200, np.uint8),
        draw=plotter.draw,
        picture=told.append,
    )
    metrics = evaluate(*zip(*found, strict=True), ["thing"])
    record.validated(metrics, found, is_best=True)
    found.clear()  # the validation's own, and gone when it is drawn
    plotter.close()
    assert told == [tmp_path / "predictions.jpg"]
    assert cv2.imread(str(told[0])).std() > 5
