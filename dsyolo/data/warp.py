"""The crop of a training sample: a drawn view of a square canvas, and what it does to pixels and labels.

The view is drawn before the canvas is built, so that only what it shows needs to be there. Where it only
scales and shifts (the recipe's case) it is snapped to whole pixels and `cv2.resize` does it, 2 to 3 times as
fast as `cv2.warpAffine`. Boxes live in continuous pixels, in which pixel i spans [i, i + 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from dsyolo.base.batch import Sample
from dsyolo.config.recipe import Recipe
from dsyolo.detection.boxes import PAD_GREY

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels

MIN_SIDE_PX = 2.0  # a box survives a crop when it is wider and higher than this,
MIN_AREA_KEPT, MIN_AREA_KEPT_POLYGON = 0.1, 0.01  # keeps more of its area than this,
MAX_ASPECT = 100.0  # and is less elongated than this


class View(NamedTuple):
    """The part of a square canvas that a crop shows, and the mapping."""

    matrix: np.ndarray  # (3, 3) float64: canvas pixels -> output pixels
    area_scale: float  # output pixels per canvas pixel, as areas, before perspective bends them
    source: Rect  # the part of the canvas that is shown: only that must be built
    target: Rect | None  # the part of the output that it fills by resizing; None if it must be warped


def draw_view(canvas_px: int, size_px: int, rng: np.random.Generator, recipe: Recipe) -> View:
    """Draw perspective, rotation and scale, shear, and shift; they apply in this order, about the centre.

    `canvas_px` and `size_px` are the sides of the square canvas and of the square output.
    """
    bend_x, bend_y, turn, zoom, shear_x, shear_y, move_x, move_y = rng.uniform(-1, 1, 8)
    ratio = 1 + zoom * recipe.scale
    to_x, to_y = (0.5 + move_x * recipe.translate) * size_px, (0.5 + move_y * recipe.translate) * size_px
    if recipe.degrees == recipe.shear == recipe.perspective == 0:
        return _aligned_view(canvas_px, size_px, ratio, to_x, to_y)
    centre = np.array([[1, 0, -canvas_px / 2], [0, 1, -canvas_px / 2], [0, 0, 1]])
    bend = np.array([[1, 0, 0], [0, 1, 0], [bend_x * recipe.perspective, bend_y * recipe.perspective, 1]])
    angle = np.deg2rad(turn * recipe.degrees)
    cos, sin = ratio * np.cos(angle), ratio * np.sin(angle)
    rotate = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    tan_x, tan_y = np.tan(np.deg2rad(np.array([shear_x, shear_y]) * recipe.shear))
    skew = np.array([[1, tan_x, 0], [tan_y, 1, 0], [0, 0, 1]])
    move = np.array([[1, 0, to_x], [0, 1, to_y], [0, 0, 1]])
    matrix = move @ skew @ rotate @ bend @ centre

    corners = np.array([[0, 0, 1], [size_px, 0, 1], [0, size_px, 1], [size_px, size_px, 1.0]])
    seen = corners @ np.linalg.inv(matrix).T
    if (seen[:, 2] <= 0).any():  # a corner of the output looks over the horizon
        return View(matrix, ratio**2, (0, 0, canvas_px, canvas_px), None)
    seen = seen[:, :2] / seen[:, 2:]
    # 2 px more on each side for the interpolation.
    low = np.clip(np.floor(seen.min(axis=0)) - 2, 0, canvas_px - 1).astype(int)
    high = np.clip(np.ceil(seen.max(axis=0)) + 2, low + 1, canvas_px).astype(int)
    return View(matrix, ratio**2, (int(low[0]), int(low[1]), int(high[0]), int(high[1])), None)


def _aligned_view(canvas_px: int, size_px: int, ratio: float, to_x: float, to_y: float) -> View:
    """Return the view that scales and moves the canvas' centre to (to_x, to_y), snapped to whole pixels."""
    shown_px = max(round(size_px / ratio), 1)

    def axis(to: float) -> tuple[int, int, int, int, float]:
        start = round(canvas_px / 2 - to / ratio)
        low = min(max(start, 0), canvas_px)
        high = max(min(start + shown_px, canvas_px), low)
        target_low, target_high = (round((edge - start) * size_px / shown_px) for edge in (low, high))
        scale = (target_high - target_low) / (high - low) if target_high > target_low else ratio
        return low, high, target_low, target_high, scale

    x0, x1, target_x0, target_x1, scale_x = axis(to_x)
    y0, y1, target_y0, target_y1, scale_y = axis(to_y)
    move_x, move_y = target_x0 - scale_x * x0, target_y0 - scale_y * y0
    matrix = np.array([[scale_x, 0, move_x], [0, scale_y, move_y], [0, 0, 1]])
    return View(matrix, scale_x * scale_y, (x0, y0, x1, y1), (target_x0, target_y0, target_x1, target_y1))


def crop(sample: Sample, view: View, size_px: int) -> Sample:
    """Crop a canvas, of which `sample` is the part `view.source`, to (size_px, size_px).

    A box becomes the bounds of its transformed corners, or of its polygon if it has one, clipped to the image.
    Boxes that do not survive (see `survives`) are left out. If nothing changes, the result is `sample` itself.
    """
    if view.source == view.target == (0, 0, size_px, size_px):
        return sample
    x0, y0 = view.source[:2]
    matrix = view.matrix @ np.array([[1, 0, x0], [0, 1, y0], [0, 0, 1.0]])
    image = _warp_image(sample.image, matrix, view.target, size_px)
    if not len(sample.classes):
        return sample._replace(image=image)
    corners, in_front = _project(sample.boxes_xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), matrix)
    corners = corners.reshape(-1, 4, 2)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    polygons = list(sample.polygons)
    has_polygon = np.zeros(len(boxes), bool)
    for i, polygon in enumerate(polygons):
        if polygon is not None:
            polygons[i] = projected = _project(polygon, matrix)[0].astype(np.float32)
            boxes[i], has_polygon[i] = bounds(projected), True
    boxes, clipped = clip_labels(boxes, polygons, size_px)
    before = sample.boxes_xyxy
    area_px = (before[:, 2] - before[:, 0]) * (before[:, 3] - before[:, 1]) * view.area_scale
    min_kept = np.where(has_polygon, MIN_AREA_KEPT_POLYGON, MIN_AREA_KEPT)
    kept = (in_front.reshape(-1, 4).all(axis=1) & survives(boxes, area_px, min_kept)).nonzero()[0]
    return select(Sample(image, boxes, sample.classes, clipped), kept)


def survives(boxes_xyxy: np.ndarray, area_before_px: np.ndarray, min_kept: np.ndarray | float) -> np.ndarray:
    """Return which boxes to keep after a crop, (N,) bool.

    Args:
        boxes_xyxy: (N, 4), after the crop, clipped to the image.
        area_before_px: (N,), before the crop, at the scale after it.
        min_kept: minimum share of the area that must be left, one number or (N,).
    """
    width, height = boxes_xyxy[:, 2] - boxes_xyxy[:, 0], boxes_xyxy[:, 3] - boxes_xyxy[:, 1]
    is_large = (width > MIN_SIDE_PX) & (height > MIN_SIDE_PX)
    is_kept = width * height > min_kept * area_before_px
    return is_large & is_kept & (np.maximum(width, height) < MAX_ASPECT * np.minimum(width, height))


def _warp_image(image: np.ndarray, matrix: np.ndarray, target: Rect | None, size_px: int) -> np.ndarray:
    if target is None:
        # OpenCV maps pixel centres; in labels, pixel i spans [i, i + 1].
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        matrix = np.linalg.inv(half) @ matrix @ half
        if (matrix[2] == (0, 0, 1)).all():
            return cv2.warpAffine(image, matrix[:2], (size_px, size_px), borderValue=(PAD_GREY,) * 3)
        return cv2.warpPerspective(image, matrix, (size_px, size_px), borderValue=(PAD_GREY,) * 3)
    x0, y0, x1, y1 = target
    size = (x1 - x0, y1 - y0)
    if target == (0, 0, size_px, size_px):
        return image if image.shape[:2] == size[::-1] else cv2.resize(image, size)
    out = np.full((size_px, size_px, 3), PAD_GREY, np.uint8)
    if min(size) > 0:
        out[y0:y1, x0:x1] = image if image.shape[:2] == size[::-1] else cv2.resize(image, size)
    return out


def _project(points: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map points (P, 2) by a (3, 3) matrix; return (P, 2) float64, and which are in front of the horizon (P,) bool."""
    moved = points @ matrix[:2, :2].T + matrix[:2, 2]
    depth = points @ matrix[2, :2] + matrix[2, 2]
    in_front = depth > 1e-6
    return moved / np.where(in_front, depth, 1)[:, None], in_front


def bounds(polygon: np.ndarray) -> np.ndarray:
    """Return the box xyxy (4,) around a polygon (P, 2)."""
    return np.concatenate([polygon.min(axis=0), polygon.max(axis=0)])


def clip_labels(
    boxes: np.ndarray, polygons: Sequence[np.ndarray | None], side_px: int
) -> tuple[np.ndarray, tuple[np.ndarray | None, ...]]:
    """Clip boxes and polygons to [0, side_px] squared. A box follows its polygon; one outside has no area."""
    clipped = boxes.clip(0, side_px)
    if not polygons:
        return clipped, ()
    polygons = list(polygons)
    for i in (clipped != boxes).any(axis=1).nonzero()[0]:
        if polygons[i] is not None:
            polygons[i] = _clip_polygon(polygons[i], side_px)
            clipped[i] = bounds(polygons[i]) if len(polygons[i]) else 0
    return clipped, tuple(polygons)


def _clip_polygon(polygon: np.ndarray, side_px: int) -> np.ndarray:
    """Clip (P, 2) to [0, side_px] squared by Sutherland-Hodgman; (0, 2) if nothing is left."""
    for axis, edge, sign in ((0, 0, 1), (1, 0, 1), (0, side_px, -1), (1, side_px, -1)):
        if not len(polygon):
            break
        inside = sign * (polygon[:, axis] - edge) >= 0
        if inside.all():
            continue
        following = np.roll(polygon, -1, axis=0)
        crosses = inside != np.roll(inside, -1)
        step = following[:, axis] - polygon[:, axis]
        share = (edge - polygon[:, axis]) / np.where(crosses, step, 1)
        intersection = polygon + share[:, None] * (following - polygon)
        intersection[:, axis] = edge
        # Each point, then where its side leaves or enters.
        both = np.stack([polygon, intersection], axis=1).reshape(-1, 2)
        polygon = both[np.stack([inside, crosses], axis=1).reshape(-1)].astype(np.float32)
    return polygon


def select(sample: Sample, kept: np.ndarray) -> Sample:
    """Return the sample with the labels of these indices only."""
    polygons = tuple(sample.polygons[i] for i in kept) if sample.polygons else ()
    return Sample(sample.image, sample.boxes_xyxy[kept], sample.classes[kept], polygons)
