"""Names under which converted images are found again, and shapes, ids and sizes that exports state in odd ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from odd_data_sets import (
    BOX,
    ROW,
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

from dsyolo.base.errors import UserError
from dsyolo.data.formats import coco as coco_format
from dsyolo.data.formats.data_format import BAD_SIZE
from dsyolo.data.formats.frames import TURNED, UNSURE
from dsyolo.data.formats.yolo import list_images, read_data_yaml
from dsyolo.data.formats.yolo_writer import IN_TWO_SPLITS, NO_OBJECT_LEFT, RENAMED


def changed(root: Path, change, *, count: int = 4):
    """Convert a COCO set after a change of its train content."""
    content = coco(root, count=count)
    coco(root, "val", 1)
    change(content)
    write_coco(root, content)
    return converted("coco", root)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("img0", "img0.jpg"), (".h/im0.jpg", "_h/im0.jpg"), (".im0.jpg", "_im0.jpg"), ("im0.v2", "im0.v2.jpg")],
)
def test_images_with_names_that_no_training_lists_are_renamed(tmp_path, name, expected):
    root = tmp_path / "src"

    def change(content):
        target = root / "train" / name
        target.parent.mkdir(exist_ok=True)
        (root / "train/train1.jpg").rename(target)
        content["images"][0]["file_name"] = name

    outcome = changed(root, change)
    assert f"1 x {RENAMED}" in outcome.lines
    folder = tmp_path / "src_yolo/images/train"
    assert folder / expected in list_images([folder])
    assert outcome.boxes[Path(expected).name] == [list(BOX)]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[31, 21, 32, 21, 32, 22]],
        [[24, 16, 29, 16, 29, 21], [50, 30]],
        [[24, 16, 80, 16, 80, 40, 24, 40]],
        [[60, 45, 90, 45, 90, 58]],
    ],
)
def test_a_good_bbox_survives_a_bad_segmentation(tmp_path, segmentation):
    outcome = changed(tmp_path / "src", lambda c: c["annotations"][0].update(segmentation=segmentation))
    assert outcome.boxes["train1.jpg"] == [list(BOX)]
    assert f"1 x {coco_format.BAD_SEGMENTATION}" in outcome.lines


def test_a_polygon_near_its_bbox_is_kept_and_its_short_part_named(tmp_path):
    segmentation = [[25, 17, 55, 17, 55, 39, 25, 39], [30, 30]]
    outcome = changed(tmp_path / "src", lambda c: c["annotations"][0].update(segmentation=segmentation))
    assert outcome.boxes["train1.jpg"] == [[25.0, 17.0, 55.0, 39.0]]
    assert f"1 x {coco_format.SHORT_PART}" in outcome.lines


def test_a_bbox_as_text_is_no_box(tmp_path):
    outcome = changed(tmp_path / "src", lambda c: c["annotations"][0].update(bbox="1234"))
    assert "train1.jpg" not in outcome.boxes
    assert "bbox 1234" in outcome.lines


def test_numbers_that_are_by_chance_names_of_files_are_no_ids(tmp_path):
    """Ids 0 to 3 belong to 1.jpg to 4.jpg; an annotation of 4 is of no image, though 4.jpg is there."""
    root = tmp_path / "src"

    def change(content):
        for number, entry in enumerate(content["images"]):
            (root / "train" / entry["file_name"]).rename(root / "train" / f"{number + 1}.jpg")
            entry.update(id=number, file_name=f"{number + 1}.jpg")

    outcome = changed(root, change)
    assert "1 of 4 annotations (25.0%) are of no image" in outcome.lines
    assert outcome.boxes["4.jpg"] == [list(BOX)]  # id 3
    assert "1.jpg" not in outcome.boxes  # of which the orphan may be


def test_a_file_whose_annotations_all_name_files_says_so(tmp_path):
    outcome = changed(
        tmp_path / "src",
        lambda c: [one.update(image_id=f"train{one['image_id']}.jpg") for one in c["annotations"]],
    )
    assert "4 annotations name their image by its file's name, not by its id" in outcome.lines
    assert outcome.boxes["train1.jpg"] == [list(BOX)]


@pytest.mark.parametrize(
    ("sizes", "boxes", "line"),
    [
        (("200.0", "120.0"), [[12, 8, 28, 20]], "1 x annotation of a larger"),
        ((199.6, 120.2), [[12, 8, 28, 20]], "1 x annotation of a larger"),
        ((60.0, 30), None, "1 x width and height do not fit"),
        (("wide", 60), [list(BOX)], f"1 x {BAD_SIZE}"),
        ((None, None), [list(BOX)], ""),
    ],
)
def test_a_size_that_is_no_plain_number_counts_too(tmp_path, sizes, boxes, line):
    outcome = changed(tmp_path / "src", lambda c: c["images"][0].update(width=sizes[0], height=sizes[1]))
    assert outcome.boxes.get("train1.jpg") == boxes
    assert line in outcome.lines


def test_a_size_of_voc_with_decimals_counts_too(tmp_path):
    xml = voc_xml(BOX).replace("<width>100</width>", "<width>200.0</width>")
    xml = xml.replace("<height>60</height>", "<height>120.0</height>")
    outcome = converted("voc", voc(tmp_path / "src", {"a": xml}))
    assert "1 x annotation of a larger" in outcome.lines


@pytest.mark.parametrize("field", ["iscrowd", "difficult"])
def test_images_with_nothing_but_left_out_objects_are_no_backgrounds(tmp_path, field):
    if field == "iscrowd":
        outcome = changed(tmp_path / "src", lambda c: c["annotations"][0].update(iscrowd=1))
        name = "train1.jpg"
    else:
        xml = voc_xml(BOX).replace("<bndbox>", "<difficult>1</difficult><bndbox>")
        outcome, name = converted("voc", voc(tmp_path / "src", {"a": xml, "b": voc_xml(BOX)})), "a.jpg"
    assert name not in outcome.boxes
    assert f"1 x {NO_OBJECT_LEFT}" in outcome.lines


def test_one_orphan_does_not_drop_all_backgrounds(tmp_path):
    def change(content):
        orphan = content["annotations"][0] | {"image_id": 999}
        content["annotations"] = [content["annotations"][0], orphan]

    outcome = changed(tmp_path / "src", change, count=22)
    assert len(outcome.boxes) == 23
    assert "21 images without annotations are kept as backgrounds" in outcome.lines


@pytest.mark.parametrize("stray", [(-2, 5, 30, 30), (0.5, 5, 30, 30)])
def test_one_stray_corner_does_not_move_the_first_pixel(tmp_path, stray):
    ends = voc_xml((50, 20, 100, 40))
    src = voc(tmp_path / "src", {"a": ends, "b": ends, "c": voc_xml(BOX), "d": voc_xml(stray)})
    outcome = converted("voc", src)
    assert outcome.boxes["c.jpg"] == [[23, 15, 56, 40]]
    assert "2 others end at their image's width or height" in outcome.lines


@pytest.mark.parametrize("name", [None, True, ["a"], {"a": 1}])
def test_a_class_name_is_text(tmp_path, name):
    outcome = changed(tmp_path / "src", lambda c: c["categories"].append({"id": 2, "name": name}))
    assert "the name of category 2 must be text" in outcome.error


def test_class_names_that_differ_by_spaces_are_the_same(tmp_path):
    outcome = changed(tmp_path / "src", lambda c: c["categories"].append({"id": 2, "name": "cat "}))
    assert outcome.error
    data = text(tmp_path / "data.yaml", "train: .\nval: .\nnames: ['thing ', thing]\n")
    with pytest.raises(UserError, match="thing given more than once"):
        read_data_yaml(data)


@pytest.mark.parametrize("names", ["!!omap [a: b, c: d]", "!!set {a, b}", "[!!binary aGVsbG8=]", "[null]"])
def test_names_of_other_kinds_are_refused(tmp_path, names):
    with pytest.raises(UserError, match="names"):
        read_data_yaml(text(tmp_path / "data.yaml", f"train: .\nval: .\nnames: {names}\n"))


def test_an_area_of_corners_is_named(tmp_path):
    def change(content):
        for one in content["annotations"]:
            one.update(bbox=[30, 20, 60, 40], area=600)

    outcome = changed(tmp_path / "src", change)
    assert "in 4 of 4 annotations without a polygon area is that of corners x1 y1 x2 y2" in outcome.lines
    outcome = changed(
        tmp_path / "good",
        lambda c: [one.update(bbox=[30, 20, 60, 40], area=2400) for one in c["annotations"]],
    )
    assert "x1 y1" not in outcome.lines


def test_one_file_in_both_splits_is_named_whatever_the_format(tmp_path):
    root = tmp_path / "src"
    coco(root)
    content = coco(root, "val", 2)
    (root / "val/val1.jpg").unlink()
    (root / "val/val1.jpg").hardlink_to(root / "train/train1.jpg")
    write_coco(root, content, "val")
    outcome = converted("coco", root)
    assert f"1 x {IN_TWO_SPLITS}" in outcome.lines
    assert "1 of 2 val images are in train too" in outcome.lines


@pytest.mark.parametrize(
    ("boxes", "expected", "line"),
    [
        ([(10, 10, 90, 40), (10, 10, 30, 40)], [[20, 10, 50, 90], [20, 10, 50, 30]], f"2 x {TURNED}"),
        ([(24, 16, 56, 80), (10, 10, 30, 40)], [[24, 16, 56, 80], [10, 10, 30, 40]], f"1 x {UNSURE}"),
    ],
)
def test_boxes_without_a_stated_size_turn_as_the_data_set_does(tmp_path, boxes, expected, line):
    root = tmp_path / "src"

    def change(content):
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            picture(root / f"train/train{number + 1}.jpg", (100, 60), 6)
            content["annotations"][number]["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            del content["images"][number]["width"], content["images"][number]["height"]

    outcome = changed(root, change)
    assert [outcome.boxes[f"train{n}.jpg"] for n in (1, 2)] == [[list(map(float, box))] for box in expected]
    assert line in outcome.lines


@pytest.mark.parametrize(
    ("row", "is_named"),
    [
        ("0 0.3125 0.3125 0.625 0.625", True),
        ("0 0.5 0.5 0.9 0.9", False),
        ("0 0.5 0.5 1 1", False),
        ("0 0.4 0.4 0.1 0.1", False),
    ],
)
def test_rows_of_corners_inside_the_image_are_named(tmp_path, row, is_named):
    for image in images(tmp_path):
        text(tmp_path / "labels/train" / f"{image.stem}.txt", f"{row}\n")
    val_split(tmp_path)
    assert ("look like corners" in started(yolo(tmp_path)).lines) == is_named


def test_labels_of_the_test_split_are_not_unread(tmp_path):
    for folder in ("images/train", "images/test"):
        for image in images(tmp_path, folder):
            text(tmp_path / "labels" / folder[7:] / f"{image.stem}.txt", ROW)
    picture(tmp_path / "images/train/background.jpg")
    val_split(tmp_path)
    data = yolo(tmp_path)
    text(data, data.read_text(encoding="utf-8") + "test: images/test\n")
    assert "label files" not in started(data).lines


def test_copies_of_val_in_train_are_named(tmp_path):
    val_split(tmp_path)
    for image in (tmp_path / "images/val").iterdir():
        target = tmp_path / "images/train" / image.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(image.read_bytes())
        text(tmp_path / "labels/train" / f"{image.stem}.txt", ROW)
    assert "2 of 2 val images have the name, size and labels of one in train" in started(yolo(tmp_path)).lines


def test_rows_with_keypoints_are_boxes(tmp_path):
    """Two keypoints without visibility have as many columns as a polygon of four points."""
    for folder in ("images/train", "images/val"):
        for image in images(tmp_path, folder):
            text(tmp_path / "labels" / folder[7:] / f"{image.stem}.txt", f"{ROW.strip()} 0.1 0.1 0.9 0.9\n")
    data = yolo(tmp_path)
    text(data, data.read_text(encoding="utf-8") + "kpt_shape: [2, 2]\n")
    outcome = started(data)
    assert "keypoints are not learned" in outcome.lines
    assert set(map(str, outcome.boxes.values())) == {str([list(BOX)])}


@pytest.mark.parametrize("shape", ["17", "[17]", "[0, 3]", "[17, 4]", "[a, 2]", "[true, 2]"])
def test_a_shape_of_keypoints_that_is_none_is_refused(tmp_path, shape):
    with pytest.raises(UserError, match=r"kpt_shape: .* given, but it must be the number of keypoints"):
        read_data_yaml(text(tmp_path / "data.yaml", f"train: .\nval: .\nnames: [a]\nkpt_shape: {shape}\n"))
