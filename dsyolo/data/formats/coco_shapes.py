"""Boxes and polygons of a COCO annotation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_PAIRS = 1 << 22  # of points, between two parts of an object
# Bounds of a polygon that agree with its bbox: by their IoU, or with each side as near as this.
SAME_IOU = 0.8
SAME_AREA = 0.05
MARGIN_PX, MARGIN = 2.0, 0.1  # the second is a share of the bbox's side


def read_box(bbox: Any) -> tuple[float, float, float, float] | None:
    """Return the corners x1 y1 x2 y2 of x, y, width and height; None where these are not four numbers."""
    if isinstance(bbox, (str, bytes, dict)):  # the letters of "1234" would be four numbers
        return None
    try:
        x, y, width, height = map(float, bbox)
    except (TypeError, ValueError, OverflowError):
        return None
    box = (x, y, x + width, y + height)
    return box if np.isfinite(box).all() else None


def has_area_of_corners(one: Mapping[str, Any]) -> bool | None:
    """Return whether the area of an annotation is that of its bbox taken for corners; None where it cannot decide."""
    box, area = read_box(one.get("bbox")), one.get("area")
    if box is None or isinstance(area, bool) or not isinstance(area, (int, float)) or not area > 0:
        return None
    x1, y1, x2, y2 = map(float, one["bbox"])
    as_size, as_corners = x2 * y2, (x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0
    is_size, is_corners = (abs(area - side) <= SAME_AREA * side for side in (as_size, as_corners))
    return is_corners if is_size != is_corners else None


def read_polygon(segmentation: Any) -> np.ndarray | None:
    """Return the polygon of all parts with three points or more; None for a mask (RLE), nothing, or a bad part."""
    if not isinstance(segmentation, list):
        return None
    if segmentation and all(isinstance(value, (int, float)) for value in segmentation):
        segmentation = [segmentation]  # without the list around its one part
    try:
        parts = [np.array(part, np.float64).reshape(-1, 2) for part in segmentation]
    except (TypeError, ValueError, OverflowError):
        return None
    parts = [part for part in parts if len(part) >= 3]
    return join_polygons(parts) if parts and all(np.isfinite(part).all() for part in parts) else None


def is_bad(segmentation: Any) -> bool:
    """Return whether a segmentation should have been a polygon, though it is none."""
    return not isinstance(segmentation, dict) and bool(segmentation)


def num_short_parts(segmentation: Any) -> int:
    """Return how many parts of a polygon have fewer than three points, and are left out."""
    if not isinstance(segmentation, list):
        return 0
    return sum(isinstance(part, list) and len(part) < 6 for part in segmentation)


def agrees(polygon: np.ndarray, box: tuple[float, float, float, float]) -> bool:
    """Return whether a polygon's bounds are those of its bbox, but for a margin; true for a bbox without a size."""
    low, high = polygon.min(0), polygon.max(0)
    near, far = np.array(box[:2]), np.array(box[2:])
    size = far - near
    if (size <= 0).any():
        return True
    margin = np.maximum(MARGIN_PX, MARGIN * size)
    if (np.abs(low - near) <= margin).all() and (np.abs(high - far) <= margin).all():
        return bool((np.minimum(high, far) > np.maximum(low, near)).all())
    both = (np.minimum(high, far) - np.maximum(low, near)).clip(0).prod()
    return bool(both >= SAME_IOU * ((high - low).prod() + size.prod() - both))


def join_polygons(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join polygons into one (P, 2), by bridges without width where they are nearest."""
    joined = parts[0]
    for part in parts[1:]:
        if len(joined) * len(part) > MOST_PAIRS:  # the nearest two would be searched for in gigabytes
            joined = np.concatenate([joined[:1], part, part[:1], joined])
            continue
        gaps = ((joined[:, None] - part[None]) ** 2).sum(-1)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        joined = np.concatenate([joined[: i + 1], part[j:], part[: j + 1], joined[i:]])
    return joined
