"""Plots: boxes drawn on images, grids of images, curves of a run.

Images are (H, W, 3) uint8 RGB throughout; only `save` knows of OpenCV's BGR.
"""

import colorsys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import cv2
import numpy as np

from dsyolo.base.atomic_file import write_file
from dsyolo.base.batch import Detections
from dsyolo.tracking.picture_text import Text, drawable_names

CURVES = ("#1f6fd6", "#e2641a", "#1c9a6b", "#8a3fc0")  # dark enough for thin lines on white


def colour(klass: int) -> tuple[int, int, int]:
    """Return the RGB of a class, the same in every picture.

    Hues step by the golden ratio, so that neighbouring classes differ most; saturation and value alternate, for the
    classes whose hues come close again.
    """
    hue = (0.58 + klass * 0.618033988749895) % 1.0
    saturation, value = ((0.85, 0.95), (0.60, 1.0), (0.95, 0.70))[klass // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(image_rgb: np.ndarray, detections: Detections, class_names: Sequence[str]) -> np.ndarray:
    """Return a copy of the image with a box, class and score per detection, the best on top.

    Args:
        image_rgb: (H, W, 3) uint8.
        detections: in pixels of `image_rgb`.
    """
    picture = np.array(image_rgb, order="C")
    names = drawable_names(class_names)
    line_px = max(round(sum(picture.shape[:2]) * 0.0018), 1)
    worst_first = np.argsort(detections.scores, kind="stable").tolist()
    for i in worst_first:
        draw_box(picture, detections.boxes_xyxy[i], colour(int(detections.classes[i])), line_px)
    for i in worst_first:  # texts last: a box crossing a text makes it unreadable
        klass = int(detections.classes[i])
        text = f"{names[klass]} {detections.scores[i]:.2f}"
        # below 9 px capitals are not legible
        write_label(
            picture, text, detections.boxes_xyxy[i], colour(klass), max(sum(picture.shape[:2]) * 0.010, 9.0)
        )
    return picture


def grid(images: Sequence[np.ndarray], *, columns: int, cell_px: int, gap_px: int = 6) -> np.ndarray:
    """Return the images row by row on white, each with its long side at `cell_px`; a row is as high as its highest one.

    Args:
        images: each (H, W, 3) uint8, of any size; at least one.

    Returns:
        (H, W, 3) uint8, W = columns * cell_px and the gaps between; fewer columns if there are fewer images.
    """
    assert images, "a grid of nothing"
    columns = min(columns, len(images))
    strips = []
    for start in range(0, len(images), columns):
        cells = [fit(image, cell_px) for image in images[start : start + columns]]
        height = max(cell.shape[0] for cell in cells)
        strip = np.full((height + gap_px, columns * (cell_px + gap_px), 3), 255, np.uint8)
        for i, cell in enumerate(cells):
            top = (height - cell.shape[0]) // 2
            left = i * (cell_px + gap_px) + (cell_px - cell.shape[1]) // 2
            strip[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
        strips.append(strip)
    return np.concatenate(strips)[: -gap_px or None, : -gap_px or None]


def save(path: Path, image_rgb: np.ndarray) -> None:
    """Write .jpg or .png, or raise OSError if the folder does not exist or cannot be written."""
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
    assert ok, f"{path}: OpenCV cannot write {path.suffix}"
    write_file(path, data.tobytes())


def save_curves(
    path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence, Sequence]]], best_epoch: int | None = None
) -> None:
    """Write a PNG with one panel per entry.

    Args:
        panels: by title the lines, by name the x (epochs) and y values (not negative) of each; at most four.
        best_epoch: is marked in every panel.
    """
    import io  # here, as Matplotlib: half a second that most commands need not pay

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size_inches = (4.0 * columns, 2.9 * rows)
    figure = Figure(figsize=size_inches)  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    inch_x, inch_y = 1 / size_inches[0], 1 / size_inches[1]  # Matplotlib's own layouts draw all twice
    figure.subplots_adjust(0.55 * inch_x, 0.55 * inch_y, 1 - 0.15 * inch_x, 1 - 0.4 * inch_y, 0.2, 0.3)
    epochs = [x for lines in panels.values() for xs, _ in lines.values() for x in xs]
    places = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, (title, lines) in zip(places, panels.items(), strict=False):
        for shade, (name, (x, y)) in zip(CURVES, lines.items(), strict=False):
            marker = "o" if len(x) <= 20 else None
            size = 7 if len(x) == 1 else 3  # a single epoch is a point
            axes.plot(x, y, label=name, color=shade, linewidth=1.6, marker=marker, markersize=size)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.45", linewidth=1.0, linestyle="--", zorder=0)
        axes.set_title(title, fontsize=11, pad=10)
        highest = max((value for _, y in lines.values() for value in y), default=0)
        axes.set_ylim(0, 1.06 * highest or 1)
        if epochs:
            margin = max(0.03 * (max(epochs) - min(epochs)), 0.5)
            axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        numbers = ScalarFormatter(useMathText=True)
        numbers.set_powerlimits((-3, 5))  # 0.00001 and 100000 would not fit beside the axis
        axes.yaxis.set_major_formatter(numbers)
        axes.yaxis.get_offset_text().set_fontsize(8)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    for axes in places[len(panels) :]:
        axes.remove()
    best = f" (dashed: the best, {best_epoch})" if best_epoch is not None else ""
    figure.supxlabel(f"epoch{best}", fontsize=9, y=0.05 * inch_y)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())


def _corners(box_xyxy: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    x1, y1, x2, y2 = np.rint(box_xyxy).astype(int).tolist()
    return (x1, y1), (x2, y2)


def draw_box(
    picture: np.ndarray,
    box_xyxy: np.ndarray,
    rgb: tuple[int, int, int],
    line_px: int,
    *,
    dashed: bool = False,
) -> None:
    """Draw a box into a picture; a dashed one has white gaps."""
    (x1, y1), (x2, y2) = _corners(box_xyxy)
    cv2.rectangle(picture, (x1, y1), (x2, y2), rgb, line_px)
    dash_px, white = 5 * line_px, (255, 255, 255)
    for x, y in product(range(x1, x2, 2 * dash_px) if dashed else (), (y1, y2)):
        cv2.line(picture, (x, y), (min(x + dash_px, x2), y), white, line_px)
    for x, y in product((x1, x2), range(y1, y2, 2 * dash_px) if dashed else ()):
        cv2.line(picture, (x, y), (x, min(y + dash_px, y2)), white, line_px)


def write_label(
    picture: np.ndarray, text: str, box_xyxy: np.ndarray, rgb: tuple[int, int, int], capital_px: float
) -> None:
    """Write on a plate above the box's left corner, or inside the box where the image ends."""
    height, width = picture.shape[:2]
    label = Text(text, capital_px)
    plate_w, plate_h = label.width + label.below, label.height + label.below + label.stroke_px
    (x1, y1), _ = _corners(box_xyxy)
    left = max(min(x1, width - plate_w), 0)
    top = y1 - plate_h if y1 >= plate_h else max(min(y1, height - plate_h), 0)
    cv2.rectangle(picture, (left, top), (left + plate_w, top + plate_h), rgb, cv2.FILLED)
    bright = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 140  # luma, ITU-R BT.601
    origin = (left + label.below // 2, top + label.height + label.below // 2)
    label.draw(picture, origin, (0, 0, 0) if bright else (255, 255, 255))


def fit(image_rgb: np.ndarray, side_px: int) -> np.ndarray:
    """Return the image with its long side at `side_px`."""
    height, width = image_rgb.shape[:2]
    scale = side_px / max(height, width)
    size_wh = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(image_rgb, size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
