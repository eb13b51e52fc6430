"""Sizes and first pixels that annotations state otherwise than the images: the right boxes to the pixel, or a report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, with_exif
from odd_data_sets import (
    BOX,
    HEIGHT,
    WIDTH,
    Outcome,
    coco,
    converted,
    picture,
    text,
    voc,
    voc_xml,
    write_coco,
)

from dsyolo.data.formats.data_format import Image, Object
from dsyolo.data.formats.frames import (
    OTHER_SHAPE,
    SCALED,
    SWAPPED,
    TURNED,
    MeasuredImage,
    are_of_stored,
    fit_objects,
    read_orientation,
)
from dsyolo.data.images import check_image, read_rgb

SEEN = (24.0, 16.0, 56.0, 80.0)  # in a portrait of 60 x 100, that is stored as 100 x 60


def portraits(
    root: Path, boxes: list[tuple[float, ...]], given: tuple[int, int], orientation: int = 6
) -> Outcome:
    """Convert a COCO set whose images of 100 x 60 EXIF turns, with a box an image."""
    content = coco(root, "train", len(boxes), width=given[0], height=given[1])
    coco(root, "val", 1)
    for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
        picture(root / f"train/train{number}.jpg", (100, 60), orientation)
        content["annotations"][number - 1]["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    write_coco(root, content)
    return converted("coco", root)


def test_a_portrait_with_the_sides_of_its_stored_picture_keeps_its_boxes(tmp_path):
    outcome = portraits(tmp_path / "src", [SEEN], (100, 60))
    assert outcome.boxes["train1.jpg"] == [list(SEEN)]
    assert f"1 x {SWAPPED}: " in outcome.lines
    assert "100 x 60 in the annotation, 60 x 100 in the file" in outcome.lines
    assert "corners" not in outcome.lines


def test_a_portrait_with_the_sides_that_are_seen_says_nothing(tmp_path):
    outcome = portraits(tmp_path / "src", [SEEN], (60, 100))
    assert outcome.boxes["train1.jpg"] == [list(SEEN)]
    assert "problems" not in outcome.lines


@pytest.mark.parametrize(("orientation", "expected"), [(6, [20, 10, 50, 90]), (8, [10, 10, 40, 90])])
def test_boxes_of_the_stored_picture_turn_with_it(tmp_path, orientation, expected):
    outcome = portraits(tmp_path / "src", [(10, 10, 90, 40)], (100, 60), orientation)
    assert outcome.boxes["train1.jpg"] == [expected]
    assert f"1 x {TURNED}" in outcome.lines


def test_the_data_set_decides_where_one_image_cannot(tmp_path):
    """The second box is inside both frames; the first one is of the stored picture."""
    both = (10, 10, 30, 40)
    outcome = portraits(tmp_path / "stored", [(10, 10, 90, 40), both], (100, 60))
    assert outcome.boxes["train2.jpg"] == [[20, 10, 50, 30]]
    outcome = portraits(tmp_path / "seen", [SEEN, both], (100, 60))
    assert outcome.boxes["train2.jpg"] == [list(map(float, both))]


def test_swapped_sides_without_exif_are_mended(tmp_path):
    content = coco(tmp_path / "src", width=HEIGHT, height=WIDTH)
    coco(tmp_path / "src", "val", 1)
    content["annotations"][0]["bbox"] = [50, 10, 45, 40]  # not inside 60 x 100
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert outcome.boxes["train1.jpg"] == [[50, 10, 95, 50]]
    assert outcome.boxes["train2.jpg"] == [list(BOX)]
    assert f"4 x {SWAPPED}" in outcome.lines


def test_an_image_that_was_turned_after_its_annotation_is_left_out(tmp_path):
    content = coco(tmp_path / "src", width=HEIGHT, height=WIDTH)
    coco(tmp_path / "src", "val", 1)
    content["annotations"][0]["bbox"] = [5, 50, 45, 45]  # inside 60 x 100, not inside 100 x 60
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert "train1.jpg" not in outcome.boxes
    assert f"1 x {OTHER_SHAPE}: {tmp_path / 'src/train/train1.jpg'}" in outcome.lines


@pytest.mark.parametrize("factor", [2, 3])
def test_a_copy_of_another_size_is_scaled_and_reported(tmp_path, factor):
    x1, y1, x2, y2 = BOX
    box = [factor * x1, factor * y1, factor * (x2 - x1), factor * (y2 - y1)]
    coco(tmp_path / "src", width=factor * WIDTH, height=factor * HEIGHT, bbox=box)
    coco(tmp_path / "src", "val", 1)
    outcome = converted("coco", tmp_path / "src")
    assert outcome.boxes["train1.jpg"] == [list(BOX)]
    assert f"4 x {SCALED}" in outcome.lines


@pytest.mark.parametrize("given", [(WIDTH, WIDTH), (WIDTH, HEIGHT + 20), (640, 480)])
def test_another_shape_is_left_out_and_named(tmp_path, given):
    content = coco(tmp_path / "src")
    coco(tmp_path / "src", "val", 1)
    content["images"][0] |= {"width": given[0], "height": given[1]}
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert sorted(outcome.boxes) == ["train2.jpg", "train3.jpg", "train4.jpg", "val1.jpg"]
    assert f"1 x {OTHER_SHAPE}: {tmp_path / 'src/train/train1.jpg'}" in outcome.lines
    assert f"{given[0]} x {given[1]} in the annotation, {WIDTH} x {HEIGHT} in the file" in outcome.lines


def test_all_of_another_shape_is_an_error(tmp_path):
    coco(tmp_path / "src", width=WIDTH, height=WIDTH)
    coco(tmp_path / "src", "val", 1)
    outcome = converted("coco", tmp_path / "src")
    assert "train: no image can be used" in outcome.error
    assert OTHER_SHAPE in outcome.error


def test_sides_as_text_and_missing_ones(tmp_path):
    content = coco(tmp_path / "src", width=str(2 * WIDTH), height=str(2 * HEIGHT))
    coco(tmp_path / "src", "val", 1)
    for key in ("width", "height"):
        del content["images"][1][key]
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert outcome.boxes["train1.jpg"] == [[side / 2 for side in BOX]]
    assert outcome.boxes["train2.jpg"] == [list(BOX)]


def test_voc_sizes_are_checked_too(tmp_path):
    src = voc(
        tmp_path / "src",
        {
            "good": voc_xml(BOX),
            "swapped": voc_xml(BOX, size=(HEIGHT, WIDTH)),
            "other": voc_xml(BOX, size=(90, 90)),
        },
        {"v": voc_xml((0, 0, 9, 9))},
    )
    outcome = converted("voc", src)
    assert outcome.boxes["good.jpg"] == outcome.boxes["swapped.jpg"] == [list(BOX)]
    assert "other.jpg" not in outcome.boxes
    assert SWAPPED in outcome.lines
    assert OTHER_SHAPE in outcome.lines


# ---- the first pixel of VOC


def test_the_first_pixel_is_decided_once_for_all_splits(tmp_path):
    """A 0 in val shows that train counts from 0 as well."""
    src = voc(tmp_path / "zero", {"a": voc_xml(BOX)}, {"v": voc_xml((0, 5, 10, 10))})
    outcome = converted("voc", src)
    assert outcome.boxes == {"a.jpg": [list(BOX)], "v.jpg": [[0, 5, 10, 10]]}
    assert "with 0 as the first pixel" in outcome.lines
    assert "v.xml object 1 has a corner at 0" in outcome.lines


def test_without_a_0_voc_counts_from_1_and_says_so(tmp_path):
    src = voc(tmp_path / "one", {"a": voc_xml(BOX)}, {"v": voc_xml((1, 5, 10, 10))})
    outcome = converted("voc", src)
    assert outcome.boxes == {"a.jpg": [[23, 15, 56, 40]], "v.jpg": [[0, 4, 10, 10]]}
    assert "boxes are taken to count pixels from 1" in outcome.lines


def test_two_years_of_voc_have_one_first_pixel(tmp_path):
    voc(tmp_path / "kit/VOC2007", {"a": voc_xml(BOX)}, {"v": voc_xml(BOX)})
    voc(tmp_path / "kit/VOC2012", {"b": voc_xml((0, 0, 10, 10))}, {"w": voc_xml(BOX)})
    outcome = converted("voc", tmp_path / "kit")
    assert outcome.boxes["VOC2007_a.jpg"] == [list(BOX)]


# ---- where files come from


@pytest.mark.parametrize(
    "name",
    [
        "train\\train{}.jpg",
        "C:\\Users\\me\\train\\train{}.jpg",
        "/home/me/data/train{}.jpg",
        "/data/local-files/?d=train/train{}.jpg",
        "train{}.JPG",
        "./train{}.jpg",
    ],
)
def test_names_of_other_machines_find_the_file(tmp_path, name):
    content = coco(tmp_path / "src")
    coco(tmp_path / "src", "val", 1)
    for number, entry in enumerate(content["images"], 1):
        entry["file_name"] = name.format(number)
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert [outcome.boxes[f"train{n}.jpg"] for n in range(1, 5)] == [[list(BOX)]] * 4


def test_names_that_lead_to_one_file_are_left_out(tmp_path):
    content = coco(tmp_path / "src")
    coco(tmp_path / "src", "val", 1)
    content["images"][0]["file_name"] = "a/train2.jpg"
    write_coco(tmp_path / "src", content)
    outcome = converted("coco", tmp_path / "src")
    assert sorted(outcome.boxes) == ["train3.jpg", "train4.jpg", "val1.jpg"]
    assert "1 x several entries lead to this file (left out)" in outcome.lines


# ---- frames alone


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["box", "polygon"])
def test_every_orientation_moves_a_mark_to_where_it_is_seen(tmp_path, orientation, kind):
    """A white mark in the stored picture is found by its turned box in the picture as training reads it."""
    stored = np.zeros((60, 100, 3), np.uint8)
    stored[8:24, 64:88] = 255
    path = tmp_path / "a.jpg"
    content = encoded(stored)
    path.write_bytes(with_exif(content, orientation) if orientation > 1 else content)
    size_hw = check_image(path)[0]
    assert size_hw is not None
    polygon = np.array([[64, 8], [88, 8], [88, 24], [64, 24]]) if kind == "polygon" else None
    mark = Object("cat", (64.0, 8.0, 88.0, 24.0), polygon)
    far = Object("cat", (0.0, 0.0, 99.0, 5.0))  # shows that boxes are of the stored picture
    measured = MeasuredImage(
        Image(path, "a.jpg", [mark, far], (60, 100)), size_hw, read_orientation(path, size_hw)
    )
    assert measured.orientation == orientation
    fitted = fit_objects(measured, of_stored=True)
    assert fitted.reason == (TURNED if orientation > 1 else "")
    x1, y1, x2, y2 = map(int, fitted.objects[0].box_xyxy)
    seen = read_rgb(path, size_hw, 100)
    assert seen is not None
    assert seen[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 200
    assert (seen > 128).all(-1).sum() == pytest.approx((x2 - x1) * (y2 - y1), rel=0.05)
    if polygon is not None:
        moved = fitted.objects[0].polygon
        assert [*moved.min(0), *moved.max(0)] == [x1, y1, x2, y2]


def test_votes_of_a_data_set():
    def portrait(box) -> MeasuredImage:
        return MeasuredImage(Image(Path("x"), "x", [Object("cat", box)], (60, 100)), (100, 60), 6)

    seen, stored, both = portrait(SEEN), portrait((10, 10, 90, 40)), portrait((1, 1, 9, 9))
    assert are_of_stored([seen, stored, stored, both])
    assert not are_of_stored([seen, seen, stored])
    assert not are_of_stored([both])


def test_rounded_sides_of_a_thumbnail_fit():
    image = Image(Path("x"), "x", [Object("cat", (10, 10, 20, 20))], (48, 64))
    fitted = fit_objects(MeasuredImage(image, (3001, 4000), 1), of_stored=False)
    assert fitted.reason == SCALED
    np.testing.assert_allclose(fitted.objects[0].box_xyxy, [625, 10 * 3001 / 48, 1250, 20 * 3001 / 48])


def test_a_voc_list_of_another_encoding_is_named(tmp_path):
    src = voc(tmp_path / "src", {"a": voc_xml(BOX)})
    text(src / "ImageSets/Main/train.txt", "\xe4\n", "latin-1")
    assert "train.txt cannot be read" in converted("voc", src).error
    text(src / "ImageSets/Main/train.txt", "a\r\n", "utf-8-sig")
    assert converted("voc", src).boxes["a.jpg"]
