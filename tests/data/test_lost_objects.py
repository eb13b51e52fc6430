"""Data sets that lose their objects on the way: each ends in an error, a warning or the right boxes; none in silence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from image_files import add
from odd_data_sets import (
    BOX,
    ROW,
    Outcome,
    coco,
    converted,
    images,
    picture,
    started,
    text,
    val_split,
    voc,
    voc_xml,
    write_coco,
    yolo,
)
from runs import CONFIG, alone

from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import parse
from dsyolo.data import unread_labels
from dsyolo.data.fingerprint import of_data
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.doctor.answers import DataAnswer
from dsyolo.doctor.dataset_checks import data_set
from dsyolo.doctor.findings import FAIL, WARNING
from dsyolo.doctor.probe import SECTIONS

Case = tuple[Callable[[Path], Path], tuple[str, ...]]


def train_images(root: Path, folder: str, name: str = "{stem}.txt", content: str = ROW) -> Path:
    """Images of images/train whose labels are elsewhere, and a good validation split."""
    for image in images(root):
        text(root / folder / name.format(stem=image.stem, name=image.name), content)
    val_split(root)
    return yolo(root)


def beside_train(root: Path) -> Path:
    for split in ("train", "val"):
        for image in images(root, split):
            text(root / "labels" / f"{image.stem}.txt", ROW)
    return yolo(root, "train", "val")


def one_file(root: Path, name: str, content: str) -> Path:
    images(root)
    val_split(root)
    text(root / name, content)
    return yolo(root)


CSV = "filename,class,xmin,ymin,xmax,ymax\nain0.jpg,cat,24,16,56,40\n"
COCO_JSON = json.dumps({"images": [{"id": 1, "file_name": "ain0.jpg"}], "annotations": [], "categories": []})
NO_OBJECT = "train: none of its 4 images has an object"

# Errors: the shape of the data set, and what the message says.
YOLO_ERRORS: dict[str, Case] = {
    "Labels": (
        lambda r: train_images(r, "Labels/train"),
        ("Labels/train: 4 .txt files", "labels/train/ain0.txt"),
    ),
    "train_labels": (
        lambda r: train_images(r, "train_labels"),
        ("train_labels: 4 .txt files", "4 label files are missing, 0 are empty"),
    ),
    "labels beside train": (beside_train, ("/labels: 4 .txt files", "/train/ain0.txt")),
    "labels flat": (lambda r: train_images(r, "labels"), ("/labels: 4 .txt files", "/labels/train/ain0.txt")),
    "labels beside the images": (lambda r: train_images(r, "images/train"), ("images/train: 4 .txt files",)),
    "empty label files": (
        lambda r: train_images(r, "labels/train", content=""),
        (
            "0 label files are missing, 4 are empty",
            "all its label files are there, but empty. Export them again",
        ),
    ),
    "labels in upper case": (lambda r: train_images(r, "labels/train", "{stem}.TXT"), ("4 .TXT files",)),
    "ending kept": (
        lambda r: train_images(r, "labels/train", "{name}.txt"),
        ("ain0.jpg.txt", "labels/train/ain0.txt"),
    ),
    "VOC beside": (
        lambda r: train_images(r, "xml", "{stem}.xml", voc_xml(BOX)),
        ("4 .xml files", "convert voc"),
    ),
    "labelme": (
        lambda r: train_images(r, "images/train", "{stem}.json", '{"shapes": [{"label": "cat"}]}'),
        ("4 .json files", "in the format of LabelMe: export it as YOLO or as COCO. A format of your own"),
    ),
    "other stems": (
        lambda r: train_images(r, "labels/train", "{stem}0.txt"),
        (
            "labels/train: 4 label files there match no image by name. ain00.txt would have to be ain0.txt "
            "for the image ain0.jpg: rename",
            "4 label files are missing, 0 are empty",
        ),
    ),
    "archive beside": (
        lambda r: one_file(r, "labels.zip", "PK"),
        (
            "labels.zip looks like labels, but is not read. Unpack it, so that",
            "labels/train/ain0.txt is there",
        ),
    ),
    "archive among the images": (
        lambda r: one_file(r, "images/train/train_annotations.tar.gz", "\x1f"),
        ("train_annotations.tar.gz looks like labels", "Unpack it"),
    ),
    "COCO per image": (
        lambda r: train_images(r, "images/train", "{stem}.json", COCO_JSON),
        ("4 .json files", "one file per image, and COCO has one for all"),
    ),
    "Label Studio beside": (
        lambda r: one_file(r, "project.json", '[{"annotations": [{"value": {"rectanglelabels": ["cat"]}}]}]'),
        ("project.json looks like", "in the format of Label Studio: export it as YOLO or as COCO"),
    ),
    "COCO beside": (
        lambda r: one_file(r, "annotations/all.json", COCO_JSON),
        ("all.json looks like", "convert coco"),
    ),
    "CSV beside": (lambda r: one_file(r, "boxes.csv", CSV), ("boxes.csv looks like", "data_format.md")),
    "nothing": (
        lambda r: one_file(r, "readme.txt", "A data set of 4 cats, 2 dogs, 1 mouse and 0 birds."),
        ("no label-like",),
    ),
}


@pytest.mark.parametrize("name", YOLO_ERRORS)
def test_a_training_split_without_an_object_is_an_error(tmp_path, name):
    make, expected = YOLO_ERRORS[name]
    outcome = started(make(tmp_path))
    for words in (NO_OBJECT, "were looked for in", *expected):
        assert words in outcome.error, outcome


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0,0.4,0.46,0.32,0.4", "separate them by spaces"),
        ("cat 0.4 0.46 0.32 0.4", "a name where the class's number stands"),
        ("0 0.4 0.46 0.32 0.4 0.9", "6 columns"),
        ("0 24 16 56 40", "not pixels"),
        ("3 0.4 0.46 0.32 0.4", "data.yaml names 1 (0 to 0)"),
        ("0 0.4 0.46 0.32 nan", "NaN"),
    ],
)
def test_rows_that_cannot_be_used_are_an_error_with_their_reason(tmp_path, row, words):
    outcome = started(train_images(tmp_path, "labels/train", content=f"{row}\n"))
    assert "None of the 4 images" in outcome.error
    assert words in outcome.error


@pytest.mark.parametrize("name", ["labelme", "COCO per image", "Label Studio beside"])
def test_what_coco_cannot_read_is_not_sent_there(tmp_path, name):
    assert "convert coco" not in started(YOLO_ERRORS[name][0](tmp_path)).error


@pytest.mark.parametrize("name", ["empty label files", "other stems", "archive beside"])
def test_labels_that_are_there_are_not_missed(tmp_path, name):
    error = started(YOLO_ERRORS[name][0](tmp_path)).error
    assert "Put the labels there" not in error


def test_one_label_file_is_counted_as_one(tmp_path):
    data = train_images(tmp_path, "labels/train", content="")
    (tmp_path / "labels/train/ain0.txt").unlink()
    assert "1 label file is missing, 3 are empty" in started(data).error


def test_unread_labels_in_utf_16_are_found(tmp_path):
    data = train_images(tmp_path, "Labels")
    for path in (tmp_path / "Labels").iterdir():
        path.write_text(ROW, encoding="utf-16")
    assert "Labels: 4 .txt files look like labels" in started(data).error


def test_a_folder_that_may_not_be_searched_is_named(tmp_path, monkeypatch):
    data = train_images(tmp_path, "secret", "{stem}.bin")
    closed = str(tmp_path / "secret")
    monkeypatch.setattr(unread_labels, "_may_search", lambda folder: folder != closed)
    assert f"train: {closed} may not be searched for labels. Change its permissions" in started(data).error


def test_labels_of_another_split_are_no_strays(tmp_path):
    """All images in one folder: the labels of test images are read by nobody, and are named rightly."""
    found = images(tmp_path, "images/all", 6)
    for image in found[1:]:
        text(tmp_path / "labels/all" / f"{image.stem}.txt", ROW)
    for split, part in {"train": found[:3], "val": found[3:5]}.items():
        text(tmp_path / f"{split}.txt", "".join(f"./images/all/{image.name}\n" for image in part))
    outcome = started(yolo(tmp_path, "train.txt", "val.txt"))
    assert not outcome.error
    assert "match no image" not in outcome.lines
    text(tmp_path / "labels/all" / "all00.txt", ROW)
    assert (
        "all00.txt would have to be all0.txt for the image all0.jpg" in started(tmp_path / "data.yaml").lines
    )


# ---- partly lost: warnings


def some_lost(root: Path) -> Path:
    """Half of the labels have another ending."""
    data = train_images(root, "labels/train")
    for number in (0, 1):
        (root / f"labels/train/ain{number}.txt").rename(root / f"labels/train/ain{number}.TXT")
    return data


def second_source(root: Path, labelled: int, name: str, content: str) -> Path:
    train_images(root, "labels/train")
    for image in images(root, "more/images/own", 10)[:labelled]:
        text(root / "more/labels/own" / f"{image.stem}.txt", ROW)
    text(root / "more" / name, content)
    return yolo(root, "[images/train, more/images/own]")


def no_val(root: Path) -> Path:
    data = train_images(root, "labels/train")
    for path in (root / "labels/val").iterdir():
        path.rename(path.with_suffix(".label"))
    return data


def corners(root: Path) -> Path:
    rows = [(0.1, 0.1, 0.4, 0.5), (0.5, 0.6, 0.9, 0.95), (0.2, 0.7, 0.35, 0.9), (0.6, 0.1, 0.9, 0.3)]
    content = "".join(f"0 {' '.join(map(str, row))}\n" for row in rows)
    return train_images(root, "labels/train", content=content)


def top_left(root: Path) -> Path:
    rows = [(0.0, 0.1, 0.3, 0.2), (0.5, 0.6, 0.4, 0.35), (0.05, 0.7, 0.2, 0.3), (0.6, 0.01, 0.3, 0.3)]
    content = "".join(f"0 {' '.join(map(str, row))}\n" for row in rows)
    return train_images(root, "labels/train", content=content)


def centres_at_the_edges(root: Path) -> Path:
    """Objects that images cut, all their boxes as far outside: on the left, and one at the right side."""
    rows = [(0.02, 0.1, 0.3, 0.2), (0.05, 0.7, 0.2, 0.3), (0.6, 0.02, 0.3, 0.3), (0.95, 0.5, 0.1, 0.3)]
    content = "".join(f"0 {' '.join(map(str, row))}\n" for row in rows)
    return train_images(root, "labels/train", content=content)


def full_frames(root: Path) -> Path:
    return train_images(root, "labels/train", content="0 0.5 0.5 0.9 0.96\n0 0.52 0.5 0.96 1\n")


def mostly_pixels(root: Path) -> Path:
    return train_images(root, "labels/train", content=f"{ROW}0 24 16 56 40\n0 2 3 30 20\n")


def same_val(root: Path) -> Path:
    train_images(root, "labels/train")
    return yolo(root, val="images/train")


def overlapping(root: Path) -> Path:
    train_images(root, "labels/train")
    return yolo(root, "[images/train, images/val]")


def linked_val(root: Path) -> Path:
    train_images(root, "labels/train")
    for kind in ("images", "labels"):
        os.symlink("train", root / kind / "again")
    return yolo(root, val="images/again")


def classes(root: Path) -> Path:
    train_images(root, "labels/train", content=f"{ROW}1 0.5 0.5 0.1 0.1\n")
    return yolo(root, names="[cat, dog, emu]")


YOLO_WARNINGS: dict[str, Case] = {
    "another ending": (some_lost, ("2 images without a label file are taken as backgrounds", "2 .TXT files")),
    "COCO beside a second source": (
        lambda r: second_source(r, 1, "all.json", COCO_JSON),
        ("only 1 of 10 images in", "more/images/own have objects", "all.json looks like labels"),
    ),
    "CSV beside a second source": (
        lambda r: second_source(r, 0, "boxes.csv", CSV),
        ("only 0 of 10 images in", "boxes.csv looks like labels"),
    ),
    "val without an object": (no_val, ("val: none of its 2 images has an object", "2 .label files")),
    "corners": (corners, ("train: most label rows look like corners",)),
    "top left": (
        top_left,
        (
            "train: 12 of 16 boxes are over the left or upper edge",
            "add half of the width to x and half of the height to y if they are",
        ),
    ),
    "mostly pixels": (mostly_pixels, ("train: 8 of 12 label rows look like pixels",)),
    "val is train": (same_val, ("val has the same 4 images as train",)),
    "val is a link to train": (linked_val, ("val has the same 4 images as train",)),
    "val overlaps train": (overlapping, ("2 of 2 val images are in train too",)),
    "classes": (classes, ("train: no object of the classes emu.", "val: no object of the classes dog.")),
}


@pytest.mark.parametrize("name", YOLO_WARNINGS)
def test_what_is_lost_in_part_is_a_warning(tmp_path, name):
    make, expected = YOLO_WARNINGS[name]
    outcome = started(make(tmp_path))
    assert not outcome.error
    for words in expected:
        assert words in outcome.lines, outcome.lines


@pytest.mark.parametrize(
    "make",
    [
        full_frames,
        lambda r: second_source(r, 2, "all.json", COCO_JSON),  # 20 % labelled: backgrounds on purpose
        lambda r: second_source(r, 0, "notes.txt", "10 backgrounds: 1 2 3 4 5"),
        lambda r: train_images(r, "labels/train"),
    ],
)
def test_no_warning_where_nothing_is_lost(tmp_path, make):
    outcome = started(make(tmp_path))
    assert not outcome.error
    assert len(outcome.lines.splitlines()) == 2, outcome.lines  # the summaries of both splits


# ---- the right boxes


def listed(root: Path, line: str, encoding: str = "utf-8", end: str = "\n") -> Path:
    train_images(root, "labels/train")
    text(root / "train.txt", "".join(line.format(n) + end for n in range(4)), encoding)
    return yolo(root, "train.txt")


def cvat(root: Path) -> Path:
    for image in images(root, "obj_train_data"):
        text(image.with_suffix(".txt"), ROW)
    text(root / "train.txt", "".join(f"data/obj_train_data/ata{n}.jpg\n" for n in range(4)))
    val_split(root)
    return yolo(root, "train.txt")


YOLO_RIGHT: dict[str, Callable[[Path], Path]] = {
    "a list of Windows": lambda r: listed(r, ".\\images\\train\\ain{}.jpg", end="\r\n"),
    "a list of CVAT": cvat,
    "a list with a byte-order mark": lambda r: listed(r, "./images/train/ain{}.jpg", "utf-8-sig"),
    "data.yaml of Windows": lambda r: (
        yolo(r, "images\\train", ".\\images\\val") if train_images(r, "labels/train") else r
    ),
    "images in upper case": lambda r: [p.rename(p.with_suffix(".JPG")) for p in images(r)] and train_again(r),
    "classes.txt": lambda r: (
        text(r / "labels/train/classes.txt", "cat\n") and train_images(r, "labels/train")
    ),
    "labels with a byte-order mark": lambda r: train_images(r, "labels/train", content=f"\ufeff{ROW}"),
}


def train_again(root: Path) -> Path:
    for number in range(4):
        text(root / f"labels/train/ain{number}.txt", ROW)
    val_split(root)
    return yolo(root)


@pytest.mark.parametrize("name", YOLO_RIGHT)
def test_the_right_boxes(tmp_path, name):
    outcome = started(YOLO_RIGHT[name](tmp_path))
    assert not outcome.error
    assert list(outcome.boxes.values()) == [[list(BOX)]] * 6


def test_boxes_and_segments_in_one_file(tmp_path):
    outcome = started(train_images(tmp_path, "labels/train", content=f"{ROW}0 0.1 0.1 0.5 0.1 0.3 0.5\n"))
    assert outcome.boxes["ain0.jpg"] == [list(BOX), [10, 6, 50, 30]]


def test_a_list_that_is_not_utf_8_is_named(tmp_path):
    data = listed(tmp_path, "./images/train/\xe4in{}.jpg", "latin-1")
    assert (
        f"{tmp_path / 'train.txt'}: cannot be read as a list of images: not in UTF-8. Save it as UTF-8: iconv -f ENCODING"
        in started(data).error
    )


def test_a_backslash_that_yaml_takes_for_a_control_character_is_explained(tmp_path):
    train_images(tmp_path, "labels/train")
    assert "Write / instead of" in started(yolo(tmp_path, '"images\\train"')).error


# ---- COCO and VOC


def coco_set(root: Path, **changes) -> Path:
    coco(root, "train", **changes)
    coco(root, "val", 2)
    return root


def changed(root: Path, **keys) -> Path:
    content = coco(root, "train")
    coco(root, "val", 2)
    write_coco(root, {**content, **keys})
    return root


def ids(root: Path, image_id: Callable[[int], object]) -> Path:
    content = coco(root, "train")
    coco(root, "val", 2)
    for one in content["annotations"]:
        one["image_id"] = image_id(one["image_id"])
    write_coco(root, content)
    return root


def no_categories(root: Path) -> Path:
    for split in ("train", "val"):
        write_coco(root, {**coco(root, split), "categories": []}, split)
    return root


def roboflow(root: Path) -> Path:
    categories = [
        {"id": 0, "name": "cats", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "cats"},
    ]
    for split, folder in (("train", "train"), ("val", "valid")):
        content = {**coco(root, split), "categories": categories}
        (root / split).rename(root / "moving")
        (root / "moving").rename(root / folder)
        text(root / folder / "_annotations.coco.json", json.dumps(content))
    for path in (root / "annotations").iterdir():
        path.unlink()
    return root


def label_studio(root: Path) -> Path:
    content = coco(root, "images", 10)
    for one in content["images"]:
        one["file_name"] = f"images\\{one['file_name']}"
    text(root / "result.json", json.dumps(content))
    (root / "annotations/instances_images.json").unlink()
    return root


COCO_CASES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    # the data set, words of the error, words of the summary beside the right boxes
    "no image matches": (
        lambda r: ids(r, lambda n: n + 100),
        "4 of 4 annotations (100.0%) are of no image",
        "",
    ),
    "half match": (
        lambda r: ids(r, lambda n: n if n > 2 else -n),
        "",
        "2 of 4 annotations (50.0%) are of no image",
    ),
    "ids as text": (lambda r: ids(r, str), "", ""),
    "ids as numbers with a point": (lambda r: ids(r, float), "", ""),
    "ids as names": (lambda r: ids(r, lambda n: f"train{n}.jpg"), "", ""),
    "no categories": (no_categories, "categories is empty", ""),
    "category as text": (lambda r: coco_set(r, category_id="1"), "", ""),
    "unknown categories": (lambda r: coco_set(r, category_id=7), "category_id 7 is no category's id", ""),
    "no annotations": (lambda r: changed(r, annotations=[]), "train: none of its 4 images has an object", ""),
    "crowd as text": (lambda r: coco_set(r, iscrowd="0"), "", ""),
    "bad segmentation": (
        lambda r: coco_set(r, segmentation=[[1, 2, "x"]]),
        "",
        "segmentation cannot be used (its bbox is)",
    ),
    "segmentation in shares": (
        lambda r: coco_set(r, segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]),
        "",
        "segmentation cannot",
    ),
    "Roboflow": (roboflow, "", "super-category without objects (dropped)"),
    "Label Studio": (
        label_studio,
        "",
        "result.json is for all images: split by a hash of their names, 1 for val",
    ),
}


@pytest.mark.parametrize("name", COCO_CASES)
def test_coco(tmp_path, name):
    make, error, line = COCO_CASES[name]
    outcome = converted("coco", make(tmp_path / "src"))
    assert bool(outcome.error) == bool(error), outcome
    assert error in outcome.error
    assert line in outcome.lines
    if not error:
        assert set(map(str, outcome.boxes.values())) == {str([[*map(float, BOX)]])}, outcome.boxes


def test_images_whose_annotations_match_nothing_are_no_backgrounds(tmp_path):
    outcome = converted("coco", ids(tmp_path / "src", lambda n: n if n > 2 else -n))
    assert {"train1.jpg", "train2.jpg"}.isdisjoint(outcome.boxes)
    assert "2 x no annotation is of it, while others are of no image (image left out)" in outcome.lines


def test_images_of_one_id_are_left_out_and_named(tmp_path):
    content = coco(tmp_path / "src")
    coco(tmp_path / "src", "val", 2)
    content["images"][0]["id"] = 2
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert sorted(outcome.boxes) == ["train3.jpg", "train4.jpg", "val1.jpg", "val2.jpg"]
    assert "2 x several images have its id (image left out)" in outcome.lines


def test_entries_of_one_file_are_one_image(tmp_path):
    content = coco(tmp_path / "src")
    coco(tmp_path / "src", "val", 2)
    content["images"][0]["file_name"] = "train2.jpg"
    content["annotations"][0]["bbox"] = [1, 2, 10, 20]
    write_coco(tmp_path / "src", content)
    assert converted("coco", tmp_path / "src").boxes["train2.jpg"] == [[1, 2, 11, 22], list(BOX)]


def test_coco_boxes_that_look_like_corners_or_shares(tmp_path):
    outcome = converted("coco", coco_set(tmp_path / "corners", bbox=list(BOX[:2]) + [80, 50]))
    assert "most boxes look like corners" in outcome.lines
    outcome = converted("coco", coco_set(tmp_path / "shares", bbox=[0.24, 0.27, 0.32, 0.4]))
    assert "boxes look like shares of the image" in outcome.lines + outcome.error


def test_annotations_of_no_category_are_counted_and_their_images_left_out(tmp_path):
    content = coco(tmp_path / "src")
    coco(tmp_path / "src", "val", 2)
    content["annotations"][0]["category_id"] = 7
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert "1 of 4 annotations (25.0%) are of no category" in outcome.lines
    assert "train1.jpg" not in outcome.boxes
    assert (
        f"none of its objects can be used (image left out): {tmp_path / 'src/train/train1.jpg'}"
        in outcome.lines
    )


def namespaced(xml: str) -> str:
    return xml.replace("<object>", "<item><object>").replace("</object>", "</object></item>")


VOC_CASES: dict[str, tuple[dict[str, str], dict[str, str], str, str]] = {
    # annotations of a and b, lists, words of the error, words of the summary
    "names with endings": (
        {"a": voc_xml(BOX), "b": voc_xml(BOX)},
        {"train": "a.jpg\nJPEGImages\\b.jpg"},
        "",
        "none",
    ),
    "objects one level deeper": (
        {"a": namespaced(voc_xml(BOX)), "b": voc_xml(BOX)},
        {},
        "",
        "1 of <bndbox>, but none",
    ),
    "no objects": ({"a": voc_xml(), "b": voc_xml()}, {}, "train: none of its 2 images has an object", ""),
    "a name without annotation": (
        {"a": voc_xml(BOX)},
        {"train": "a\nb"},
        "",
        "annotation cannot be read (image left out)",
    ),
}


@pytest.mark.parametrize("name", VOC_CASES)
def test_voc(tmp_path, name):
    annotations, lists, error, line = VOC_CASES[name]
    src = voc(tmp_path / "src", annotations, {"v": voc_xml(BOX, (0, 0, 10, 10))}, **lists)
    picture(src / "JPEGImages/b.jpg")
    outcome = converted("voc", src)
    assert error in outcome.error
    assert bool(outcome.error) == bool(error), outcome
    assert line in outcome.lines or line == "none"
    assert outcome.boxes.get("a.jpg", [list(BOX)]) == [list(BOX)]
    if line == "none":
        assert sorted(outcome.boxes) == ["a.jpg", "b.jpg", "v.jpg"]


# ---- the entry, and doctor, which says the same


def test_a_training_ends_with_status_2_and_these_words(tmp_path):
    place = tmp_path
    data = YOLO_ERRORS["Labels"][0](place / "set")
    text(place / "ds.json", json.dumps(CONFIG))
    done = alone(place, "lost", data=data)
    assert done.returncode == 2
    output = done.stdout + done.stderr
    assert f"{data} has no object to train on" in output
    for words in (NO_OBJECT, *YOLO_ERRORS["Labels"][1]):
        assert words in output
    assert "Traceback" not in output
    assert not (place / "runs/lost/weights").exists()


@pytest.mark.parametrize("name", ["Labels", "empty label files", "COCO beside"])
def test_doctor_fails_with_the_words_of_a_training(tmp_path, name):
    make, expected = YOLO_ERRORS[name]
    data = make(tmp_path)
    findings = list(data_set(context(data)))
    assert {finding.verdict for finding in findings} == {FAIL}
    found = "\n".join(f"{finding.found}. {finding.remedy}" for finding in findings)
    for words in (NO_OBJECT, *expected):
        assert words in found
    for line in started(data).error.splitlines()[1:]:
        assert line.strip() in found


@pytest.mark.parametrize(
    "name", ["another ending", "val without an object", "val is train", "classes", "corners"]
)
def test_doctor_warns_as_a_training_does(tmp_path, name):
    make, expected = YOLO_WARNINGS[name]
    data = make(tmp_path)
    findings = [finding for finding in data_set(context(data)) if finding.verdict == WARNING]
    warnings = of_data(str(data))["warnings"]
    found = "\n".join(f"{finding.found}. {finding.remedy}" for finding in findings)
    for words in expected:
        assert words.strip(".") in found
    assert warnings == started(data).lines.splitlines()[-len(warnings) :]


def context(data: Path):
    """Return the input of doctor's checks, with the answer of the probe on this host."""
    from types import SimpleNamespace

    answer = DataAnswer.model_validate(SECTIONS["data"]({"data": str(data)}))
    return SimpleNamespace(
        answers=lambda kind: {"here": answer}, options=SimpleNamespace(data=data), forwarded=None
    )


def test_doctor_looks_at_all_labels_before_it_says_that_there_are_none(tmp_path, monkeypatch):
    from dsyolo.data import label_survey

    monkeypatch.setattr(label_survey, "MAX_READ", 2)
    for number in range(7):
        add(tmp_path, f"train/{number}.jpg", label=ROW if number == 5 else "")
    val_split(tmp_path)
    data = yolo(tmp_path)
    found = of_data(str(data))["splits"]["train"]
    assert (found["num_images"], found["num_unread"]) == (7, 0)
    assert [one.found for one in data_set(context(data))] == [
        "train: 7 images (names, sizes, labels' content); val: 2 images (names, sizes, labels' content)"
    ]


def test_doctor_names_the_rows_that_a_training_leaves_out(tmp_path):
    data = train_images(
        tmp_path, "labels/train", content=f"{ROW}{ROW}-1 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1 0.9\n"
    )
    findings = [finding for finding in data_set(context(data)) if finding.verdict == WARNING]
    found = [finding.found for finding in findings]
    lines = started(data).lines
    for kind in ("duplicate row", "class is not a whole number from 0", "wrong number of columns"):
        (line,) = [line for line in found if line.startswith("train: 4 x ") and kind in line]
        assert line.removeprefix("train: ") in lines
    assert "is the sixth a confidence or the id of a track?" in lines
    assert {finding.remedy for finding in findings if " x " in finding.found} == {
        "Correct these rows or export them again. A training says the same, and goes on."
    }
    assert "train: 8 of 12 label rows cannot be used and are left out" in "".join(found)


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        ((1, 2, 3), "No row has class 0, so these labels count from 1, and classes count from 0: subtract 1"),
        ((1, 3, 4), "Add these classes to names (cat, dog, emu), or remove the rows."),
        ((1, 2, 7), "Add these classes to names (cat, dog, emu), or remove the rows."),
        ((0, 2, 3), "Add these classes to names (cat, dog, emu), or remove the rows."),
    ],
)
def test_classes_that_count_from_one_are_recognised(tmp_path, rows, remedy):
    content = "".join(f"{number} 0.5 0.5 0.{number + 1} 0.1\n" for number in rows)
    train_images(tmp_path, "labels/train", content=content)
    for label in (tmp_path / "labels/val").iterdir():
        label.write_text(content, encoding="utf-8")
    data = yolo(tmp_path, names="[cat, dog, emu]")
    outcome = started(data)
    assert remedy in outcome.error
    (finding,) = [one for one in data_set(context(data)) if one.remedy.startswith(remedy[:30])]
    assert finding.verdict == FAIL
    assert f"class {max(rows)}, but data.yaml names 3 (0 to 2)" in outcome.error


def test_classes_without_names_are_named_in_a_warning(tmp_path):
    data = train_images(tmp_path, "labels/train")
    text(data, data.read_text(encoding="utf-8").replace("names", "nc: 2\n#"))
    assert "names: the classes are called class0 to class1, as where" in started(data).lines


def test_doctor_says_how_many_labels_it_left_to_the_training(tmp_path, monkeypatch):
    from dsyolo.data import label_survey

    monkeypatch.setattr(label_survey, "MAX_READ", 3)
    data = train_images(tmp_path, "labels/train")
    (finding,) = data_set(context(data))
    assert (
        "train: 4 images (names, sizes, labels' content; rows of 2 labels are first checked by a"
        in finding.found
    )


def test_boxes_cut_on_all_sides_are_no_top_left_corners(tmp_path):
    assert "over the left or upper edge" not in started(centres_at_the_edges(tmp_path)).lines


def test_a_folder_or_an_annotation_file_in_the_place_of_a_data_yaml_is_answered_with_the_way(tmp_path):
    (tmp_path / "images").mkdir()
    text(tmp_path / "classes.txt", "RBC\nno\n1:30\n")
    with pytest.raises(UserError) as caught:
        parse(["--data", str(tmp_path)])
    (line,) = caught.value.problems
    shown = re.search(r"`(train: .*?)`, `(val: .*?)` .* and `(names: .*?)`,", line)
    assert shown
    text(tmp_path / "data.yaml", "".join(f"{one}\n" for one in shown.groups()))
    assert read_data_yaml(tmp_path / "data.yaml").names == ("RBC", "no", "1:30")
    text(tmp_path / "result.json", COCO_JSON)
    with pytest.raises(UserError, match=r"it holds COCO's annotations. Convert them: dsyolo convert coco"):
        read_data_yaml(tmp_path / "result.json")
    (tmp_path / "coco").mkdir()
    text(tmp_path / "coco/result.json", COCO_JSON)
    with pytest.raises(UserError, match="an export as COCO, convert it: dsyolo convert coco"):
        parse(["--data", str(tmp_path / "coco")])


def test_outcomes_are_never_silent():
    """A guard of the lists above: there are at least 25 shapes."""
    assert len(YOLO_ERRORS) + len(YOLO_WARNINGS) + len(COCO_CASES) >= 25
    assert Outcome().boxes == {}


def test_a_label_that_is_a_pipe_hangs_neither_doctor_nor_training(tmp_path):
    data = train_images(tmp_path, "labels/train")
    (tmp_path / "labels/train/ain0.txt").unlink()
    os.mkfifo(tmp_path / "labels/train/ain0.txt")
    assert of_data(str(data))["splits"]["train"]["num_images"] == 4
    outcome = started(data)
    assert "label file cannot be read" in outcome.lines
    assert "ain0.jpg" not in outcome.boxes
