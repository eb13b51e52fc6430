"""One scan of a data set: every image and label file is read once, checked, and what is good kept compactly.

The result holds flat arrays and no Python object per image, so that loader workers share it after a fork. It is
cached outside the data folder, keyed by the paths, sizes and times of all files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from dsyolo.data.formats import label_path, list_images
from dsyolo.data.images import check_image
from dsyolo.data.labels import UNKNOWN_CLASS, Labels, Problem, by_reason, no_labels, read_labels
from dsyolo.environment import read_environment
from dsyolo.errors import UserError

FORMAT_VERSION = 2  # raise it whenever what a scan keeps or how it checks changes

NO_ROW_LEFT = "no label row can be used (image left out)"
LISTED_TWICE = "image listed more than once (repeat left out)"

_CHUNK = 64  # files per task: large enough that handing out tasks costs nothing
_ARRAYS = ("path_bytes", "path_offsets", "sizes_hw", "offsets", "boxes", "classes", "points", "point_offsets")
T = TypeVar("T")
R = TypeVar("R")


class Record(NamedTuple):
    """What is known of one image after reading it."""

    path: str
    size_hw: tuple[int, int] | None  # px after EXIF orientation; None: leave the image out
    labels: Labels
    problems: tuple[Problem, ...]


@dataclass(frozen=True, eq=False)
class Scan:
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
        """The labels of one image, as shares of its width and height. Views: do not write to them."""
        start, stop = self.offsets[index : index + 2]
        bounds = self.point_offsets[start : stop + 1]
        polygons: tuple[np.ndarray | None, ...] = ()
        if len(bounds) > 1 and bounds[-1] > bounds[0]:
            polygons = tuple(self.points[a:b] if b > a else None for a, b in itertools.pairwise(bounds))
        return Labels(self.classes[start:stop], self.boxes[start:stop], polygons)

    def box_sizes_px(self, long_side_px: int) -> np.ndarray:
        """(T, 2) float32: width and height of every box when its image's long side is that long."""
        scale = long_side_px / self.sizes_hw.max(1, initial=1)
        image_wh = (self.sizes_hw[:, ::-1] * scale[:, None]).astype(np.float32)
        return (self.boxes[:, 2:] - self.boxes[:, :2]) * np.repeat(image_wh, np.diff(self.offsets), 0)

    def class_counts(self) -> np.ndarray:
        """(K,) int64: the boxes of each class."""
        return np.bincount(self.classes, minlength=self.num_classes)

    def unknown_classes(self) -> dict[str, list[Problem]]:
        """By detail, the rows left out because their class has no name."""
        rows: dict[str, list[Problem]] = {}
        for problem in self.problems:
            if problem.reason == UNKNOWN_CLASS:
                rows.setdefault(problem.detail, []).append(problem)
        return rows

    def summary(self, num_files: int = 3) -> str:
        """One line of counts, then one per reason of problems with the first few files."""
        text = f"{len(self):,} images ({self.num_backgrounds:,} backgrounds), {self.num_boxes:,} boxes"
        if not self.problems:
            return text
        return "\n".join([f"{text}; {len(self.problems):,} problems:", *by_reason(self.problems, num_files)])


def scan(
    sources: Iterable[str | Path],
    num_classes: int,
    cache_dir: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Scan:
    """Read and check all images and labels of folders and list files, or take the result from the cache.

    Any number of ranks and runs may do this at once: a cache file is replaced as a whole, and the last one wins.

    Args:
        cache_dir: None for `default_cache_dir()`. One that cannot be written costs a warning and no more.
        workers: threads (decoding releases the GIL); None: one per core, at most 16.

    Raises:
        UserError: a source that does not exist, no image in the sources, or none that can be used.
    """
    sources = [Path(os.path.abspath(source)) for source in sources]
    workers = workers or min(16, os.cpu_count() or 1)
    images = [os.path.abspath(image) for image in list_images(sources)]
    repeats = [image for image, count in Counter(images).items() if count > 1]
    images = sorted(set(images))
    key = _key(images, num_classes, workers)
    name = hashlib.sha256("\n".join([str(num_classes), *map(str, sources)]).encode(errors="surrogateescape"))
    cache_file = Path(cache_dir or default_cache_dir()) / f"scan-{name.hexdigest()[:24]}.npz"
    found = _load_cache(cache_file, key)
    if found is None:
        records = _scan_files(images, num_classes, workers, progress)
        found = build_scan(records, num_classes, [Problem(image, 0, LISTED_TWICE, "") for image in repeats])
        _save_cache(cache_file, key, found)
    if not len(found):
        raise UserError(
            f"None of the {len(images)} images in {', '.join(map(str, sources))} can be used",
            [str(problem) for problem in found.problems[:10]],
        )
    return found


def scan_file(image: str | Path, num_classes: int) -> Record:
    """Read and check one image and its label file. Depends on nothing else, so that any worker or rank can do it."""
    image = str(image)
    size_hw, reason, detail = check_image(image)
    if size_hw is None:
        return Record(image, None, no_labels(), (Problem(image, 0, reason, detail),))
    labels, problems = read_labels(label_path(image), num_classes)
    if problems and not len(labels.classes):
        # Its objects are there, though none can be used: as a background it would teach that they are not.
        problems.append(Problem(image, 0, NO_ROW_LEFT, ""))
        size_hw = None
    return Record(image, size_hw, labels, tuple(problems))


def build_scan(records: Iterable[Record], num_classes: int, problems: Sequence[Problem] = ()) -> Scan:
    """Put records together, in their order; those without a size are left out."""
    problems = list(problems)
    paths: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    labels: list[Labels] = []
    points: list[np.ndarray] = []
    num_points: list[int] = []
    for record in records:
        problems += record.problems
        if record.size_hw is None:
            continue
        paths.append(os.fsencode(record.path))
        sizes.append(record.size_hw)
        labels.append(record.labels)
        polygons = record.labels.polygons or (None,) * len(record.labels.classes)
        points += [polygon for polygon in polygons if polygon is not None]
        num_points += [0 if polygon is None else len(polygon) for polygon in polygons]
    none = no_labels()
    return Scan(
        num_classes=num_classes,
        path_bytes=np.frombuffer(b"".join(paths), np.uint8),
        path_offsets=_offsets([len(path) for path in paths]),
        sizes_hw=np.array(sizes, np.int32).reshape(-1, 2),
        offsets=_offsets([len(one.classes) for one in labels]),
        boxes=np.concatenate([none.boxes_xyxy, *(one.boxes_xyxy for one in labels)]),
        classes=np.concatenate([none.classes, *(one.classes for one in labels)]),
        points=np.concatenate([np.zeros((0, 2), np.float32), *points]),
        point_offsets=_offsets(num_points),
        problems=tuple(problems),
    )


def _offsets(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(counts, np.int64))])


def _scan_files(images: Sequence[str], num_classes: int, workers: int, progress: bool) -> Iterator[Record]:
    with tqdm(total=len(images), desc="reading the data set", unit=" images", disable=not progress) as bar:
        for records in _in_chunks(lambda image: scan_file(image, num_classes), images, workers):
            bar.update(len(records))
            yield from records


def _in_chunks(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[list[R]]:
    """Apply `work` to every item on threads; the results in the items' order, a chunk at a time."""
    chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda chunk: [work(item) for item in chunk], chunks)


# ---- the cache


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/dsyolo, else ~/.cache/dsyolo."""
    return read_environment().cache / "dsyolo"


def _key(images: Sequence[str], num_classes: int, workers: int) -> str:
    """A hash that changes with any image or label file: path, size and time of change of each."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {num_classes}\n".encode())
    for stamps in _in_chunks(_stamp, images, workers):
        digest.update("".join(stamps).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamp(image: str) -> str:
    return f"{image}\0{_size_and_time(image)}\0{_size_and_time(label_path(image))}\n"


def _size_and_time(path: str | Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "-"
    return f"{status.st_size} {status.st_mtime_ns}"


def _save_cache(cache_file: Path, key: str, found: Scan) -> None:
    """SHA-256 of the rest, then an .npz: a reader sees the old file or the new one, never a part."""
    header = {"key": key, "num_classes": found.num_classes, "problems": found.problems}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        **{name: getattr(found, name) for name in _ARRAYS},
    )
    payload = buffer.getbuffer()
    temporary = cache_file.with_name(f".{cache_file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
        os.replace(temporary, cache_file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warnings.warn(
            f"the scan could not be cached, so the next run reads all files again: {error}", stacklevel=3
        )


def _load_cache(cache_file: Path, key: str) -> Scan | None:
    try:
        raw = cache_file.read_bytes()
    except OSError:
        return None
    payload = memoryview(raw)[32:]
    if hashlib.sha256(payload).digest() != raw[:32]:
        warnings.warn(f"{cache_file} is damaged: all files are read again", stacklevel=3)
        return None
    with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
        header = json.loads(stored["header"].tobytes())
        if header["key"] != key:
            return None
        problems = tuple(Problem(*problem) for problem in header["problems"])
        return Scan(header["num_classes"], **{name: stored[name] for name in _ARRAYS}, problems=problems)
