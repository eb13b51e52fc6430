"""The interface of a data format, and what it reads: images, objects, problems."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsyolo.base.safe_io import shortened
from dsyolo.data.labels import Problem

NO_IMAGE = "image not found (left out)"
MOST_SIDE_PX = 1e9
BAD_SIZE = "width and height cannot be read (not compared with the image's)"
BAD_OBJECT = "object cannot be read (left out)"


class Object(NamedTuple):
    """One object of an image, in its pixels from 0, not yet clipped."""

    name: str  # class
    box_xyxy: tuple[float, float, float, float]
    polygon: np.ndarray | None = None  # (P, 2)
    place: str = ""  # where it is described, for reports


class Image(NamedTuple):
    """One image of the source, and its name in the result."""

    file: Path
    name: str  # path under images/<split>
    objects: list[Object]
    size_hw: tuple[int, int] | None = None  # that the boxes are of, if the source names it: see frames.py
    is_spoiled: bool = False  # whether it has other objects, which cannot be read


def read_size(width: Any, height: Any, place: str, problems: list[Problem]) -> tuple[int, int] | None:
    """Return the (height, width) that an annotation states as numbers or text, whole or not, in px.

    Returns:
        None where it states none, or what cannot be read, which is reported.
    """
    if width in (None, "") and height in (None, ""):
        return None
    sides = (_whole_px(height), _whole_px(width))
    if min(sides) > 0:
        return sides
    problems.append(Problem(place, 0, BAD_SIZE, shortened(f"width {width!r}, height {height!r}")))
    return None


def _whole_px(value: Any) -> int:
    """Return a side in whole px; 0 for what is none."""
    try:
        side = 0.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return round(side) if 0 < side < MOST_SIDE_PX else 0


@dataclass
class SourceDataset:
    """A data set as it was read. Objects of classes outside `names` are refused."""

    splits: dict[str, list[Image]]  # "train", "val", and "test" if there is one
    names: list[str]  # class names: the i-th gets number i
    problems: list[Problem] = field(default_factory=list)  # what was left out, and why
    notes: list[str] = field(default_factory=list)  # what holds for the whole, for the summary


class DataFormat:
    """Reads data sets of one format. Derive from it, and name it in `dsyolo convert FILE.py:CLASS SRC DST`."""

    def read(self, src: Path) -> SourceDataset:
        """Read the data set in `src`, which exists.

        Raises:
            UserError: it is not of this format.
        """
        raise NotImplementedError("the class has no read() of its own")
