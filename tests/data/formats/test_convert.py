"""Pascal VOC and COCO into the YOLO format."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsyolo.base.errors import UserError
from dsyolo.data.formats import coco, coco_shapes, voc, yolo_writer
from dsyolo.data.formats.format_registry import convert
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.index_builder import build_index
from dsyolo.data.labels import read_labels

WIDTH, HEIGHT = 100, 80


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((HEIGHT, WIDTH, 3), 90, np.uint8))


def annotation(*objects: tuple, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    nodes = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, difficult, x1, y1, x2, y2 in objects
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{nodes}</annotation>"


def voc_folder(root: Path, lists: dict[str, str], annotations: dict[str, str]) -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for name, lines in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
    for stem, text in annotations.items():
        picture(root / "JPEGImages" / f"{stem}.jpg")
        (root / "Annotations" / f"{stem}.xml").write_text(text)
    return root


BOX = ("cat", 0, 11, 21, 60, 60)


def boxes_px(label: Path) -> tuple[list[int], np.ndarray]:
    found, problems = read_labels(label, 9)
    assert not problems
    return found.classes.tolist(), found.boxes_xyxy * [WIDTH, HEIGHT, WIDTH, HEIGHT]


# ---- VOC


def test_voc(tmp_path):
    src = voc_folder(
        tmp_path / "src",
        {"trainval": "a\nb\n", "train": "a\n", "val": "b\n", "test": "c\n"},
        {"a": annotation(BOX, ("ant", 0, 1, 1, 100, 80)), "b": annotation(), "c": annotation(BOX)},
    )
    result = convert("voc", src, tmp_path / "dst")
    assert not result.problems
    assert result.names == ("ant", "cat")
    assert result.num_images == {"train": 2, "val": 1}
    spec = read_data_yaml(result.data_yaml)
    assert spec.names == ("ant", "cat")
    classes, boxes = boxes_px(tmp_path / "dst/labels/train/a.txt")
    assert classes == [1, 0]
    # VOC counts pixels from 1, both ends included
    np.testing.assert_allclose(boxes, [[10, 20, 60, 60], [0, 0, 100, 80]], atol=1e-3)
    found = build_index(spec.train, 2, tmp_path / "cache", progress=False)
    assert (len(found), found.num_backgrounds, found.problems) == (2, 1, ())
    assert os.path.samefile(src / "JPEGImages/c.jpg", tmp_path / "dst/images/val/c.jpg")  # a hard link


def test_a_voc_set_that_counts_from_0_is_taken_at_its_word(tmp_path):
    lists = {"train": "a\n", "val": "a\n"}
    src = voc_folder(tmp_path / "src", lists, {"a": annotation(("cat", 0, 0, 10, 50, 40), BOX)})
    result = convert("voc", src, tmp_path / "dst")
    _, boxes = boxes_px(tmp_path / "dst/labels/val/a.txt")
    np.testing.assert_allclose(boxes, [[0, 10, 50, 40], [11, 21, 60, 60]], atol=1e-3)
    assert [p.reason for p in result.problems] == [yolo_writer.IN_TWO_SPLITS]


def test_without_a_test_list_voc_trains_on_train_and_not_on_trainval(tmp_path):
    lists = {"trainval": "a\nb\n", "train": "a\n", "val": "b\n"}
    src = voc_folder(tmp_path / "src", lists, {"a": annotation(BOX), "b": annotation(BOX)})
    result = convert("voc", src, tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst/images/train").iterdir()] == ["a.jpg"]
    assert result.num_images == {"train": 1, "val": 1}


def test_a_vocdevkit_of_two_years(tmp_path):
    kit = tmp_path / "src" / "VOCdevkit"
    voc_folder(
        kit / "VOC2007", {"trainval": "1\n", "test": "2\n"}, {"1": annotation(BOX), "2": annotation(BOX)}
    )
    voc_folder(kit / "VOC2012", {"trainval": "1\n"}, {"1": annotation(("dog", 0, 2, 2, 30, 30))})
    result = convert("voc", tmp_path / "src", tmp_path / "dst")
    assert sorted(p.name for p in (tmp_path / "dst/images/train").iterdir()) == [
        "VOC2007_1.jpg",
        "VOC2012_1.jpg",
    ]
    assert result.names == ("cat", "dog")
    assert result.num_images == {"train": 2, "val": 1}


def test_what_is_wrong_with_a_voc_set_is_reported_and_the_rest_converted(tmp_path):
    objects = [
        BOX,
        ("cat", 0, 30, 30, 30, 50),
        ("cat", 0, 60, 30, 40, 50),
        ("cat", 0, 200, 30, 240, 50),
        ("cat", 0, 50, 30, 120, 50),
        ("cat", 1, 5, 5, 50, 50),
        ("cat", 0, "nan", 5, 50, 50),
        ("", 0, 5, 5, 50, 50),
        ("cat", 0, "x", 5, 50, 50),
    ]
    src = voc_folder(
        tmp_path / "src",
        {"trainval": "a\nbroken\ncut\ngone\nno_xml\n", "test": "c 1\n"},
        {
            "a": annotation(*objects),
            "broken": "<annotation><size>",
            "cut": annotation(BOX),
            "c": annotation(BOX),
        },
    )
    picture(src / "JPEGImages" / "no_xml.jpg")
    (src / "Annotations" / "gone.xml").write_text(annotation(BOX))
    cut = src / "JPEGImages" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-20])
    result = convert("voc", src, tmp_path / "dst")
    found = {(Path(p.file).name, p.reason) for p in result.problems}
    assert found == {
        *((f"a.xml object {n}", yolo_writer.DEGENERATE) for n in (2, 3, 4)),
        ("a.xml object 5", yolo_writer.OVER_EDGE),
        ("a.xml object 6", voc.DIFFICULT),
        *((f"a.xml object {n}", yolo_writer.BAD_OBJECT) for n in (7, 8, 9)),
        ("broken.xml", voc.BAD_ANNOTATION),
        ("no_xml.xml", voc.BAD_ANNOTATION),
        ("gone.jpg", yolo_writer.NO_IMAGE),
        ("cut.jpg", yolo_writer.BAD_IMAGE),
    }
    _, boxes = boxes_px(tmp_path / "dst/labels/train/a.txt")
    np.testing.assert_allclose(boxes, [[10, 20, 60, 60], [49, 29, 100, 50]], atol=1e-3)
    assert result.num_images == {"train": 1, "val": 1}
    assert yolo_writer.DEGENERATE in result.summary()


def test_names_in_voc_lists(tmp_path):
    """Spaces belong to a name, the flag of a list of one class does not; special characters of patterns are none."""
    stems = ["my pic", "a", "b 1", "c[1]"]
    lines = ["my pic", "a  1", "b 1", "c[1] -1", "/etc/passwd", "../a"]
    lists = {"trainval": "\n".join(lines), "test": "a 0\nmy pic -1"}
    src = voc_folder(tmp_path / "src", lists, {stem: annotation(BOX) for stem in stems})
    (src / "JPEGImages/c[1].jpg").rename(src / "JPEGImages/c[1].jpeg")
    result = convert("voc", src, tmp_path / "dst")
    assert result.num_images == {"train": 4, "val": 2}
    assert {p.file for p in result.problems if p.reason == yolo_writer.NO_IMAGE} == {"/etc/passwd", "../a"}


def test_a_voc_list_and_an_annotation_in_another_encoding(tmp_path):
    lists = {"train": "a\nb\n", "val": "a\n"}
    src = voc_folder(tmp_path / "src", lists, {"a": annotation(BOX), "b": annotation(BOX)})
    (src / "Annotations/b.xml").write_text('<?xml version="1.0" encoding="foo-99"?>' + annotation(BOX))
    result = convert("voc", src, tmp_path / "dst")
    assert ("b.xml", voc.BAD_ANNOTATION) in {(Path(p.file).name, p.reason) for p in result.problems}
    (src / "ImageSets/Main/train.txt").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not in UTF-8. Save it as UTF-8: iconv -f ENCODING .* CP1252"):
        convert("voc", src, tmp_path / "other")


BAD_BOXES = [("cat", 0, 30, 30, 30, 50), ("cat", 0, "x", 5, 50, 50)]  # no size; unreadable


@pytest.mark.parametrize("objects", [BAD_BOXES[:1], BAD_BOXES[1:], BAD_BOXES])
def test_a_voc_image_whose_objects_are_all_bad_is_no_background(tmp_path, objects):
    lists = {"train": "good\nbad\nhard\nempty\n", "val": "good\n"}
    texts = {"good": annotation(BOX), "bad": annotation(*objects), "empty": annotation()}
    texts["hard"] = annotation(("cat", 1, 5, 5, 50, 50))  # it has an object, though a training may not use it
    result = convert("voc", voc_folder(tmp_path / "src", lists, texts), tmp_path / "dst")
    assert ("bad.jpg", yolo_writer.NO_OBJECT_LEFT) in {(Path(p.file).name, p.reason) for p in result.problems}
    for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
        names = {path.name for path in (tmp_path / "dst" / kind / "train").iterdir()}
        assert names == {f"{stem}{suffix}" for stem in ("good", "empty")}


def test_a_voc_size_of_0_is_read_from_the_image(tmp_path):
    lists = {"train": "a\n", "val": "b\n"}
    texts = {"a": annotation(BOX, size=(0, 0)), "b": annotation(BOX)}
    convert("voc", voc_folder(tmp_path / "src", lists, texts), tmp_path / "dst")
    one, other = ((tmp_path / "dst/labels" / name).read_text() for name in ("train/a.txt", "val/b.txt"))
    assert one == other


@pytest.mark.parametrize(
    ("lists", "message"),
    [({}, "lists in ImageSets/Main: none"), ({"trainval": "a\n"}, "lists in ImageSets/Main: trainval")],
)
def test_a_voc_set_without_its_lists(tmp_path, lists, message):
    src = voc_folder(tmp_path / "src", lists, {"a": annotation(BOX)})
    with pytest.raises(UserError, match=message):
        convert("voc", src, tmp_path / "dst")
    with pytest.raises(UserError, match="no folder Annotations"):
        convert("voc", src / "ImageSets", tmp_path / "dst")
    with pytest.raises(UserError, match="no such folder"):
        convert("voc", tmp_path / "nowhere", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_the_blood_cells(tmp_path):
    default = Path(__file__).resolve().parents[4] / "shared" / "data" / "bccd_voc"
    src = Path(os.environ.get("DSYOLO_BCCD", default))
    if not src.is_dir():
        pytest.skip(f"no {src}: set DSYOLO_BCCD to the folder of BCCD in the VOC layout")
    result = convert("voc", src, tmp_path / "dst")
    assert result.names == ("Platelets", "RBC", "WBC")
    assert result.num_images == {"train": 292, "val": 72}
    assert result.num_objects == {"train": 3941, "val": 945}
    assert [p.reason for p in result.problems] == [yolo_writer.DEGENERATE] * 2
    spec = read_data_yaml(result.data_yaml)
    for sources in (spec.train, spec.val):
        assert not build_index(sources, 3, tmp_path / "cache", progress=False).problems


# ---- COCO

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
SQUARE = [10, 20, 30, 20, 30, 40, 10, 40]
FAR = [60, 50, 80, 50, 80, 70, 60, 70]


def coco_folder(root: Path, annotations: list[dict], images: list[dict] | None = None) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, folder in (("train2017", root / "train2017"), ("val2017", root / "images" / "val2017")):
        picture(folder / "1.jpg")
        content = {
            "categories": CATEGORIES,
            "images": [{"id": 1, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT}, *(images or [])],
            "annotations": annotations,
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def one(**fields) -> dict:
    return {"id": 5, "image_id": 1, "category_id": 7, "iscrowd": 0, "bbox": [10, 20, 50, 40], **fields}


def test_coco(tmp_path):
    src = coco_folder(
        tmp_path / "src", [one(), one(category_id=3, bbox=[10, 20, 20, 20], segmentation=[SQUARE])]
    )
    result = convert("coco", src, tmp_path / "dst")
    assert result.names == ("cat", "dog")  # in the order of the ids 3, 7
    assert not result.problems
    assert result.num_objects == {"train": 2, "val": 2}
    found, _ = read_labels(tmp_path / "dst/labels/val/1.txt", 2)
    assert found.classes.tolist() == [1, 0]
    np.testing.assert_allclose(found.boxes_xyxy[0], [0.1, 0.25, 0.6, 0.75], atol=1e-6)
    assert found.polygons[0] is None
    np.testing.assert_allclose(found.polygons[1] * [WIDTH, HEIGHT], np.reshape(SQUARE, (-1, 2)), atol=1e-3)
    assert os.path.samefile(src / "train2017/1.jpg", tmp_path / "dst/images/train/1.jpg")


def test_the_parts_of_an_object_are_joined_without_changing_its_area():
    parts = [np.reshape(points, (-1, 2)).astype(float) for points in (SQUARE, FAR, [2, 2, 6, 2, 6, 6, 2, 6])]
    joined = coco_shapes.join_polygons(parts)
    assert {tuple(p) for p in joined} == {tuple(p) for part in parts for p in part}
    x, y = joined.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    assert area == pytest.approx(20 * 20 + 20 * 20 + 4 * 4)


def test_what_is_wrong_with_a_coco_set_is_reported_and_the_rest_converted(tmp_path):
    annotations = [
        one(id=1),
        one(id=2, iscrowd=1),
        one(id=3, category_id=99),
        one(id=4, image_id=99),
        one(id=5, bbox=[10, 10, 0, 20]),
        one(id=6, bbox=[10, 10]),
        one(id=7, bbox=[80, 10, 60, 20]),
        one(id=8, bbox=None, segmentation={"counts": "x", "size": [1, 1]}),
        one(id=9, bbox=[1, 1, 9, 9], segmentation={"counts": "x", "size": [1, 1]}),
        one(id=10, image_id=[0]),
        one(id=11, category_id={}),
        7,
    ]
    images = [
        {"id": 2, "file_name": "gone.jpg", "width": 9, "height": 9},
        {"id": 3, "file_name": "../train2017/1.jpg", "width": 9, "height": 9},
    ]
    result = convert("coco", coco_folder(tmp_path / "src", annotations, images), tmp_path / "dst")
    found = {(Path(p.file).name.split(" ", 1)[-1], p.reason) for p in result.problems if "train" in p.file}
    assert found == {
        ("annotation 2", coco.CROWD),
        *((f"annotation {n}", yolo_writer.BAD_OBJECT) for n in (3, 4, 6, 8, 10, 11, "number 12")),
        ("annotation 5", yolo_writer.DEGENERATE),
        ("annotation 7", yolo_writer.OVER_EDGE),
        ("gone.jpg", yolo_writer.NO_IMAGE),
        ("1.jpg", yolo_writer.NO_IMAGE),
    }
    assert result.num_objects["train"] == 3
    assert result.num_images["train"] == 1


@pytest.mark.parametrize("bad", [{"bbox": [10, 10, 0, 20]}, {"bbox": None}, {"category_id": 99}])
def test_a_coco_image_whose_objects_are_all_bad_is_no_background(tmp_path, bad):
    images = [{"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": "3.jpg"}]
    src = coco_folder(tmp_path / "src", [one(), one(image_id=2, **bad), one(image_id=3, iscrowd=1)], images)
    for name in ("2.jpg", "3.jpg"):
        picture(src / "train2017" / name)
        picture(src / "images/val2017" / name)
    result = convert("coco", src, tmp_path / "dst")
    assert result.num_images == {"train": 1, "val": 1}
    left_out = {Path(p.file).name for p in result.problems if p.reason == yolo_writer.NO_OBJECT_LEFT}
    assert left_out == {"2.jpg", "3.jpg"}


def test_why_no_image_of_a_split_can_be_used_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"train: no image can be used[\s\S]*box without width or height"):
        convert("coco", coco_folder(tmp_path / "src", [one(bbox=[10, 10, 0, 20])]), tmp_path / "dst")


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "[" * 200_000,
        '{"categories": [], "images": [], "annotations": null}',
        '{"categories": null, "images": [], "annotations": []}',
        '{"categories": [], "images": [3], "annotations": []}',
        '{"categories": [], "images": [{"id": [0]}], "annotations": []}',
    ],
    ids=lambda content: content[:60],
)
def test_coco_annotations_of_another_form(tmp_path, content):
    src = coco_folder(tmp_path / "src", [one()])
    (src / "annotations/instances_train2017.json").write_text(content)
    with pytest.raises(UserError, match="cannot be read as COCO annotations"):
        convert("coco", src, tmp_path / "dst")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
            "it holds detections, as COCO's results are, and they are an object",
        ),
        ([], "it holds a list, and they are an object with images, annotations and categories"),
        (7, "it holds only 7, and they are"),
    ],
)
def test_a_json_that_is_something_else_is_named(tmp_path, content, told):
    src = coco_folder(tmp_path / "src", [one()])
    (src / "annotations/instances_train2017.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=told):
        convert("coco", src, tmp_path / "dst")


def test_a_file_in_the_place_of_the_folder_is_answered_with_the_folder(tmp_path):
    src = coco_folder(tmp_path / "src", [one()])
    file = src / "annotations/instances_train2017.json"
    with pytest.raises(UserError, match=rf"it is a file, .*Give {re.escape(str(src))}\."):
        convert("coco", file, tmp_path / "dst")


def test_a_train_file_alone_is_split_and_one_beside_another_is_not(tmp_path):
    src = coco_folder(tmp_path / "src", [one()])
    val = src / "annotations/instances_val2017.json"
    val.rename(src / "annotations/eval.json")
    with pytest.raises(UserError, match=r"val: no .*Did you mean eval\.json\?"):
        convert("coco", src, tmp_path / "dst")
    (src / "annotations/eval.json").unlink()
    train = src / "annotations/instances_train2017.json"
    content = json.loads(train.read_text(encoding="utf-8"))
    assert len(content["images"]) == 1
    name = content["images"][0]["file_name"]
    image = src / "train2017" / name
    image.with_name("second.jpg").write_bytes(image.read_bytes())
    content["images"].append({**content["images"][0], "id": 99, "file_name": "second.jpg"})
    content["annotations"].append({**content["annotations"][0], "id": 99, "image_id": 99})
    train.write_text(json.dumps(content))
    summary = convert("coco", src, tmp_path / "dst")
    assert "split by a hash of their names, 1 for val, 1 for train" in str(summary)


def test_a_coco_set_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        convert("coco", tmp_path / "nowhere", tmp_path / "dst")
    src = coco_folder(tmp_path / "src", [one()])
    train = src / "annotations" / "instances_train2017.json"
    train.rename(src / "annotations" / "instance_train.json")
    with pytest.raises(UserError, match=r"train: no .*Did you mean instance_train.json\?"):
        convert("coco", src, tmp_path / "dst")
    train.write_text("{")
    with pytest.raises(UserError, match=r"cannot be read as COCO annotations: .*It is not a complete JSON"):
        convert("coco", src, tmp_path / "dst")
    train.write_text(json.dumps({"categories": [], "images": [], "annotations": []}))
    with pytest.raises(UserError, match="the categories of val differ"):
        convert("coco", src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


# ---- the folder


def test_other_content_is_refused_and_kept(tmp_path):
    src = coco_folder(tmp_path / "src", [one()])
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="it is not empty"):
        convert("coco", src, tmp_path / "dst")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="it is a file"):
        convert("coco", src, tmp_path / "dst/mine.txt")
    (tmp_path / "empty").mkdir()
    assert convert("coco", src, tmp_path / "empty").data_yaml.is_file()


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    src = coco_folder(tmp_path / "src", [one()])
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(yolo_writer, "write_data_yaml", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert("coco", src, tmp_path / "dst")
    assert sorted(tmp_path.iterdir()) == before


def test_where_links_are_not_allowed_images_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not permitted")

    src = coco_folder(tmp_path / "src", [one()])
    monkeypatch.setattr(os, "link", refuse)
    convert("coco", src, tmp_path / "dst")
    copied = tmp_path / "dst/images/train/1.jpg"
    assert copied.read_bytes() == (src / "train2017/1.jpg").read_bytes()
    assert not os.path.samefile(copied, src / "train2017/1.jpg")
