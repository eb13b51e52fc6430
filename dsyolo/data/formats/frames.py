"""Fits an annotation's width and height to the decoded image, so that no box is scaled in silence.

Tools disagree about phone portraits, which EXIF turns: some write the sides of the picture as it is stored, some as it
is seen, and their boxes may be of either.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PillowImage

from dsyolo.data.formats.data_format import Image, Object

SCALED = "annotation of a larger or smaller copy of the image (boxes scaled)"
SWAPPED = "width and height are swapped in the annotation (boxes kept as the image is seen)"
TURNED = "boxes of the image before its EXIF rotation (turned with it)"
UNSURE = "EXIF turns the image, whose size is not in its annotation (boxes kept as the image is seen)"
OTHER_SHAPE = "width and height do not fit the image (image left out)"
_ROUNDING_PX = 1.0
_EXIF_ORIENTATION = 0x0112

_Size = tuple[int, int]
# Points (N, 2) of the picture as stored, whose width and height follow, to where they are seen. By EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray, float, float], np.ndarray]] = {
    1: lambda xy, w, h: xy,
    2: lambda xy, w, h: np.stack([w - xy[:, 0], xy[:, 1]], 1),
    3: lambda xy, w, h: np.array([w, h]) - xy,
    4: lambda xy, w, h: np.stack([xy[:, 0], h - xy[:, 1]], 1),
    5: lambda xy, w, h: xy[:, ::-1],
    6: lambda xy, w, h: np.stack([h - xy[:, 1], xy[:, 0]], 1),
    7: lambda xy, w, h: np.array([h, w]) - xy[:, ::-1],
    8: lambda xy, w, h: np.stack([xy[:, 1], w - xy[:, 0]], 1),
}


class MeasuredImage(NamedTuple):
    """An image of the source whose file can be used."""

    image: Image
    seen_hw: _Size  # px after EXIF orientation
    orientation: int  # EXIF, 1 to 8
    note: str = ""  # why the file is remarkable, though usable

    @property
    def turns_sides(self) -> bool:
        """Return whether EXIF swaps width and height."""
        return self.orientation >= 5


class Fitted(NamedTuple):
    """Objects in pixels of the image as it is seen, or None: leave the image out; and the reason of what was done."""

    objects: list[Object] | None
    reason: str = ""
    detail: str = ""


def read_orientation(file: Path, seen_hw: _Size) -> int:
    """Return the EXIF orientation by which an image is decoded to `seen_hw`; 1 if it has none."""
    try:
        with PillowImage.open(file) as image:
            width, height = image.size
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # whatever Pillow raises for EXIF data that nobody wrote on purpose
        return 1
    if not isinstance(orientation, int) or orientation not in _TURNS:
        return 1
    stored_hw = (width, height) if orientation >= 5 else (height, width)
    return orientation if stored_hw == seen_hw else 1  # a decoder that ignores it


def are_of_stored(images: Iterable[MeasuredImage]) -> bool:
    """Return whether the boxes of a data set are of the pictures as stored, before EXIF turns them.

    Images that EXIF turns vote: those whose boxes are inside only one of the two frames.
    """
    votes = 0
    for one in images:
        if one.turns_sides and (one.image.size_hw is None or _given_is_swapped(one)):
            votes += _vote(one)
    return votes < 0


def fit_objects(one: MeasuredImage, of_stored: bool) -> Fitted:
    """Return an image's objects in its pixels.

    Args:
        of_stored: what `are_of_stored` found for the whole data set.
    """
    given, seen = one.image.size_hw, one.seen_hw
    if given is None:
        return _fit_unsized(one, of_stored)
    detail = f"{given[1]} x {given[0]} in the annotation, {seen[1]} x {seen[0]} in the file"
    if _given_is_swapped(one):
        as_seen = (given[1], given[0])
        vote = _vote(one)
        if one.turns_sides and (vote < 0 or (vote == 0 and of_stored)):
            return Fitted(
                [_turned(_scaled(o, given, seen[::-1]), one) for o in one.image.objects], TURNED, detail
            )
        if vote < 0:  # turned after it was annotated, and nothing says which way
            return Fitted(None, OTHER_SHAPE, detail)
        return Fitted([_scaled(o, as_seen, seen) for o in one.image.objects], SWAPPED, detail)
    if not _same_shape(given, seen):
        return Fitted(None, OTHER_SHAPE, detail)
    objects = [_scaled(o, given, seen) for o in one.image.objects]
    if of_stored and one.orientation > 1 and (not one.turns_sides or seen[0] == seen[1]):
        return Fitted([_turned(o, one) for o in objects], TURNED, f"EXIF orientation {one.orientation}")
    return Fitted(objects, *((SCALED, detail) if given != seen else ()))


def _fit_unsized(one: MeasuredImage, of_stored: bool) -> Fitted:
    """Return the objects of an image whose annotation states no size."""
    objects = list(one.image.objects)
    vote = _vote(one) if one.turns_sides else 0
    if not objects or one.orientation == 1 or vote > 0:
        return Fitted(objects)
    detail = f"EXIF orientation {one.orientation}"
    if vote < 0 or of_stored:
        return Fitted([_turned(o, one) for o in objects], TURNED, detail)
    return Fitted(objects, UNSURE, detail)


def _given_is_swapped(one: MeasuredImage) -> bool:
    given, seen = one.image.size_hw, one.seen_hw
    if given is None or given == seen or seen[0] == seen[1]:
        return False
    return given == seen[::-1] or (not _same_shape(given, seen) and _same_shape(given, seen[::-1]))


def _same_shape(given: _Size, size: _Size) -> bool:
    """Return whether two sizes differ by a factor, and rounding of the smaller one."""
    small, large = sorted((given, size), key=max)
    scale = max(small) / max(large)
    return all(abs(a - b * scale) <= _ROUNDING_PX for a, b in zip(small, large, strict=True))


def _vote(one: MeasuredImage) -> int:
    """Return 1 if the boxes are inside the image as seen alone, -1 if inside the swapped sides alone, else 0."""
    height, width = one.image.size_hw or one.seen_hw[::-1]  # swapped
    corners = np.array([o.box_xyxy for o in one.image.objects], np.float64).reshape(-1, 4)
    corners = corners[np.isfinite(corners).all(1)]
    far_xy = corners[:, 2:].max(0, initial=0.0)
    is_seen, is_stored = (
        bool((far_xy <= np.array(wh) + _ROUNDING_PX).all()) for wh in ((height, width), (width, height))
    )
    return int(is_seen) - int(is_stored)


def _scaled(one: Object, given: _Size, size: _Size) -> Object:
    factor = np.array([size[1] / given[1], size[0] / given[0]])
    return one if given == size else _mapped(one, lambda xy: xy * factor)


def _turned(one: Object, measured: MeasuredImage) -> Object:
    """Return an object of the picture as stored where it is seen."""
    height, width = measured.seen_hw[::-1] if measured.turns_sides else measured.seen_hw
    return _mapped(one, lambda xy: _TURNS[measured.orientation](xy, width, height))


def _mapped(one: Object, move: Callable[[np.ndarray], np.ndarray]) -> Object:
    x1, y1, x2, y2 = one.box_xyxy
    if not (x2 > x1 and y2 > y1):  # empty, turned around or not finite: stays so, and is reported
        return one
    corners = move(np.array([[x1, y1], [x2, y2]], np.float64))
    box = (*corners.min(0).tolist(), *corners.max(0).tolist())
    polygon = None if one.polygon is None else move(np.asarray(one.polygon, np.float64))
    return one._replace(box_xyxy=box, polygon=polygon)
