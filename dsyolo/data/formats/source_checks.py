"""Checks of a data set before it is written in YOLO format: what most likely went wrong in its export."""

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from dsyolo.base.safe_io import shortened
from dsyolo.data.formats.data_format import SourceDataset

MOST = 0.5  # share of the boxes
CORNER_SHARE, OVERHANG_SHARE = 0.9, 0.2  # as in data/split_checks.py
MAX_NAMED = 5


def suspicions(source: SourceDataset, classes: Mapping[str, Counter[int]]) -> Iterator[str]:
    """Yield a line for each thing that looks wrong with a data set as a whole.

    Args:
        classes: the number of objects that were written, by split and class.
    """
    for split, counts in classes.items():
        if not counts:
            yield f"{split}: none of its images has an object, so its metrics will say nothing."
            continue
        expected = range(len(source.names)) if split == "train" else classes["train"]
        lacking = [source.names[number] for number in sorted(expected) if not counts[number]]
        if lacking and split in ("train", "val"):
            more = f" and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
            yield f"{split}: no object of the classes {', '.join(map(shortened, lacking[:MAX_NAMED]))}{more}."
    yield from _likely_mistakes(source)


def _likely_mistakes(source: SourceDataset) -> Iterator[str]:
    boxes, sizes = [], []
    for images in source.splits.values():
        for image in images:
            if image.size_hw is not None:
                boxes += [one.box_xyxy for one in image.objects]
                sizes += [image.size_hw[::-1]] * len(image.objects)
    if not boxes:
        return
    xyxy, wh = np.array(boxes, np.float64), np.array(sizes, np.float64)
    good = np.isfinite(xyxy).all(1)
    xyxy, wh = xyxy[good], wh[good]
    low, size = xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]
    num_boxes = max(len(xyxy), 1)
    shares = int((np.abs(xyxy) <= 2).all(1).sum())  # x + width of two shares is at most 2
    if shares > MOST * num_boxes:
        yield (
            f"{shares:,} of {num_boxes:,} boxes look like shares of the image, 0 to 1, but are read as pixels. "
            "Multiply them by width and height if they are."
        )
        return
    # Over the edge whichever way the image is turned: swapped sides are mended (frames.py).
    over = (xyxy[:, 2:] > wh + 1).any(1) & (xyxy[:, 2:] > wh[:, ::-1] + 1).any(1)
    if (size > low).all(1).sum() > CORNER_SHARE * num_boxes and over.sum() > OVERHANG_SHARE * num_boxes:
        yield (
            f"most boxes look like corners, x1 y1 x2 y2, but are read as x y width height: {int(over.sum()):,} of "
            f"{num_boxes:,} are over the image's edge. Convert them if they are."
        )
