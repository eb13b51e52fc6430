"""data.yaml, lists of images, and the report on every kind of bad label row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsyolo.base.errors import UserError
from dsyolo.data import labels
from dsyolo.data.formats.yolo import label_path, list_images, read_data_yaml
from dsyolo.data.labels import read_labels


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---- data.yaml


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}"])
def test_names_as_list_or_map(tmp_path, names):
    folders(tmp_path, "images/train", "images/val")
    spec = read_data_yaml(
        write(tmp_path / "d.yaml", f"train: images/train\nval: images/val\nnc: 2\nnames: {names}")
    )
    assert spec.names == ("cat", "dog")
    assert spec.num_classes == 2
    assert spec.train == (tmp_path / "images/train",)
    assert spec.test is None


def test_path_is_relative_to_the_file_then_to_the_working_directory(tmp_path, monkeypatch):
    folders(tmp_path, "here/set/a", "here/set/b", "cwd/other/a", "cwd/other/b")
    monkeypatch.chdir(tmp_path / "cwd")
    text = "path: {}\ntrain: [a, b]\nval: b\nnames: [x]\n"
    beside = read_data_yaml(write(tmp_path / "here/1.yaml", text.format("set")))
    assert beside.train == (tmp_path / "here/set/a", tmp_path / "here/set/b")
    fallback = read_data_yaml(write(tmp_path / "here/2.yaml", text.format("other")))
    assert fallback.val is not None
    assert fallback.val[0].resolve() == tmp_path / "cwd/other/b"


def test_exported_sets_with_dotdot_mean_the_folder_beside_the_file(tmp_path):
    folders(tmp_path, "set/train/images", "set/valid/images")
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: ['x']"
    spec = read_data_yaml(write(tmp_path / "set/data.yaml", text))
    assert spec.train is not None
    assert spec.train[0].resolve() == tmp_path / "set/train/images"
    assert spec.test is None  # named, not there, not required


@pytest.mark.parametrize("form", ["[{}]", "{{0: {}}}", "\n- {}"])
@pytest.mark.parametrize(
    "name", ["012", "1:30", "12:30:45", "0x10", "1_000", "1.50", ".5", "2020-01-01", "1e3", "80"]
)
def test_names_that_yaml_reads_as_numbers_stay_as_they_are_written(tmp_path, form, name):
    folders(tmp_path, "a")
    text = f"train: a\nval: a\nnc: 01\nnames: {form.format(name)}\n"
    assert read_data_yaml(write(tmp_path / "d.yaml", text)).names == (name,)


def test_download_is_never_run(tmp_path):
    folders(tmp_path, "a")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    text = f"train: a\nval: a\nnames: [x]\ndownload: |\n  {code}\n"
    read_data_yaml(write(tmp_path / "d.yaml", text))
    assert not (tmp_path / "ran").exists()


def test_all_problems_at_once(tmp_path):
    folders(tmp_path, "images/train")
    text = "train: images/trian\nvalid: images/train\nnames: {0: a, 2: c}\nnc: many\n"
    with pytest.raises(UserError) as caught:
        read_data_yaml(write(tmp_path / "d.yaml", text))
    problems = "\n".join(caught.value.problems)
    assert "d.yaml" in caught.value.headline
    assert len(caught.value.problems) == 4
    assert "nc: 'many' given" in problems
    assert "names: must number its 2 classes 0 to 1, but 1 missing" in problems
    assert "val: missing. Did you mean it where you wrote `valid`?" in problems
    assert f"Did you mean {tmp_path / 'images' / 'train'}?" in problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- a\n- b\n", "a list"),
        ("train: [a\nval: b", "line 2: not YAML"),
        ("train: a\nval: a\nnames: []", "at least one class"),
        ("train: a\nval: a\nnames: {a: 0}", "whole numbers"),
        ("train: a\nval: a\nnc: 3\nnames: [x]", "nc: 3 given, but names has 1"),
        ("train: a\nval: a\nclass_names: [x]", "names: missing"),
        ("train: a\ntrain: b\nval: a\nnames: [x]", "line 2: train is given twice."),
        ("train: a\nval: a\nnames: {0: x, 0: y}", "line 3: 0 is given twice."),
        ("train: a\nval: a\nnames: [x, y, x, 1, '1']", "names: x, 1 given more than once."),
        ("train: a\nval:a\nnames: [x]", "Write a space behind `val:` in line 2."),
        ("train: a\n\tval: a\nnames: [x]", "Write spaces in the place of tabs."),
        (
            "train: https://h.org/a.zip\nval: a\nnames: [x]",
            "a.zip given, but nothing is downloaded. Give a folder",
        ),
        (
            "train: a\nval: a\nnames: {1: x, 2: y}",
            "Count from 0 without a gap, as the rows of the labels do.",
        ),
        ("path: /content/set\ntrain: a\nval: a\nnames: [x]", "Leave path out: then they are relative to"),
        ("train: a\nval: a\nnames: [yes, no]", "names: True and False given, but YAML reads yes, no,"),
        ("path: nowhere\ntrain: a\nval: a\nnames: [x]", "path: nowhere given"),
        ("train: a\nval: picture.jpg\nnames: [x]", "only folders and .txt lists"),
    ],
)
def test_bad_data_yaml(tmp_path, text, message):
    folders(tmp_path, "a")
    write(tmp_path / "picture.jpg", "")
    with pytest.raises(UserError, match="cannot be used as a data set") as caught:
        read_data_yaml(write(tmp_path / "d.yaml", text))
    assert message in str(caught.value)


def test_missing_data_yaml_names_a_likely_one(tmp_path):
    write(tmp_path / "coco.yaml", "")
    with pytest.raises(UserError, match="no such file") as caught:
        read_data_yaml(tmp_path / "cocoo.yaml")
    assert f"Did you mean {tmp_path / 'coco.yaml'}?" in str(caught.value)


# ---- images and labels


def test_folders_are_searched_recursively_and_in_order(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.jpeg", "notes.txt", "._a.jpeg", ".hidden/3.jpg"):
        write(tmp_path / name, "")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # must not go round for ever
    assert list_images([tmp_path]) == [tmp_path / "a.jpeg", tmp_path / "b/1.jpg", tmp_path / "b/2.PNG"]


def test_list_files(tmp_path, monkeypatch):
    write(tmp_path / "cwd/c.jpg", "")
    monkeypatch.chdir(tmp_path / "cwd")
    listing = write(tmp_path / "lists/train.txt", f"./a.jpg\n\nc.jpg\nb.jpg\n{tmp_path}/d.jpg\n")
    assert list_images([listing]) == [
        tmp_path / "lists/a.jpg",
        Path("c.jpg"),
        tmp_path / "lists/b.jpg",
        tmp_path / "d.jpg",
    ]


def test_images_can_be_named_one_by_one_beside_folders(tmp_path):
    for name in ("b.JPG", "folder/a.png"):
        write(tmp_path / name, "")
    named = [tmp_path / "b.JPG", tmp_path / "folder/a.png"]
    assert list_images([named[0], tmp_path / "folder"]) == named


def test_a_folder_of_labels_is_answered_with_its_images(tmp_path):
    folders(tmp_path, "set/train/images", "set/train/labels")
    with pytest.raises(UserError, match=r"no image in it .* Did you mean .*set/train/images\?"):
        list_images([tmp_path / "set/train/labels"])


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="no image in it"):
        list_images([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        list_images([tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/1.jpg", "/d/labels/train/1.txt"),
        ("/images/d/images/1.b.png", "/images/d/labels/1.b.txt"),
        ("/d/my_images/images.jpg", "/d/my_images/images.txt"),
        ("images/1.jpg", "labels/1.txt"),
    ],
)
def test_label_path(image, label):
    assert label_path(image) == Path(label)


# ---- label rows

GOOD = "1 0.5 0.5 0.2 0.4"
BAD_ROWS = [
    ("0 0.5 0.5 0.2", labels.WRONG_COLUMNS, "4 columns"),
    ("0 0.5 0.5 0.2 0.4 0.9", labels.WRONG_COLUMNS, "6 columns"),
    ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.3", labels.WRONG_COLUMNS, "8 columns"),
    ("0,0.5,0.5,0.2,0.4", labels.WRONG_COLUMNS, "1 columns"),
    ("cat 0.5 0.5 0.2 0.4", labels.CLASS_NAME, "cat"),
    ("0, 0.5, 0.5, 0.2, 0.4", labels.COMMAS, "0,"),
    ("0 0,5 0,5 0,2 0,4", labels.DECIMAL_COMMA, "0,5"),
    ("0 0.5 0.5 0.2 wide", labels.NOT_A_NUMBER, "wide"),
    ("0 0.5 nan 0.2 0.4", labels.NOT_FINITE, "nan"),
    ("0 0.5 0.5 inf 0.4", labels.NOT_FINITE, "inf"),
    ("nan 0.5 0.5 0.2 0.4", labels.NOT_FINITE, ""),
    ("0 0.1 0.1 0.2 nan 0.2 0.2", labels.NOT_FINITE, "nan"),
    ("0.5 0.5 0.5 0.2 0.4", labels.NOT_A_CLASS, "class 0.5"),
    ("2 0.5 0.5 0.2 0.4", labels.UNKNOWN_CLASS, "class 2, but data.yaml names 2 (0 to 1)"),
    ("-1 0.5 0.5 0.2 0.4", labels.NOT_A_CLASS, "class -1"),
    ("0 0.5 0.5 -0.2 0.4", labels.NO_SIZE, "-0.2"),
    ("0 0.5 0.5 0.2 0", labels.NO_SIZE, "0.2 0"),
    ("0 0.1 0.1 0.2 0.1 0.3 0.1", labels.NO_SIZE, ""),
    ("0 -0.3 0.5 0.2 0.4", labels.OUTSIDE, "-0.3"),
    ("0 1.005 0.5 0.001 0.4", labels.OUTSIDE, "1.005"),
    ("0 320 240 64 48", labels.OUTSIDE, "not pixels"),
    (GOOD, labels.DUPLICATE, "the same as line 1"),
]


@pytest.mark.parametrize(
    ("row", "reason", "detail"), BAD_ROWS, ids=[f"{r[1].split(' (')[0]}-{r[0]}" for r in BAD_ROWS]
)
def test_a_bad_row_is_reported_and_the_rest_kept(tmp_path, row, reason, detail):
    path = write(tmp_path / "1.txt", f"{GOOD}\n\n{row}\n0 0.25 0.25 0.1 0.1\n")
    found, problems = read_labels(path, 2)
    assert found.classes.tolist() == [1, 0]
    np.testing.assert_allclose(found.boxes_xyxy, [[0.4, 0.3, 0.6, 0.7], [0.2, 0.2, 0.3, 0.3]], atol=1e-6)
    (problem,) = problems
    assert (problem.file, problem.line, problem.reason) == (str(path), 3, reason)
    assert detail in problem.detail
    assert str(problem).startswith(f"{path}:3: {reason}")


def test_a_box_over_the_edge_is_clipped_and_reported_unless_it_is_rounding(tmp_path):
    path = write(tmp_path / "1.txt", "0 0.05 0.5 0.2 0.4\n1 1.005 0.5 0.2 0.4\n0 0.1 0.5 0.200001 0.4\n")
    found, problems = read_labels(path, 2)
    np.testing.assert_allclose(
        found.boxes_xyxy, [[0, 0.3, 0.15, 0.7], [0.905, 0.3, 1, 0.7], [0, 0.3, 0.2, 0.7]], atol=1e-5
    )
    assert [(p.line, p.reason) for p in problems] == [(1, labels.CLIPPED), (2, labels.CLIPPED)]


def test_polygons_give_boxes_and_may_stand_among_boxes(tmp_path):
    path = write(tmp_path / "1.txt", "1 0.1 0.2 0.5 0.2 0.3 0.6\n0 0.5 0.5 0.2 0.2\n")
    found, problems = read_labels(path, 2)
    assert not problems
    assert found.boxes_xyxy.dtype == np.float32
    assert found.classes.dtype == np.int64
    np.testing.assert_allclose(found.boxes_xyxy, [[0.1, 0.2, 0.5, 0.6], [0.4, 0.4, 0.6, 0.6]], atol=1e-6)
    first, second = found.polygons
    np.testing.assert_allclose(first, [[0.1, 0.2], [0.5, 0.2], [0.3, 0.6]], atol=1e-6)
    assert second is None


@pytest.mark.parametrize("text", [None, "", " \n\n", "\ufeff"])
def test_missing_and_empty_labels_are_backgrounds(tmp_path, text):
    if text is not None:
        (tmp_path / "1.txt").write_text(text, encoding="utf-8")
    found, problems = read_labels(tmp_path / "1.txt", 2)
    assert not problems
    assert found.boxes_xyxy.shape == (0, 4)
    assert found.polygons == ()


def test_labels_with_a_byte_order_mark_or_no_text_at_all(tmp_path):
    (tmp_path / "1.txt").write_text("\ufeff" + GOOD + "\r\n", encoding="utf-8")
    found, problems = read_labels(tmp_path / "1.txt", 2)
    assert found.classes.tolist() == [1]
    assert not problems
    (tmp_path / "2.txt").write_bytes(bytes(range(128, 256)) * 3)
    found, problems = read_labels(tmp_path / "2.txt", 2)
    assert not len(found.classes)
    assert problems
    assert problems[0].file == str(tmp_path / "2.txt")


def test_a_label_that_cannot_be_read_is_reported(tmp_path):
    (tmp_path / "1.txt").mkdir()
    found, (problem,) = read_labels(tmp_path / "1.txt", 2)
    assert problem.reason == labels.UNREADABLE_LABEL
    assert not len(found.classes)
