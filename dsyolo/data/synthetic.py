"""The synthetic data set: five shapes on textured backgrounds, in YOLO format, drawn without a download.

A detector learns it in minutes. The classes differ in outline; colour helps, but does not decide. Equal settings
give equal bytes.
"""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.data.formats.yolo_writer import label_row, new_folder, write_data_yaml

NAMES = ("circle", "square", "triangle", "star", "ring")

_VERSION = 1  # raise it whenever equal settings draw something else
_OPTIONS_FILE = "sample.json"
_HUES = (10, 45, 85, 120, 155)  # 0 to 179; each class prefers one
_HUE_SPREAD = 14  # standard deviation: neighbours overlap
_MIN_SIDE_PX = 12
_MAX_OVERLAP = 0.4  # share of the smaller of two boxes that may be covered by the other
_BACKGROUNDS = 0.04  # share of images without an object
_SHIFT_BITS = 4  # OpenCV draws in 1/16 px


class _Shape(NamedTuple):
    number: int  # class
    outline: np.ndarray  # (P, 2) float64 px
    hole: np.ndarray | None
    box_xyxy: np.ndarray  # (4,) float64 px, inside the image


def draw_sample(
    dst: str | Path,
    *,
    num_images: int = 400,
    val_share: float = 0.2,
    seed: int = 0,
    image_size: tuple[int, int] = (256, 256),
) -> Path:
    """Draw the data set into `dst`, unless it exists with the same settings; return the path of its data.yaml.

    Args:
        image_size: (w, h) in px; one side of most images is up to a quarter shorter.

    Raises:
        UserError: settings out of range, or a `dst` that is not empty.
    """
    dst = Path(dst)
    _check(num_images, val_share, seed, image_size)
    given = {"num_images": num_images, "val_share": val_share, "seed": seed, "image_size": image_size}
    options_json = json.dumps({**given, "version": _VERSION}, indent=1) + "\n"

    def is_complete() -> bool:
        try:  # the folder appears by a rename, so its options imply that it is complete
            return (dst / _OPTIONS_FILE).read_text(encoding="utf-8") == options_json
        except OSError:
            return False

    if is_complete():
        return dst / "data.yaml"
    try:
        with new_folder(dst) as building:
            _draw_all(building, num_images, val_share, seed, image_size)
            (building / _OPTIONS_FILE).write_text(options_json, encoding="utf-8")
    except UserError:
        if not is_complete():  # another process may have drawn the same meanwhile
            raise
    return dst / "data.yaml"


def _check(num_images: int, val_share: float, seed: int, image_size: tuple[int, int]) -> None:
    rules = [
        (num_images >= 2, f"num_images: {num_images} given, but training and validation need at least 2."),
        (0 < val_share < 1, f"val_share: {val_share} given, but it must be between 0 and 1."),
        (seed >= 0, f"seed: {seed} given, but it must be at least 0."),
        (min(image_size) >= 64, f"image_size: {image_size} given, but each side must be at least 64 px."),
    ]
    if problems := [problem for is_kept, problem in rules if not is_kept]:
        raise UserError("The synthetic data set cannot be drawn", problems)


def _draw_all(
    folder: Path, num_images: int, val_share: float, seed: int, image_size: tuple[int, int]
) -> None:
    num_val = min(num_images - 1, max(1, round(num_images * val_share)))
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
    for index in range(num_images):
        split = "train" if index < num_images - num_val else "val"
        # Each image has its own generator: another number of images draws the same ones.
        image, shapes = draw_image(np.random.default_rng([seed, index]), image_size)
        encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (folder / "images" / split / f"{index:05d}.jpg").write_bytes(encoded.tobytes())
        wh = np.tile(image.shape[1::-1], 2)
        corners = [(shape.number, (shape.box_xyxy / wh).reshape(2, 2)) for shape in shapes]
        rows = [label_row(number, np.stack([two.mean(0), np.ptp(two, 0)])) for number, two in corners]
        (folder / "labels" / split / f"{index:05d}.txt").write_text(
            "".join(f"{row}\n" for row in rows), encoding="utf-8"
        )
    write_data_yaml(folder, NAMES, ("train", "val"))


# ---- one image


def draw_image(rng: np.random.Generator, image_size: tuple[int, int]) -> tuple[np.ndarray, list[_Shape]]:
    """Draw one (H, W, 3) uint8 RGB image; return it and its shapes, from back to front."""
    width, height = image_size
    shorter = rng.uniform(0.75, 1.0)
    if rng.random() < 0.5:
        width = round(width * shorter)
    else:
        height = round(height * shorter)
    canvas = _background(rng, width, height)
    shapes = _place(rng, width, height)
    for shape in shapes:
        _paint(rng, canvas, shape)
    canvas = (canvas - 128) * rng.uniform(0.7, 1.15) + 128 + rng.uniform(-25, 25)
    canvas += rng.normal(0, rng.uniform(1, 6), (height, width, 1)).astype(np.float32)
    return canvas.clip(0, 255).astype(np.uint8), shapes


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw (H, W, 3) float32: two colours mixed by a gradient, stripes or blotches, with noise of several grains."""
    along = _along(rng, width, height)
    kind = rng.integers(3)
    if kind == 0:
        mix = 0.5 + along / 2.9
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(along * rng.uniform(6, 40) + rng.uniform(0, 6))
    else:
        mix = _blotches(rng, width, height, int(rng.integers(3, 9)))
    first, second = (_colour(rng, rng.uniform(0, 180), (0, 110), (40, 220)) for _ in range(2))
    canvas = first + (second - first) * mix[..., None].astype(np.float32)
    canvas += 60 * (_blotches(rng, width, height, int(rng.integers(12, 40)))[..., None] - 0.5)
    return canvas


def _along(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw a direction; return how far each pixel is along it, (H, W) from -1 to 1 on either axis."""
    axes = (np.linspace(-1, 1, side, dtype=np.float32) for side in (width, height))
    x, y = np.meshgrid(*axes)
    angle = rng.uniform(0, 2 * np.pi)
    return x * np.cos(angle) + y * np.sin(angle)


def _blotches(rng: np.random.Generator, width: int, height: int, num_cells: int) -> np.ndarray:
    """Draw smooth noise, (H, W) float32 in about [0, 1], with that many cells per side."""
    coarse = rng.random((num_cells, num_cells), dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _colour(
    rng: np.random.Generator, hue: float, saturation: tuple[int, int], value: tuple[int, int]
) -> np.ndarray:
    """Draw a colour, (3,) float32 RGB, of a hue (of 180) in ranges of saturation and value (of 255)."""
    hsv = np.array([[[hue % 180, rng.uniform(*saturation), rng.uniform(*value)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _place(rng: np.random.Generator, width: int, height: int) -> list[_Shape]:
    """Draw shapes from small to half the image, large ones first; they may overlap, but none is hidden."""
    if rng.random() < _BACKGROUNDS:
        return []
    short = min(width, height)
    # Even in the logarithm: as many from 12 to 24 px as from 48 to 96.
    sizes = np.exp(rng.uniform(np.log(_MIN_SIDE_PX * 1.2), np.log(short / 2), rng.integers(2, 9)))
    shapes: list[_Shape] = []
    for size in sorted(sizes, reverse=True):
        for _ in range(10):
            shape = _shape(rng, float(size), width, height)
            if shape and all(_overlap(shape.box_xyxy, s.box_xyxy) <= _MAX_OVERLAP for s in shapes):
                shapes.append(shape)
                break
    return shapes


def _shape(rng: np.random.Generator, size: float, width: int, height: int) -> _Shape | None:
    """Draw a rotated and stretched outline somewhere; None if less than four fifths of its box are in the image."""
    number = int(rng.integers(len(NAMES)))
    outline = _outline(NAMES[number])
    turn = rng.uniform(0, 2 * np.pi)
    stretch = np.exp(rng.uniform(-0.2, 0.2))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = outline @ (rotation * [[stretch], [1 / stretch]]).T
    outline *= size / np.ptp(outline, axis=0).max()
    low, high = outline.min(0), outline.max(0)
    centre = np.array([rng.uniform(0, width), rng.uniform(0, height)]) - (low + high) / 2
    outline = outline + centre
    full = np.concatenate([outline.min(0), outline.max(0)])
    box = full.clip(0, [width, height, width, height])
    sides = box[2:] - box[:2]
    if sides.min() < _MIN_SIDE_PX or sides.prod() < 0.8 * (full[2:] - full[:2]).prod():
        return None
    middle = outline.mean(0)
    hole = middle + (outline - middle) * 0.55 if NAMES[number] == "ring" else None
    return _Shape(number, outline, hole, box)


def _outline(name: str) -> np.ndarray:
    """Return the outline (P, 2) around 0, of any size."""
    corners = {"circle": 40, "ring": 40, "square": 4, "triangle": 3, "star": 10}[name]
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == "star" else np.ones(corners)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection of two boxes over the smaller one's area."""
    sides = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0)
    return sides.prod() / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())


def _paint(rng: np.random.Generator, canvas: np.ndarray, shape: _Shape) -> None:
    """Blend a shape into the canvas: one colour, lit from one side, with grain or stripes, and smooth edges."""
    x1, y1 = np.floor(shape.box_xyxy[:2]).astype(int)
    x2, y2 = np.ceil(shape.box_xyxy[2:]).astype(int)
    mask = np.zeros((y2 - y1, x2 - x1), np.uint8)
    for points, value in ((shape.outline, 255), (shape.hole, 0)):
        if points is not None:
            # Pixel centres are at half coordinates in our boxes and at whole ones in OpenCV.
            fixed = np.round((points - [x1 + 0.5, y1 + 0.5]) * (1 << _SHIFT_BITS)).astype(np.int32)
            cv2.fillPoly(mask, [fixed], value, cv2.LINE_AA, _SHIFT_BITS)
    hue = rng.normal(_HUES[shape.number], _HUE_SPREAD)
    colour = _colour(rng, hue, (120, 255), (110, 255))
    along = _along(rng, x2 - x1, y2 - y1)
    light = along * rng.uniform(0, 30)
    if rng.random() < 0.4:
        light = light + 18 * np.sin(along * rng.uniform(6, 20))
    light = light + rng.normal(0, rng.uniform(2, 10), light.shape)
    alpha = mask[..., None].astype(np.float32) * (rng.uniform(0.8, 1.0) / 255)
    patch = canvas[y1:y2, x1:x2]
    patch += (colour + light[..., None].astype(np.float32) - patch) * alpha
