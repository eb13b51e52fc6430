"""Augmentation: pure in the generator, and labels that stay on their pixels."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsyolo.base.batch import Sample
from dsyolo.config.recipe import Recipe, preset
from dsyolo.data.transforms import augment, copy_paste, flip, hsv, mixup, mosaic4
from dsyolo.data.warp import View, clip_labels, crop, draw_view, survives
from dsyolo.detection.boxes import PAD_GREY, letterbox

SIZE = 96


def replace(recipe: Recipe, **changed: float) -> Recipe:
    return recipe.model_copy(update=changed)


NOTHING = replace(preset("low"), hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)
LOW = replace(preset("low"), flipud=0.5)
EVERYTHING = replace(
    LOW, degrees=20, shear=5, perspective=0.0005, scale=0.9, mixup=0.5, mosaic=0.8, copy_paste=0.5
)
# Colours that nothing else has, so that a box can be found again by its colour; HSV is off there.
COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)


def square(box: tuple[float, float, float, float]) -> np.ndarray:
    x0, y0, x1, y1 = box
    return np.float32([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def painted(
    width: int,
    height: int,
    boxes: list[tuple[int, int, int, int]],
    colours: list[int],
    *,
    polygons: bool = False,
) -> Sample:
    """A dull image with filled rectangles; class k has COLOURS[k]."""
    image = np.full((height, width, 3), 60, np.uint8)
    for (x0, y0, x1, y1), colour in zip(boxes, colours, strict=True):
        image[y0:y1, x0:x1] = COLOURS[colour]
    return Sample(
        image,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(colours, np.int64),
        tuple(square(box) for box in boxes) if polygons else (),
    )


def unlabelled(image: np.ndarray) -> Sample:
    return Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


def noisy_load(index: int, long_side_px: int, *, polygons: bool = False) -> Sample:
    """Image `index` of an endless set: noise, with 0 to 4 boxes."""
    rng = np.random.default_rng((7, index))
    short = long_side_px * int(rng.integers(4, 9)) // 8
    shape = (short, long_side_px) if rng.random() < 0.5 else (long_side_px, short)
    corners = rng.random((index % 5, 2, 2)) * (shape[1], shape[0])
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    outlines = tuple(square(box) if i % 2 else None for i, box in enumerate(boxes)) if polygons else ()
    return Sample(
        rng.integers(0, 256, (*shape, 3), dtype=np.uint8), boxes, rng.integers(0, 9, len(boxes)), outlines
    )


def polygon_load(index: int, long_side_px: int) -> Sample:
    return noisy_load(index, long_side_px, polygons=True)


def found(image: np.ndarray, colour: int) -> np.ndarray | None:
    """The bounds of a colour's pixels, in the convention that pixel i spans [i, i + 1]."""
    distance = np.abs(image.astype(int) - COLOURS[colour].astype(int)).max(axis=2)
    ys, xs = (distance < 100).nonzero()  # a pixel that is mostly of that colour
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(xs) else None


def assert_boxes_on_colours(sample: Sample, tolerance_px: float) -> None:
    for box, colour in zip(sample.boxes_xyxy, sample.classes, strict=True):
        seen = found(sample.image, int(colour))
        assert seen is not None, f"box {box}, but none of its pixels"
        assert np.abs(seen - box).max() <= tolerance_px, f"box {box}, its pixels {seen}"


def assert_sound(sample: Sample, size_px: int) -> None:
    """Check what every returned sample promises."""
    assert sample.image.shape == (size_px, size_px, 3)
    assert sample.image.dtype == np.uint8
    assert sample.image.flags.c_contiguous
    assert sample.boxes_xyxy.dtype == np.float32
    assert sample.boxes_xyxy.shape == (len(sample.classes), 4)
    assert sample.classes.dtype == np.int64
    assert len(sample.polygons) in (0, len(sample.classes))
    assert (sample.boxes_xyxy >= 0).all()
    assert (sample.boxes_xyxy <= size_px).all()
    for polygon in sample.polygons:
        if polygon is not None:
            assert polygon.dtype == np.float32
            assert polygon.min() >= 0
            assert polygon.max() <= size_px


def all_bytes(sample: Sample) -> tuple[bytes, ...]:
    polygons = (b"-" if p is None else p.tobytes() for p in sample.polygons)
    return (sample.image.tobytes(), sample.boxes_xyxy.tobytes(), sample.classes.tobytes(), *polygons)


# The whole


@pytest.mark.parametrize("how", [LOW, EVERYTHING])
def test_a_sample_is_a_function_of_the_generator(how: Recipe) -> None:

    def epoch(number: int, indices: range) -> list[Sample]:
        return [
            augment(polygon_load, i, 40, SIZE, np.random.default_rng((0, number, i)), how) for i in indices
        ]

    first = epoch(3, range(20))
    np.random.default_rng().random()
    np.random.seed(5)  # no draw may come from the global state
    again = epoch(3, range(19, -1, -1))
    assert [all_bytes(s) for s in first] == [all_bytes(s) for s in again[::-1]]
    other = epoch(4, range(20))
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(first, other, strict=True))


def test_another_process_gives_the_same_bytes() -> None:
    program = (
        "import hashlib, numpy as np, test_transforms as t\n"
        "s = t.augment(t.polygon_load, 3, 40, 96, np.random.default_rng((0, 1, 3)), t.EVERYTHING)\n"
        "print(hashlib.sha256(b''.join(t.all_bytes(s))).hexdigest())"
    )
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": here, "PYTHONHASHSEED": "99"}
    digest = subprocess.check_output([sys.executable, "-c", program], env=env, text=True).strip()
    sample = augment(polygon_load, 3, 40, 96, np.random.default_rng((0, 1, 3)), EVERYTHING)
    assert digest == hashlib.sha256(b"".join(all_bytes(sample))).hexdigest()


@pytest.mark.parametrize("how", [LOW, EVERYTHING])
def test_loaded_samples_are_never_written_to(how: Recipe) -> None:
    kept = {i: polygon_load(i, SIZE) for i in range(8)}
    before = {i: all_bytes(sample) for i, sample in kept.items()}

    def load(index: int, long_side_px: int) -> Sample:
        sample = kept[index]
        for array in (sample.image, sample.boxes_xyxy, sample.classes, *sample.polygons):
            if array is not None:
                array.flags.writeable = False
        return sample

    for i in range(40):
        out = augment(load, i % 8, 8, SIZE, np.random.default_rng(i), how)
        assert not any(np.shares_memory(out.image, sample.image) for sample in kept.values())
    assert before == {i: all_bytes(sample) for i, sample in kept.items()}


@pytest.mark.parametrize("shape", [(60, 96), (96, 61), (96, 96), (1, 96)])
def test_nothing_at_all_is_the_letterboxed_image(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    boxes = np.float32([[0, 0, 1, 1], [0.25, 0.5, 0.5, 0.75]])  # the second would not survive a crop
    sample = augment(
        lambda index, long_side_px: Sample(image, boxes, np.array([1, 2])),
        0,
        1,
        96,
        np.random.default_rng(0),
        NOTHING,
    )
    expected, scale, (left, top) = letterbox(image, (96, 96))
    assert scale == 1
    assert np.array_equal(sample.image, expected)
    assert np.array_equal(sample.boxes_xyxy, boxes + np.float32((left, top, left, top)))
    assert sample.classes.tolist() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size_px=st.sampled_from([32, 64, 97, 128]),
    scale=st.floats(0, 0.95),
    translate=st.floats(0, 0.9),
    degrees=st.sampled_from([0.0, 0.0, 30.0, 180.0]),
    perspective=st.sampled_from([0.0, 0.0, 0.001]),
    mosaic=st.sampled_from([0.0, 1.0]),
    polygons=st.booleans(),
)
def test_every_sample_is_sound(
    seed, size_px, scale, translate, degrees, perspective, mosaic, polygons
) -> None:
    how = replace(EVERYTHING, mosaic=mosaic, scale=scale, translate=translate, perspective=perspective)
    how = replace(how, degrees=degrees, shear=degrees / 10)
    sample = augment(
        polygon_load if polygons else noisy_load, seed % 40, 40, size_px, np.random.default_rng(seed), how
    )
    assert_sound(sample, size_px)
    if mosaic:
        assert (sample.boxes_xyxy[:, 2:] - sample.boxes_xyxy[:, :2] > 2 - 1e-4).all()


def test_images_without_labels_go_through() -> None:
    def load(index: int, long_side_px: int) -> Sample:
        return painted(long_side_px, long_side_px // 2, [], [])

    for i in range(10):
        sample = augment(load, 0, 1, SIZE, np.random.default_rng(i), EVERYTHING)
        assert_sound(sample, SIZE)
        assert len(sample.classes) == 0


@pytest.mark.parametrize("how", [LOW, replace(LOW, degrees=45), replace(LOW, scale=0.9, mosaic=0)])
def test_boxes_follow_the_pixels_through_everything(how: Recipe) -> None:
    """One colour per image; the box of what is left is exact for what only scales, a bound for what turns."""
    how = replace(how, hsv_h=0, hsv_s=0, hsv_v=0)
    num_boxes = 0
    for i in range(60):
        rng = np.random.default_rng(i)
        corners = rng.integers(0, 60, (4, 2))
        sizes = rng.integers(30, 60, (4, 2))

        def load(index: int, long_side_px: int, corners=corners, sizes=sizes) -> Sample:
            (x0, y0), (w, h) = corners[index], sizes[index]
            return painted(
                128, 120, [(x0, y0, x0 + w, min(y0 + h, 120))], [index], polygons=bool(how.degrees)
            )

        # The mosaic's others are drawn: a class that is there twice cannot be told apart by its colour.
        sample = augment(load, i % 4, 4, 128, np.random.default_rng(i), how)
        once = np.bincount(sample.classes, minlength=4)[sample.classes] == 1
        twice_drawn = np.array([_num_blobs(sample.image, int(c)) > 1 for c in sample.classes], bool)
        kept = once & ~twice_drawn
        assert_boxes_on_colours(
            Sample(sample.image, sample.boxes_xyxy[kept], sample.classes[kept]),
            tolerance_px=3 if how.degrees else 1,  # a turned edge ends in a wedge thinner than a pixel
        )
        num_boxes += int(kept.sum())
    assert num_boxes > 50


def _num_blobs(image: np.ndarray, colour: int) -> int:
    mask = (np.abs(image.astype(int) - COLOURS[colour].astype(int)).max(axis=2) < 100).astype(np.uint8)
    return cv2.connectedComponents(mask)[0] - 1


# Mosaic


def grey_load(index: int, long_side_px: int) -> Sample:
    """Image k is flat 10 * (k + 1), wide where k is even; its label is the whole of it."""
    width, height = (long_side_px, long_side_px // 2) if index % 2 == 0 else (long_side_px // 2, long_side_px)
    return Sample(
        np.full((height, width, 3), 10 * (index + 1), np.uint8),
        np.float32([[0, 0, width, height]]),
        np.array([index]),
    )


def test_mosaic_places_four_images_around_its_centre() -> None:
    sample = mosaic4(grey_load, (0, 1, 2, 3), (70, 60), 64, (0, 0, 128, 128))
    assert sample.image.shape == (128, 128, 3)
    expected = np.full((128, 128), PAD_GREY)
    boxes = [(6, 28, 70, 60), (70, 0, 102, 60), (6, 60, 70, 92), (70, 60, 102, 124)]
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        expected[y0:y1, x0:x1] = 10 * (k + 1)
    assert (sample.image == expected[:, :, None]).all()
    assert sample.boxes_xyxy.tolist() == [
        list(box) for box in boxes
    ]  # the second lost 4 px at the canvas' top
    assert sample.classes.tolist() == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(
    centre=st.tuples(st.integers(32, 96), st.integers(32, 96)),
    x=st.tuples(st.integers(0, 128), st.integers(0, 128)),
    y=st.tuples(st.integers(0, 128), st.integers(0, 128)),
)
def test_a_part_of_a_mosaic_is_a_part_of_the_whole(centre, x, y) -> None:
    assume(x[0] != x[1] and y[0] != y[1])
    x0, y0, x1, y1 = shown = (min(x), min(y), max(x), max(y))
    whole = mosaic4(polygon_load, (4, 8, 13, 3), centre, 64, (0, 0, 128, 128))
    part = mosaic4(polygon_load, (4, 8, 13, 3), centre, 64, shown)
    assert np.array_equal(part.image, whole.image[y0:y1, x0:x1])
    boxes = (whole.boxes_xyxy - (x0, y0, x0, y0)).astype(np.float32)
    shifted = {(*box, k) for box, k in zip(boxes, whole.classes.tolist(), strict=True)}
    size = (x1 - x0, y1 - y0)
    is_seen = (boxes[:, :2] < size).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    seen = {(*boxes[i], int(whole.classes[i])) for i in is_seen.nonzero()[0]}
    got = {(*box, k) for box, k in zip(part.boxes_xyxy, part.classes.tolist(), strict=True)}
    assert seen <= got <= shifted


def test_images_that_a_crop_does_not_show_are_not_loaded() -> None:
    loaded = []

    def load(index: int, long_side_px: int) -> Sample:
        loaded.append(index)
        return grey_load(index, long_side_px)

    mosaic4(load, (0, 1, 2, 3), (70, 60), 64, (70, 0, 128, 61))
    assert loaded == [1, 3]


def test_mosaic_centres_and_partners_are_drawn_from_their_whole_range() -> None:
    """Seen from outside, by the corners at which the four flat images meet, and which images they are."""
    how = replace(NOTHING, mosaic=1.0)
    loaded, centres = set(), []

    def load(index: int, long_side_px: int) -> Sample:
        loaded.add(index)
        assert long_side_px == 32
        return unlabelled(np.full((32, 32, 3), index, np.uint8))

    for i in range(300):
        image = augment(load, 6, 6, 32, np.random.default_rng(i), how).image[:, :, 0]
        # Index 6 is drawn by nobody, and lies top left: what shows of it ends at the centre.
        ys, xs = (image == 6).nonzero()
        centres.append((xs.max() + 1 if len(xs) else 0, ys.max() + 1 if len(ys) else 0))
    assert loaded == set(range(7))
    centres = np.array(centres)
    assert centres.min() == 0
    assert centres.max() == 32
    inner = centres[(centres > 0).all(axis=1)]
    assert abs(inner.mean() - 16.5) < 1.5


# The crop


def test_survival_thresholds_are_exact() -> None:
    def one(box, area, min_kept=0.1) -> bool:
        return bool(survives(np.float32([box]), np.float32([area]), np.array([min_kept]))[0])

    assert not one((0, 0, 2, 50), 100)
    assert one((0, 0, 2.01, 50), 100)
    assert not one((0, 0, 50, 2), 100)
    assert one((0, 0, 50, 2.01), 100)
    assert not one((0, 0, 10, 10), 1000)
    assert one((0, 0, 10, 10), 999)
    assert not one((0, 0, 10, 10), 10000, 0.01)
    assert one((0, 0, 10, 10), 9999, 0.01)
    assert not one((0, 0, 400, 4), 1600)
    assert one((0, 0, 399, 4), 1600)
    assert not one((0, 0, 4, 400), 1600)
    assert one((0, 0, 4, 399), 1600)
    assert not one((5, 5, 5, 5), 0)


def shifting_view(x: int, y: int, size_px: int = 100) -> View:
    """Shows the square at (x, y) of a large canvas, pixel for pixel."""
    matrix = np.array([[1, 0, -x], [0, 1, -y], [0, 0, 1.0]])
    return View(matrix, 1.0, (x, y, x + size_px, y + size_px), (0, 0, size_px, size_px))


@pytest.mark.parametrize(
    ("polygons", "cut_px", "lives"), [(0, 90, 0), (0, 89, 1), (1, 90, 1), (1, 98, 0), (1, 97, 1)]
)
def test_a_box_lives_on_by_the_share_of_it_that_is_left(polygons: int, cut_px: int, lives: int) -> None:
    box = np.float32([[100 - cut_px, 110, 200 - cut_px, 150]]) - 100  # in the shown part's pixels; 100 x 40
    outline = (square(box[0]),) if polygons else ()
    shown = Sample(np.zeros((100, 100, 3), np.uint8), box, np.array([3]), outline)
    out = crop(shown, shifting_view(100, 100), 100)
    assert len(out.classes) == lives
    if lives:
        assert out.boxes_xyxy.tolist() == [[0, 10, 100 - cut_px, 50]]


def test_the_area_kept_is_compared_at_the_new_scale() -> None:
    """Shrunk to a quarter of its area, a whole box has kept all of it."""
    sample = painted(400, 400, [(100, 100, 160, 160)], [0])
    view = View(np.diag([0.25, 0.25, 1]), 1 / 16, (0, 0, 400, 400), (0, 0, 100, 100))
    assert crop(sample, view, 100).boxes_xyxy.tolist() == [[25, 25, 40, 40]]


@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize(
    "gains",
    [
        {"scale": 0.5, "translate": 0.2},
        {"scale": 0.9, "translate": 0.3},
        {"degrees": 1e-9, "scale": 0.5, "translate": 0.2},
        {"degrees": 1e-9, "perspective": 1e-12, "scale": 0.5, "translate": 0.2},
    ],
)
def test_boxes_are_where_their_pixels_are_after_a_crop(gains: dict[str, float], polygons: bool) -> None:
    boxes = [(20, 30, 90, 80), (100, 110, 180, 150), (30, 120, 70, 180), (130, 20, 170, 95)]
    canvas = painted(200, 200, boxes, [0, 1, 2, 3], polygons=polygons)
    num_boxes = 0
    for i in range(30):
        view = draw_view(200, 100, np.random.default_rng(i), replace(NOTHING, **gains))
        x0, y0, x1, y1 = view.source
        shift = np.float32([x0, y0])
        part = canvas._replace(
            image=canvas.image[y0:y1, x0:x1],
            boxes_xyxy=canvas.boxes_xyxy - np.tile(shift, 2),
            polygons=tuple(p - shift for p in canvas.polygons),
        )
        out = crop(part, view, 100)
        assert_sound(out, 100)
        assert_boxes_on_colours(out, 1.0)
        num_boxes += len(out.classes)
    assert num_boxes > 40


@pytest.mark.parametrize("gains", [{"degrees": 45}, {"shear": 15}, {"degrees": 45, "perspective": 0.001}])
def test_a_polygon_gives_tight_boxes_where_corners_cannot(gains: dict[str, float]) -> None:
    """A disc: the bounds of its polygon are those of its pixels, the bounds of its box's corners are not."""
    image = np.full((200, 200, 3), 60, np.uint8)
    cv2.circle(image, (99, 99), 40, COLOURS[0].tolist(), -1)
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    outline = (99.5 + 40.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)).astype(np.float32)
    box = np.float32([[59, 59, 140, 140]])
    slack = []
    for i in range(10):
        view = draw_view(200, 200, np.random.default_rng(i), replace(NOTHING, **gains))
        x0, y0, x1, y1 = view.source
        shift = np.float32([x0, y0])
        part = Sample(image[y0:y1, x0:x1], box - np.tile(shift, 2), np.array([0]), (outline - shift,))
        assert_boxes_on_colours(crop(part, view, 200), 1.5)
        corners = crop(part._replace(polygons=()), view, 200)
        slack.append(np.abs(corners.boxes_xyxy[0] - found(corners.image, 0)).max())
    assert max(slack) > 3


def test_what_lies_outside_the_canvas_is_grey() -> None:
    canvas = unlabelled(np.zeros((200, 200, 3), np.uint8))
    for gains in ({"scale": 0.9}, {"scale": 0.9, "degrees": 1e-9}):
        for i in range(200):
            view = draw_view(200, 100, np.random.default_rng(i), replace(NOTHING, **gains))
            if view.area_scale < 0.2**2:
                break
        x0, y0, x1, y1 = view.source
        out = crop(canvas._replace(image=canvas.image[y0:y1, x0:x1]), view, 100).image
        for edge in (out[:25], out[-25:], out[:, :25], out[:, -25:]):
            assert (edge == PAD_GREY).all()
        assert (out[45:55, 45:55] == 0).all()


def test_resizing_and_warping_give_the_same_picture() -> None:
    """The canvas is smooth, so that only the snapping to whole pixels tells them apart."""
    y, x = np.mgrid[:200, :200]
    image = np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)
    empty = unlabelled(image)
    for i in range(20):
        pictures = []
        for degrees in (0, 1e-9):
            view = draw_view(
                200,
                100,
                np.random.default_rng(i),
                replace(NOTHING, scale=0.4, translate=0.05, degrees=degrees),
            )
            x0, y0, x1, y1 = view.source
            pictures.append(crop(empty._replace(image=image[y0:y1, x0:x1]), view, 100).image.astype(int))
        assert np.abs(pictures[0] - pictures[1]).max() <= 3


def test_warping_takes_the_middles_of_pixels() -> None:
    """At half the size every output pixel lies between two by two pixels: stripes become their mean."""
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::2] = 200
    view = View(np.diag([0.5, 0.5, 1]), 0.25, (0, 0, 40, 40), None)
    assert (crop(unlabelled(stripes), view, 20).image == 100).all()


def test_views_are_drawn_from_their_ranges() -> None:
    scales, moves = [], []
    for i in range(400):
        view = draw_view(2000, 1000, np.random.default_rng(i), replace(NOTHING, scale=0.5, translate=0.1))
        scales.append(view.matrix[0, 0])
        moves.append(view.matrix[:2] @ (1000, 1000, 1))
        assert np.isclose(view.matrix[0, 0], view.matrix[1, 1], rtol=2e-3)
    assert 0.5 <= min(scales) < 0.52
    assert 1.48 < max(scales) <= 1.501
    moves = np.array(moves)
    assert 398 <= moves.min() < 410
    assert 590 < moves.max() <= 602


@settings(max_examples=100, deadline=None)
@given(points=st.lists(st.tuples(st.integers(-50, 150), st.integers(-50, 150)), min_size=3, max_size=8))
def test_clipped_polygons_keep_the_area_that_is_inside(points: list[tuple[int, int]]) -> None:
    hull = cv2.convexHull(
        np.float32(points)
    )  # convex, so that OpenCV can tell what it shares with the square
    assume(len(hull) > 2 and cv2.contourArea(hull) > 1)
    area, _ = cv2.intersectConvexConvex(hull, square((0, 0, 100, 100))[:, None])
    polygon = hull[:, 0]
    box = np.float32([[*polygon.min(axis=0), *polygon.max(axis=0)]])
    boxes, (clipped,) = clip_labels(box, (polygon,), 100)
    assert boxes.min() >= 0
    assert boxes.max() <= 100
    if len(clipped):
        assert clipped.min() >= 0
        assert clipped.max() <= 100
        assert cv2.contourArea(clipped) == pytest.approx(area, rel=1e-2, abs=0.5)
        assert np.allclose(boxes[0], [*clipped.min(axis=0), *clipped.max(axis=0)])
    else:
        assert area == pytest.approx(0, abs=0.5)


# Copy-paste


def test_copy_paste_mirrors_objects_with_polygons_only() -> None:
    sample = painted(100, 80, [(10, 10, 30, 40), (5, 50, 25, 70)], [0, 1], polygons=True)
    sample = sample._replace(polygons=(sample.polygons[0], None))
    out = copy_paste(sample, np.random.default_rng(0), 1.0)
    assert out.classes.tolist() == [0, 1, 0]
    assert out.boxes_xyxy.tolist() == [[10, 10, 30, 40], [5, 50, 25, 70], [70, 10, 90, 40]]
    assert out.polygons[1] is None
    assert len(out.polygons) == 3
    pasted = found(out.image[:, 50:], 0)
    assert np.abs(pasted - (20, 10, 40, 40)).max() <= 1
    assert np.array_equal(out.image[:, :50], sample.image[:, :50])
    assert found(out.image[:, 50:], 1) is None


def test_copy_paste_without_polygons_or_by_probability_zero_changes_nothing() -> None:
    bare = painted(100, 80, [(10, 10, 30, 40)], [0])
    assert all_bytes(copy_paste(bare, np.random.default_rng(0), 1.0)) == all_bytes(bare)
    outlined = painted(100, 80, [(10, 10, 30, 40)], [0], polygons=True)
    assert all_bytes(copy_paste(outlined, np.random.default_rng(0), 0.0)) == all_bytes(outlined)


@pytest.mark.parametrize(("width_px", "is_pasted"), [(6, True), (7, False)])
def test_copy_paste_covers_at_most_30_percent_of_a_box(width_px: int, is_pasted: bool) -> None:
    """The copy lands on (100 - x1, 100 - x0) and covers `width_px` of the other box's 20 px."""
    sample = painted(
        100, 50, [(80, 10, 100, 40), (20 - width_px, 10, 40 - width_px, 40)], [0, 1], polygons=True
    )
    sample = sample._replace(polygons=(sample.polygons[0], None))
    out = copy_paste(sample, np.random.default_rng(0), 1.0)
    assert len(out.classes) == 2 + is_pasted
    assert (found(out.image[:, :20], 0) is not None) == is_pasted


def test_copy_paste_draws_the_share_that_was_asked_for() -> None:
    boxes = [(2 * i, 2 * i, 2 * i + 2, 2 * i + 2) for i in range(20)]
    sample = painted(200, 200, boxes, [0] * 20, polygons=True)
    counts = [len(copy_paste(sample, np.random.default_rng(i), 0.3).classes) - 20 for i in range(100)]
    assert 5 < np.mean(counts) < 7


# Mixup, HSV, flips


def test_mixup_weighs_the_images_and_keeps_both_label_sets() -> None:
    first = painted(20, 10, [(1, 1, 5, 5)], [0], polygons=True)._replace(
        image=np.full((10, 20, 3), 200, np.uint8)
    )
    second = painted(20, 10, [(2, 2, 9, 9), (3, 3, 8, 8)], [1, 2])._replace(
        image=np.full((10, 20, 3), 100, np.uint8)
    )
    out = mixup(first, second, 0.3)
    assert (out.image == 130).all()
    assert out.boxes_xyxy.tolist() == [[1, 1, 5, 5], [2, 2, 9, 9], [3, 3, 8, 8]]
    assert out.classes.tolist() == [0, 1, 2]
    assert out.polygons[1:] == (None, None)
    assert np.array_equal(out.polygons[0], first.polygons[0])


def test_mixup_ratios_in_samples_are_those_of_beta_32_32() -> None:
    """Image 0 alone is white, and only mosaics whose all four tiles are flat remain flat."""

    def load(index: int, long_side_px: int) -> Sample:
        value = 255 if index == 1 else 0
        return unlabelled(np.full((32, 32, 3), value, np.uint8))

    ratios = []
    for i in range(400):
        # The sample's own image is white (index 1), all others are drawn from image 0 alone.
        image = augment(
            load, 1, 1, 32, np.random.default_rng(i), replace(NOTHING, mosaic=1.0, mixup=1.0)
        ).image
        values = set(np.unique(image)) - {0, 57}
        ratios += [value / 255 for value in values if 60 <= value < 200 and value != PAD_GREY]
    ratios = np.array(ratios)
    assert len(ratios) > 100
    assert abs(ratios.mean() - 0.5) < 0.03  # the standard deviation of Beta(32, 32) is 0.062
    assert 0.04 < ratios.std() < 0.09


def test_hsv_with_gain_zero_is_identical_and_otherwise_scales() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert hsv(image, (1.0, 1.0, 1.0)) is image
    before = image.copy()
    dark = hsv(image, (1.0, 1.0, 0.5))
    assert np.array_equal(image, before)
    assert dark.dtype == np.uint8
    assert dark.shape == image.shape
    assert dark.flags.c_contiguous
    assert np.abs(dark.max(axis=2).astype(int) - image.max(axis=2) // 2).max() <= 1
    grey = hsv(image, (1.0, 0.0, 1.0))
    assert np.array_equal(grey, np.repeat(image.max(axis=2, keepdims=True), 3, axis=2))
    bright = hsv(image, (1.0, 1.0, 3.0))
    assert bright[image.max(axis=2) > 85].max(axis=1).min() == 255  # clipped, not wrapped
    red = np.uint8([[[0, 0, 255]]])  # hue 240 degrees; times 1.5 it is 0 again: red
    assert hsv(red, (1.5, 1.0, 1.0)).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize(("left_right", "up_down"), [(True, False), (False, True), (True, True)])
def test_flips_mirror_boxes_with_their_pixels_and_undo_themselves(left_right: bool, up_down: bool) -> None:
    sample = painted(50, 40, [(3, 5, 20, 12), (30, 20, 44, 39)], [0, 1], polygons=True)
    once = flip(sample, left_right=left_right, up_down=up_down)
    assert_boxes_on_colours(once, 0)
    for box, polygon in zip(once.boxes_xyxy, once.polygons, strict=True):
        assert box.tolist() == [*polygon.min(axis=0), *polygon.max(axis=0)]
    assert not np.array_equal(once.image, sample.image)
    assert once.image.flags.c_contiguous
    assert all_bytes(flip(once, left_right=left_right, up_down=up_down)) == all_bytes(sample)


def test_no_flip_is_the_sample_itself() -> None:
    sample = painted(50, 40, [(3, 5, 20, 12)], [0])
    assert flip(sample, left_right=False, up_down=False) is sample
