"""Names under which converted images are found again, and shapes, ids and sizes that exports state in odd ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from odd_data_sets import BOX, coco, converted, write_coco

from dsyolo.data.formats import coco as coco_format
from dsyolo.data.formats.yolo import list_images
from dsyolo.data.formats.yolo_writer import RENAMED


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
