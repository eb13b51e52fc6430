"""The thread that draws: nobody waits for it, the latest wins, nothing is lost at the end, and no failure matters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
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


def record_of(folder: Path) -> RunArtifacts:
    return RunArtifacts(
        folder,
        config={},
        deepspeed_json={},
        info=WeightsInfo(variant="yolov5n", names=("thing",), image_size_px=64, anchors_px=()),
        load_rgb=lambda index: np.full((64, 64, 3), 200, np.uint8),
        draw=lambda name, work: None,
        picture=lambda path: None,
    )


def test_the_end_is_reported_with_the_best_epoch_after_a_resume_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "dsyolo")
    boxes = np.array([[10, 10, 50, 50]], np.float32)
    ground_truth = GroundTruth(0, (64, 64), boxes, np.array([0]), 1.0, (0.0, 0.0))
    nothing = Detections(boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int64))
    right = Detections(boxes, np.array([0.9], np.float32), np.array([0]))
    best, worse = (evaluate([ground_truth], [one], ["thing"]) for one in (right, nothing))
    record = record_of(tmp_path)
    record.validated(best, [], True, 4)
    resumed = record_of(tmp_path)
    resumed.load_state_dict(json.loads(json.dumps({**record.state_dict(), "other": 1})))
    resumed.validated(worse, [], False, 5)  # of the last weights, and not those that are reported
    (tmp_path / "weights/best.safetensors").touch()
    resumed.report(6, 3723.0)
    (text,) = caplog.messages
    assert text.startswith("6 epochs in 1:02:03; the best was epoch 5: mAP50 1.0000, mAP50-95 1.0000\n")
    assert "validation of the best weights (weights/best.safetensors, of epoch 5):\nClass " in text
    assert "P and R: at confidence 0.900, where the mean F1 of the classes is best" in text
    assert f"best weights  {tmp_path}/weights/best.safetensors" in text
    assert "last.safetensors" not in text  # there is none
    resumed.load_state_dict({"best_report": "of a stranger"})
    assert resumed.state_dict() == resumed.state_dict() != {}


def test_metrics_name_the_confidence_of_p_and_r_and_the_losses():
    boxes = np.array([[10, 10, 50, 50]], np.float32)
    ground_truth = GroundTruth(0, (64, 64), boxes, np.array([0]), 1.0, (0.0, 0.0))
    nothing = Detections(boxes[:0], np.zeros(0, np.float32), np.zeros(0, np.int64))
    metrics = evaluate([ground_truth], [nothing], ["thing"])
    assert metrics.notes() == ["P and R: nothing was found that is right, at any confidence"]
    measured = replace(metrics, val_box=0.1, val_obj=0.02, val_cls=0.3)
    assert measured.notes()[1] == "loss of the split: box 0.1000, obj 0.0200, cls 0.3000"
