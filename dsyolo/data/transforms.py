"""Training samples: mosaic, copy-paste, perspective, mixup, HSV and flips, drawn from one generator.

A sample is a pure function of the generator's state and the images: nothing here keeps state, and arrays that
`load` returns are never written to. Boxes are in continuous pixels, in which pixel i spans [i, i + 1].

A mosaic's view is drawn before its canvas is built, so only the visible part is built, and images outside of it are
not loaded. Loader workers should call `cv2.setNumThreads(1)`: OpenCV's threads would compete with the other workers.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from dsyolo.base.batch import Sample
from dsyolo.config.recipe import Recipe
from dsyolo.data.warp import Rect, bounds, clip_labels, crop, draw_view, select
from dsyolo.detection.boxes import PAD_GREY

# (index, long_side_px) -> the image with that long side, and its labels
LoadImage = Callable[[int, int], Sample]

MAX_COVERED = 0.3  # share of another box that a pasted object may cover
MIXUP_BETA = 32.0


def augment(
    load: LoadImage, index: int, num_images: int, size_px: int, rng: np.random.Generator, recipe: Recipe
) -> Sample:
    """Return the training sample of image `index`.

    Args:
        load: returns an image by index with its long side scaled to the given pixels; called 0 to 8 times.
        index: the sample's own image; the others of a mosaic are drawn.
        num_images: others are drawn from range(num_images).
        size_px: side of the returned image.
        rng: the only source of randomness.

    Returns:
        A sample of (size_px, size_px, 3), boxes inside the image. Without augmentation it is the letterboxed image.
    """
    if rng.random() < recipe.mosaic:
        sample = _drawn_mosaic(load, index, num_images, size_px, rng, recipe)
        if rng.random() < recipe.mixup:
            other = _drawn_mosaic(load, int(rng.integers(num_images)), num_images, size_px, rng, recipe)
            sample = mixup(sample, other, rng.beta(MIXUP_BETA, MIXUP_BETA))
    else:
        view = draw_view(size_px, size_px, rng, recipe)
        loaded = load(index, size_px)
        assert max(loaded.image.shape) == size_px, f"image {index}: {loaded.image.shape}, not {size_px} px"
        height, width = loaded.image.shape[:2]
        tile = (loaded, (size_px - width) // 2, (size_px - height) // 2)
        sample = crop(_compose([tile], size_px, view.source), view, size_px)
    ratios = 1 + rng.uniform(-1, 1, 3) * (recipe.hsv_h, recipe.hsv_s, recipe.hsv_v)
    sample = sample._replace(image=hsv(sample.image, ratios))
    up_down, left_right = rng.random(2) < (recipe.flipud, recipe.fliplr)
    return flip(sample, left_right=bool(left_right), up_down=bool(up_down))


def _drawn_mosaic(
    load: LoadImage, index: int, num_images: int, size_px: int, rng: np.random.Generator, recipe: Recipe
) -> Sample:
    indices = (index, *rng.integers(num_images, size=3).tolist())
    centre_x, centre_y = rng.integers(size_px // 2, 3 * size_px // 2, size=2, endpoint=True).tolist()
    view = draw_view(2 * size_px, size_px, rng, recipe)
    canvas = mosaic4(load, indices, (centre_x, centre_y), size_px, view.source)
    return crop(copy_paste(canvas, rng, recipe.copy_paste), view, size_px)


def mosaic4(
    load: LoadImage, indices: Sequence[int], centre_xy: tuple[int, int], size_px: int, shown: Rect
) -> Sample:
    """Place four images around `centre_xy` of a grey canvas of twice `size_px`; what sticks out is cut off.

    Args:
        indices: of the images top left, top right, bottom left, bottom right.
        shown: the part of the canvas to return. Labels are in its pixels, but clipped to the
            whole canvas. An image whose quarter lies outside is not loaded, and its labels are left out.
    """
    x0, y0, x1, y1 = shown
    centre_x, centre_y = centre_xy
    tiles = []
    for place, index in enumerate(indices):
        is_right, is_bottom = place % 2, place // 2
        is_shown_x = x1 > centre_x if is_right else x0 < centre_x
        is_shown_y = y1 > centre_y if is_bottom else y0 < centre_y
        if not (is_shown_x and is_shown_y):
            continue
        sample = load(index, size_px)
        height, width = sample.image.shape[:2]
        tiles.append((sample, centre_x - (0 if is_right else width), centre_y - (0 if is_bottom else height)))
    return _compose(tiles, 2 * size_px, shown)


def _compose(tiles: Sequence[tuple[Sample, int, int]], canvas_px: int, shown: Rect) -> Sample:
    """Place samples at (left, top) of a square grey canvas, and return the part `shown`."""
    x0, y0, x1, y1 = shown
    # Filling all of it costs 0.05 ms at 640 px, 1 % of a sample: not worth finding the uncovered strips.
    image = np.full((y1 - y0, x1 - x0, 3), PAD_GREY, np.uint8)
    labelled = []
    for sample, left, top in tiles:
        height, width = sample.image.shape[:2]
        a, b, c, d = max(left, x0), min(left + width, x1), max(top, y0), min(top + height, y1)
        if a < b and c < d:
            image[c - y0 : d - y0, a - x0 : b - x0] = sample.image[c - top : d - top, a - left : b - left]
        place, origin = np.array([left, top], np.float32), np.array([x0, y0], np.float32)
        boxes = sample.boxes_xyxy + np.tile(place, 2)
        polygons = tuple(None if p is None else p + place for p in sample.polygons)
        boxes, polygons = clip_labels(boxes, polygons, canvas_px)
        kept = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[0]
        boxes = boxes - np.tile(origin, 2)
        polygons = tuple(None if p is None else p - origin for p in polygons)
        labelled.append(select(Sample(image, boxes, sample.classes, polygons), kept))
    return _join(image, labelled)


def copy_paste(sample: Sample, rng: np.random.Generator, probability: float) -> Sample:
    """Paste objects that have polygons a second time, mirrored left to right in the image.

    Each is chosen with `probability`, and left out if it would cover more than 30 % of an existing box.
    """
    candidates = [(i, polygon) for i, polygon in enumerate(sample.polygons) if polygon is not None]
    draws = rng.random(len(candidates))
    chosen = [one for one, draw in zip(candidates, draws, strict=True) if draw < probability]
    height, width = sample.image.shape[:2]
    image = sample.image.copy() if chosen else sample.image
    boxes = sample.boxes_xyxy
    polygons: list[np.ndarray] = []
    pasted: list[int] = []
    for i, original in chosen:
        polygon = original * np.array([-1, 1], np.float32) + np.array([width, 0], np.float32)
        box = bounds(polygon)
        shared = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        if (shared.clip(0).prod(axis=1) > MAX_COVERED * areas).any():
            continue
        x0, y0 = np.floor(box[:2]).astype(int).clip(0).tolist()
        x1, y1 = np.minimum(np.ceil(box[2:]).astype(int), (width, height)).tolist()
        if x0 < x1 and y0 < y1:
            mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
            points = np.rint(polygon - 0.5).astype(np.int32)  # the middle of pixel i is at i + 0.5
            cv2.fillPoly(mask, [points], 1, offset=(-x0, -y0))
            mirrored = cv2.flip(sample.image[y0:y1, width - x1 : width - x0], 1)
            np.copyto(image[y0:y1, x0:x1], mirrored, where=mask[:, :, None].astype(bool))
        boxes = np.concatenate([boxes, box[None]])
        polygons.append(polygon)
        pasted.append(i)
    classes = np.concatenate([sample.classes, sample.classes[pasted]]) if pasted else sample.classes
    return Sample(image, boxes, classes, (*sample.polygons, *polygons))


def mixup(first: Sample, second: Sample, ratio: float) -> Sample:
    """Mix two images of one shape, `ratio` of the first and the rest of the second, with the labels of both."""
    return _join(cv2.addWeighted(first.image, ratio, second.image, 1 - ratio, 0), (first, second))


def hsv(image: np.ndarray, ratios: Sequence[float] | np.ndarray) -> np.ndarray:
    """Multiply hue, saturation and value of an RGB image (H, W, 3) by three ratios; if all are 1, return it."""
    if all(ratio == 1 for ratio in ratios):  # converting to HSV and back is not exact
        return image
    levels = np.arange(256)
    hue = levels * ratios[0] % 180  # OpenCV's hue is in steps of 2 degrees
    saturation, value = (np.minimum(levels * ratio, 255) for ratio in ratios[1:])
    table = np.stack([hue, saturation, value], axis=1).astype(np.uint8)[None]
    converted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.LUT(converted, table, dst=converted)
    return cv2.cvtColor(converted, cv2.COLOR_HSV2RGB)


def flip(sample: Sample, left_right: bool, up_down: bool) -> Sample:
    """Mirror image, boxes and polygons."""
    if not (left_right or up_down):
        return sample
    height, width = sample.image.shape[:2]
    image = cv2.flip(sample.image, -1 if left_right and up_down else int(left_right))
    boxes = sample.boxes_xyxy.copy()
    sign, offset = np.ones(2, np.float32), np.zeros(2, np.float32)
    if left_right:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        sign[0], offset[0] = -1, width
    if up_down:
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        sign[1], offset[1] = -1, height
    polygons = tuple(None if p is None else p * sign + offset for p in sample.polygons)
    return Sample(image, boxes, sample.classes, polygons)


def _join(image: np.ndarray, samples: Sequence[Sample]) -> Sample:
    """Return `image` with the labels of all samples."""
    polygons: tuple[np.ndarray | None, ...] = ()
    if any(sample.polygons for sample in samples):
        polygons = tuple(p for s in samples for p in (s.polygons or (None,) * len(s.classes)))
    boxes = np.concatenate([np.empty((0, 4), np.float32), *(s.boxes_xyxy for s in samples)])
    classes = np.concatenate([np.empty(0, np.int64), *(s.classes for s in samples)])
    return Sample(image, boxes, classes, polygons)
