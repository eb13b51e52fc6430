"""A data format of the user's own, examples/my_format.py: convert it, read it back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from runs import ROOT

from dsyolo import cli
from dsyolo.base.errors import UserError
from dsyolo.data.formats.data_format import BAD_OBJECT, NO_IMAGE
from dsyolo.data.formats.format_registry import FORMATS, convert
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.formats.yolo_writer import BAD_IMAGE, BAD_POLYGON, DEGENERATE, IN_TWO_SPLITS
from dsyolo.data.index_builder import build_index
from dsyolo.data.labels import read_labels

FORMAT = f"{ROOT / 'examples' / 'my_format.py'}:CsvBoxes"
HEAD = "split,image,class,x1,y1,x2,y2\n"
ROWS = "train,a.png,dog,10,20,60,60\ntrain,a.png,cat,0,0,100,80\nval,sub/b.png,cat,5,5,50,50\n"
OWN = """
from dsyolo.data.formats.data_format import DataFormat, Image, Object, SourceDataset

class Mine(DataFormat):
    def read(self, src):
        {body}

class Other:
    pass
"""


def folder(root: Path, rows: str) -> Path:
    for name in ("a.png", "sub/b.png"):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "images" / name), np.full((80, 100, 3), 90, np.uint8))
    (root / "boxes.csv").write_text(HEAD + rows)
    return root


def test_the_example_is_converted_on_the_command_line_and_read_for_training(tmp_path, capsys):
    src = folder(tmp_path / "src", ROWS)
    assert cli.main(["convert", FORMAT, str(src), str(tmp_path / "dst")]) == 0
    assert "2 classes; train 1 images, 2 objects; val 1 images, 1 objects" in capsys.readouterr().out
    data = read_data_yaml(tmp_path / "dst/data.yaml")
    assert data.names == ("cat", "dog")
    found, problems = read_labels(tmp_path / "dst/labels/train/a.txt", 2)
    assert not problems
    assert found.classes.tolist() == [1, 0]
    np.testing.assert_allclose(
        found.boxes_xyxy * [100, 80, 100, 80], [[10, 20, 60, 60], [0, 0, 100, 80]], atol=1e-3
    )
    for split in (data.train, data.val):
        index = build_index(split, 2, tmp_path / "cache", progress=False)
        assert (len(index), index.problems) == (1, ())
    assert (tmp_path / "dst/images/val/sub/b.png").samefile(src / "images/sub/b.png")


def test_what_is_wrong_is_left_out_with_its_place(tmp_path):
    rows = (
        "train,a.png,cat,1,1,1,9\ntrain,a.png,cat,nan,1,2,9\ntrain,a.png,cat,x,1,2,9\n"
        "train,gone.png,cat,1,1,9,9\ntrain,../boxes.csv,cat,1,1,9,9\n"
    )
    src = folder(tmp_path / "src", ROWS + rows)
    result = convert(FORMAT, src, tmp_path / "dst")
    table = f"{src}/boxes.csv"
    assert {(problem.place, problem.reason) for problem in result.problems} == {
        (f"{table}:5", DEGENERATE),
        (f"{table}:6", BAD_OBJECT),
        (f"{table}:7", BAD_OBJECT),
        (f"{src}/images/gone.png", BAD_IMAGE),
        (f"{src}/images/../boxes.csv", NO_IMAGE),
    }
    assert result.num_objects == {"train": 2, "val": 1}


def test_polygons_that_are_none_are_left_out_and_reported(tmp_path):
    body = (
        "boxes = [Object('cat', (0, 0, 9, 9), p) for p in ([[1, 1]], [[1, 1], [9, 1], [float('nan'), 9]], [[1, 1], [9, 1], [9, 9]])]; "
        "return SourceDataset({s: [Image(src / 'images/a.png', 'a.png', boxes)] for s in ('train', 'val')}, ['cat'])"
    )
    (tmp_path / "mine.py").write_text(OWN.format(body=body), encoding="utf-8")
    result = convert(f"{tmp_path}/mine.py:Mine", folder(tmp_path / "src", ROWS), tmp_path / "dst")
    assert [problem.reason for problem in result.problems] == [IN_TWO_SPLITS, *[BAD_POLYGON] * 4]
    assert result.num_objects == {"train": 1, "val": 1}
    assert "nan" not in (tmp_path / "dst/labels/train/a.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {}['train']", r"it raised KeyError: 'train' \(mine.py, line 6\)"),
        ("return [src]", r"read\(\) returned a list"),
        (
            "one = Image(src, 'a.png', [Object('elk', (0, 0, 9, 9))]); return SourceDataset({'train': [one]}, ['cat'])",
            "its names lack the classes elk",
        ),
        (
            "return SourceDataset({'train': [], 'val': []}, ['cat', 'cat'])",
            r"its names are \['cat', 'cat'\]. Give at least one, each once",
        ),
        ("return SourceDataset({'train': [], 'val': []}, [])", r"its names are \[\]"),
        (
            "return SourceDataset({'train': [], 'dev': []}, ['cat'])",
            "it has a split dev. Name them train, val, test",
        ),
        ("return SourceDataset({'train': [{}]}, ['cat'])", "train holds {}. Give Image"),
        (
            "return SourceDataset({'train': [Image('a.png', 'a.png', [])]}, ['cat'])",
            "with a pathlib.Path as file",
        ),
        (
            "one = Image(src, 'a.png', [Object('cat', (0, 0, 9))]); return SourceDataset({'train': [one]}, ['cat'])",
            "a.png has the object .* with four numbers",
        ),
        (
            "one = Image(src, 'a.png', [Object('cat', ('0', 0, 9, 9))]); return SourceDataset({'train': [one]}, ['cat'])",
            "a.png has the object .* with four numbers",
        ),
        (
            "one = Image(src, 'a.png', [Object('cat', (0, 0, 9, 9), [1, 2])]); return SourceDataset({'train': [one]}, ['cat'])",
            r"a.png has the polygon .* Give an array \(P, 2\)",
        ),
        ("return SourceDataset({'train': (1 / 0 for _ in 'x')}, ['cat'])", "it raised ZeroDivisionError"),
        ("raise SystemExit(0)", "it raised SystemExit: 0"),
        ("return super().read(src)", r"it raised NotImplementedError: the class has no read\(\) of its own"),
        ("return SourceDataset({'train': []}, ['cat'])", r"train: no image can be used.\n  val: no image"),
    ],
)
def test_a_format_that_breaks_the_contract_is_refused_and_leaves_nothing(body, message, tmp_path):
    (tmp_path / "mine.py").write_text(OWN.format(body=body), encoding="utf-8")
    (tmp_path / "src").mkdir()
    with pytest.raises(UserError, match=message):
        convert(f"{tmp_path}/mine.py:Mine", tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cocoo", "Write coco or voc, or FILE.py:CLASS for your own"),
        ("nowhere.py:Mine", "FORMAT: nowhere.py:Mine given, but nowhere.py cannot be imported"),
        ("mine.py:Yours", "mine.py has no Yours. It has: DataFormat"),
        ("mine.py:Other", r"it is not a subclass of dsyolo\.data\.formats\.data_format\.DataFormat"),
    ],
)
def test_a_format_that_does_not_exist_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN.format(body="return None"))
    with pytest.raises(UserError, match=message):
        convert(name, tmp_path, tmp_path / "dst")
    assert set(FORMATS) == {"coco", "voc"}


@pytest.mark.parametrize("name", ["images/a.png", "x/images/train/a.png"])
def test_labels_lie_where_they_are_read_from_whatever_the_images_name(tmp_path, name):
    body = (
        "one = Image(src / 'images/a.png', %r, [Object('cat', (0, 0, 9, 9))]); "
        "return SourceDataset({'train': [one], 'val': [one]}, ['cat'])"
    )
    (tmp_path / "mine.py").write_text(OWN.format(body=body % name), encoding="utf-8")
    result = convert(f"{tmp_path}/mine.py:Mine", folder(tmp_path / "src", ROWS), tmp_path / "dst")
    assert result.num_objects == {"train": 1, "val": 1}
    data = read_data_yaml(tmp_path / "dst/data.yaml")
    index = build_index(data.train, data.num_classes, tmp_path / "cache", progress=False)
    assert [len(index.labels(i).classes) for i in range(len(index))] == [1]
