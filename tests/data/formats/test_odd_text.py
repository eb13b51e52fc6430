"""Exports whose text, names or rights are odd, for every reader of a foreign format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from odd_data_sets import BOX, coco, converted, picture, text, voc, voc_xml, write_coco

from dsyolo.base.errors import UserError
from dsyolo.data.formats import image_finder
from dsyolo.data.formats.coco_layout import coco_files, split_images
from dsyolo.data.formats.data_format import Image
from dsyolo.data.formats.format_registry import convert
from dsyolo.data.formats.image_finder import ImageFinder

NAME = "annotations/instances_train.json"


def coco_root(root: Path) -> dict:
    content = coco(root)
    coco(root, "val", 2)
    return content


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_a_coco_file_is_read_by_its_byte_order_mark(tmp_path, encoding):
    root = tmp_path / "src"
    content = coco_root(root)
    content["categories"][0]["name"] = "\u732b"
    text(root / NAME, json.dumps(content, ensure_ascii=False), encoding)
    text(
        root / NAME.replace("train", "val"),
        json.dumps({**content, "images": content["images"][:2]}, ensure_ascii=False),
    )
    for number in (1, 2):
        picture(root / f"val/train{number}.jpg")
    outcome = converted("coco", root)
    assert not outcome.error
    assert outcome.boxes["train3.jpg"] == [list(BOX)]


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        ('{"images": "\u732b\u72d7"}'.encode("gbk"), "not in UTF-8. Save it as UTF-8: iconv -f ENCODING"),
        (b'{"images": [' + b"[" * 100_000, "nested far deeper"),
        (b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", "a number of 5000 digits"),
        (b'{"images": "' + b"x" * 5000, "cannot be read as COCO annotations"),
    ],
)
def test_a_coco_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, data, rule):
    root = tmp_path / "src"
    coco_root(root)
    (root / NAME).write_bytes(data)
    error = converted("coco", root).error
    assert f"{NAME}: cannot be read as COCO annotations: " in error
    assert rule in error
    assert len(error) < 1000


@pytest.mark.parametrize(
    "name", ["n" * 5000 + ".jpg", "d/" * 3000 + "1.jpg", "\ud800.jpg", "a\0b.jpg", ".", "..", "/"]
)
def test_a_file_name_that_cannot_be_is_left_out_and_named_briefly(tmp_path, name):
    root = tmp_path / "src"
    content = coco_root(root)
    content["images"][0]["file_name"] = name
    write_coco(root, content)
    outcome = converted("coco", root)
    assert not outcome.error
    assert "train1.jpg" not in outcome.boxes
    assert outcome.boxes["train2.jpg"] == [list(BOX)]
    assert len(outcome.lines) < 3000


def test_a_value_of_any_length_is_named_briefly(tmp_path):
    root = tmp_path / "src"
    content = coco_root(root)
    content["annotations"][0] |= {"image_id": "i" * 100_000, "id": "a" * 100_000}
    content["annotations"][1] |= {"category_id": "c" * 100_000}
    content["annotations"][2] |= {"bbox": [0] * 100_000}
    write_coco(root, content)
    assert len(converted("coco", root).lines) < 4000


def test_an_image_whose_name_in_the_result_is_too_long_is_left_out(tmp_path):
    """Folders of several VOC roots stand before the names of the images."""
    long = "n" * 245
    voc(tmp_path / "src/VOC2007", {"a": voc_xml(BOX), long: voc_xml(BOX)})
    voc(tmp_path / "src/VOC2012", {"b": voc_xml(BOX)})
    outcome = converted("voc", tmp_path / "src")
    assert not outcome.error
    assert "its name in the result is longer than any file" in outcome.lines
    assert set(outcome.boxes) == {"VOC2007_a.jpg", "VOC2007_v.jpg", "VOC2012_b.jpg", "VOC2012_v.jpg"}
    assert not list((tmp_path / "src_yolo").rglob(f"*{long[:200]}*"))


def test_a_name_that_is_not_utf_8_is_found_by_its_bytes(tmp_path):
    stem = os.fsdecode(b"b\xe4r")
    root = tmp_path / "src"
    voc(root, {"a": voc_xml(BOX), stem: voc_xml(BOX)}, train="a")
    (root / "ImageSets/Main/train.txt").write_bytes(b"a\nb\xe4r\n")
    outcome = converted("voc", root)
    assert outcome.boxes[f"{stem}.jpg"] == [[BOX[0] - 1, BOX[1] - 1, *BOX[2:]]]  # pixels from 1


@pytest.mark.parametrize("folder", ["", "annotations", "train"])
def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path, monkeypatch, folder):
    coco(tmp_path)
    closed, listdir = str(tmp_path / folder), os.listdir

    def listed(path: str | Path = ".") -> list[str]:
        if str(path).rstrip("/") == closed.rstrip("/"):
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", listed)
    if folder == "train":
        with pytest.raises(PermissionError, match="Permission denied"):
            ImageFinder([tmp_path / "train"]).find("TRAIN1.JPG")
    else:
        with pytest.raises(PermissionError, match="Permission denied"):
            coco_files(tmp_path, "")


def test_an_image_that_may_not_be_looked_at_is_no_missing_one(tmp_path, monkeypatch):
    def refused(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(image_finder.os, "stat", refused)
    with pytest.raises(PermissionError):
        ImageFinder([tmp_path]).find("a.jpg")


def test_a_split_is_the_same_in_every_locale():
    """Python spells a name by the locale: the bytes of its UTF-8 decide."""
    names = [f"\u732b{number}.jpg" for number in range(20)]
    split = split_images([Image(Path(name), name, []) for name in names])
    assert [image.name for image in split["val"]] == ["\u732b3.jpg", "\u732b14.jpg"]


def test_class_names_that_cannot_be_shown_are_refused(tmp_path):
    root = tmp_path / "src"
    content = coco_root(root)
    content["categories"][0]["name"] = "a\x1b[2J"
    for split in ("train", "val"):
        write_coco(root, content, split)
    with pytest.raises(UserError, match="characters that cannot be shown"):
        convert("coco", root, tmp_path / "dst")


@pytest.mark.parametrize(
    ("declared", "encoding"),
    [
        ("GBK", "gbk"),
        ("gb18030", "gb18030"),
        ("Big5", "big5"),
        ("UTF-16", "utf-16"),
        ("utf-16", "utf-8"),  # as .NET programs declare text that is then saved in UTF-8
        ("UTF-8", "utf-8-sig"),
        ("", "utf-8"),
    ],
)
def test_a_voc_file_is_read_in_the_encoding_that_it_declares(tmp_path, declared, encoding):
    root = voc(tmp_path / "src", {"a": voc_xml(BOX, name="\u8c93")}, {"v": voc_xml(BOX, name="\u8c93")})
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' * bool(declared)
    file = root / "Annotations/a.xml"
    file.write_bytes((head + file.read_text(encoding="utf-8")).encode(encoding))
    outcome = converted("voc", root)
    assert not outcome.error
    assert outcome.boxes["a.jpg"] == outcome.boxes["v.jpg"]
    assert "annotation cannot be read" not in outcome.lines


def test_a_voc_file_in_another_encoding_than_it_declares_is_named(tmp_path):
    root = voc(tmp_path / "src", {"a": voc_xml(BOX), "b": voc_xml(BOX)})
    (root / "Annotations/b.xml").write_bytes(voc_xml(BOX, name="\u732b\u72d7").encode("gbk"))
    lines = converted("voc", root).lines
    assert "annotation cannot be read" in lines
    assert "not in UTF-8. Save it as UTF-8: iconv -f ENCODING" in lines
    assert "GBK" in lines
