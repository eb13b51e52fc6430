"""The index of a data set: images, sizes and labels in flat arrays.

Without a Python object per image, loader workers share its memory after a fork.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsyolo.data.labels import UNKNOWN_CLASS, Labels, Problem, by_reason, no_labels

ARRAYS = ("path_bytes", "path_offsets", "sizes_hw", "offsets", "boxes", "classes", "points", "point_offsets")


class ImageRecord(NamedTuple):
    """One image as it was read and checked."""

    path: str
    size_hw: tuple[int, int] | None  # px after EXIF orientation; None: leave the image out
    labels: Labels
    problems: tuple[Problem, ...]


@dataclass(frozen=True, eq=False)
class DatasetIndex:
    """The usable images of a split and their labels. N images, T boxes, P polygon points.

    The i-th image has the boxes `offsets[i]` to `offsets[i + 1]`; the t-th box the polygon points
    `point_offsets[t]` to `point_offsets[t + 1]`, none when these are equal.
    """

    num_classes: int
    path_bytes: np.ndarray  # (bytes,) uint8: all paths, UTF-8
    path_offsets: np.ndarray  # (N + 1,) int64
    sizes_hw: np.ndarray  # (N, 2) int32, px after EXIF orientation
    offsets: np.ndarray  # (N + 1,) int64
    boxes: np.ndarray  # (T, 4) float32 xyxy, shares of the image's width and height
    classes: np.ndarray  # (T,) int64
    points: np.ndarray  # (P, 2) float32, shares of the image's width and height
    point_offsets: np.ndarray  # (T + 1,) int64
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.sizes_hw)

    @property
    def num_boxes(self) -> int:
        return len(self.boxes)

    @property
    def num_backgrounds(self) -> int:
        return int((np.diff(self.offsets) == 0).sum())

    def path(self, index: int) -> str:
        start, stop = self.path_offsets[index : index + 2]
        return os.fsdecode(self.path_bytes[start:stop].tobytes())

    def labels(self, index: int) -> Labels:
        """Return the labels of one image, as shares of its width and height. They are views: do not write to them."""
        start, stop = self.offsets[index : index + 2]
        bounds = self.point_offsets[start : stop + 1]
        polygons: tuple[np.ndarray | None, ...] = ()
        if len(bounds) > 1 and bounds[-1] > bounds[0]:
            polygons = tuple(self.points[a:b] if b > a else None for a, b in itertools.pairwise(bounds))
        return Labels(self.classes[start:stop], self.boxes[start:stop], polygons)

    def unknown_classes(self) -> dict[str, list[Problem]]:
        """Return the rows left out because their class has no name, by detail."""
        rows: dict[str, list[Problem]] = {}
        for problem in self.problems:
            if problem.reason == UNKNOWN_CLASS:
                rows.setdefault(problem.detail, []).append(problem)
        return rows

    def summary(self) -> str:
        """Return a line of counts, then a line per kind of problem with the first few files."""
        text = f"{len(self):,} images ({self.num_backgrounds:,} backgrounds), {self.num_boxes:,} boxes"
        if not self.problems:
            return text
        return "\n".join([f"{text}; {len(self.problems):,} problems:", *by_reason(self.problems)])


def assemble_index(records: Sequence[ImageRecord], num_classes: int) -> DatasetIndex:
    """Assemble an index from records, in their order; those without a size are left out."""
    usable = [record for record in records if record.size_hw is not None]
    paths = [os.fsencode(record.path) for record in usable]
    labels = [no_labels(), *(record.labels for record in usable)]
    polygons = [p for one in labels for p in (one.polygons or (None,) * len(one.classes))]
    return DatasetIndex(
        num_classes=num_classes,
        path_bytes=np.frombuffer(b"".join(paths), np.uint8),
        path_offsets=_offsets([len(path) for path in paths]),
        sizes_hw=np.array([record.size_hw for record in usable], np.int32).reshape(-1, 2),
        offsets=_offsets([len(one.classes) for one in labels[1:]]),
        boxes=np.concatenate([one.boxes_xyxy for one in labels]),
        classes=np.concatenate([one.classes for one in labels]),
        points=np.concatenate([np.zeros((0, 2), np.float32), *(p for p in polygons if p is not None)]),
        point_offsets=_offsets([0 if p is None else len(p) for p in polygons]),
        problems=tuple(problem for record in records for problem in record.problems),
    )


def merge_indexes(parts: Sequence[DatasetIndex], problems: Sequence[Problem] = ()) -> DatasetIndex:
    """Merge at least one index, in their order; `problems` come before theirs."""
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    for name in (name for name in ARRAYS if name.endswith("offsets")):
        joined[name] = _offsets(np.concatenate([np.diff(getattr(part, name)) for part in parts]))
    all_problems = (*problems, *itertools.chain.from_iterable(part.problems for part in parts))
    return DatasetIndex(parts[0].num_classes, **joined, problems=all_problems)


def check_arrays(index: DatasetIndex) -> None:
    """Check the types, shapes and bounds of an index that was read from a file. Raise ValueError where one is not its own."""
    num_images, num_boxes = len(index.sizes_hw), len(index.boxes)
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "path_bytes": (np.uint8, (len(index.path_bytes),)),
        "path_offsets": (np.int64, (num_images + 1,)),
        "sizes_hw": (np.int32, (num_images, 2)),
        "offsets": (np.int64, (num_images + 1,)),
        "boxes": (np.float32, (num_boxes, 4)),
        "classes": (np.int64, (num_boxes,)),
        "points": (np.float32, (len(index.points), 2)),
        "point_offsets": (np.int64, (num_boxes + 1,)),
    }
    for name, (kind, shape) in expected.items():
        array = getattr(index, name)
        if array.dtype != kind or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape} and not {np.dtype(kind)} {shape}")
    ends = {"path_offsets": len(index.path_bytes), "offsets": num_boxes, "point_offsets": len(index.points)}
    for name, end in ends.items():
        array = getattr(index, name)
        if array[0] != 0 or array[-1] != end or (np.diff(array) < 0).any():
            raise ValueError(f"{name} does not rise from 0 to {end}")
    shares = [index.boxes, index.points]
    if not all(((values >= 0) & (values <= 1)).all() for values in shares):
        raise ValueError("boxes or points are no shares of an image")
    if (
        type(index.num_classes) is not int
        or not ((index.classes >= 0) & (index.classes < index.num_classes)).all()
    ):
        raise ValueError("a class is not one of the data set's")
    if (index.sizes_hw <= 0).any():
        raise ValueError("an image has no size")


def _offsets(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, np.int64))])
