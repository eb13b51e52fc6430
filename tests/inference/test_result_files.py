"""Files that `dsyolo detect` writes beside the pictures, by hand and as its readers read it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsyolo.base.batch import Detections
from dsyolo.base.errors import UserError
from dsyolo.data.labels import read_labels
from dsyolo.inference.result_files import ResultFiles

NAMES = ("cat", "big dog/../x")
IMAGE = np.arange(40 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 80, 3)
FOUND = Detections(
    np.array([[8, 4, 24, 20], [40, 10, 80, 40]], np.float32),
    np.array([0.9, 0.5], np.float32),
    np.array([1, 0]),
)
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def written(folder: Path, **asked: bool) -> list[Path]:
    files = ResultFiles(folder, NAMES, **asked)
    files.add(Path("photos/0007.png"), folder / "0007.png", IMAGE, FOUND)
    files.add(Path("photos/empty.jpg"), folder / "empty.jpg", IMAGE, NOTHING)
    return files.close()


def test_labels_by_hand_and_as_a_training_reads_them(tmp_path):
    assert written(tmp_path, txt=True, conf=True) == [tmp_path / "labels"]
    rows = (tmp_path / "labels/0007.txt").read_text(encoding="utf-8").splitlines()
    assert rows == [
        "1 0.200000 0.300000 0.200000 0.400000 0.900000",
        "0 0.750000 0.625000 0.500000 0.750000 0.500000",
    ]
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["0007.txt"]
    written(tmp_path / "plain", txt=True)
    labels, problems = read_labels(tmp_path / "plain/labels/0007.txt", 2)
    assert not problems
    assert np.allclose(
        np.sort(labels.boxes_xyxy, 0), np.sort(FOUND.boxes_xyxy / [80, 40, 80, 40], 0), atol=1e-6
    )


def test_results_and_the_table_by_hand(tmp_path):
    assert written(tmp_path, json=True, csv=True) == [
        tmp_path / "predictions.json",
        tmp_path / "predictions.csv",
    ]
    first, second = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert first == {
        "image_id": 7, "file_name": "0007.png", "category_id": 1, "bbox": [8.0, 4.0, 16.0, 16.0], "score": 0.9
    }  # fmt: skip
    assert second["bbox"] == [40.0, 10.0, 40.0, 30.0]
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["big dog/../x", "cat"]
    assert [float(rows[0][key]) for key in ("x1", "y1", "x2", "y2", "score")] == [8, 4, 24, 20, 0.9]


def test_crops_stay_in_the_folder_whatever_a_class_is_called(tmp_path):
    assert written(tmp_path, crop=True) == [tmp_path / "crops"]
    files = sorted(path.relative_to(tmp_path / "crops").as_posix() for path in tmp_path.rglob("*.jpg"))
    assert files == ["big_dog_.._x/0007_0.jpg", "cat/0007_1.jpg"]
    assert cv2.imread(str(tmp_path / "crops/cat/0007_1.jpg")).shape == (30, 40, 3)


def test_nothing_is_written_that_was_not_asked_for(tmp_path):
    assert written(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_data_set_are_not_overwritten(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0007.txt").write_text("mine", encoding="utf-8")
    files = ResultFiles(tmp_path, NAMES, txt=True)
    with pytest.raises(UserError, match=r"--save_txt: 1 label files exist there \(.*0007\.txt"):
        files.refuse_existing([tmp_path / "0007.png", tmp_path / "b.png"])
    ResultFiles(tmp_path, NAMES, json=True).refuse_existing([tmp_path / "0007.png"])
