"""Builds the index of a data set: reads and checks every image and label file once, and keeps what is usable.

The index is cached outside the data folder, keyed by the paths, sizes and times of all files. Ranks share the work:
see parallel_map.py.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.data.formats.yolo import label_path, list_images
from dsyolo.data.images import check_image
from dsyolo.data.index import DatasetIndex, ImageRecord, assemble_index, merge_indexes
from dsyolo.data.index_cache import default_cache_dir, load_cache, save_cache
from dsyolo.data.labels import Problem, by_reason, no_labels, read_labels
from dsyolo.data.parallel_map import Communicator, LocalCommunicator, parallel_map, run_on_all_ranks

FORMAT_VERSION = 3  # raise it whenever the index or its checks change

NO_ROW_LEFT = "no label row can be used (image left out)"
LISTED_TWICE = "image listed more than once (repeat left out)"


def build_index(
    sources: Iterable[str | Path],
    num_classes: int,
    cache_dir: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    num_keypoint_values: int = 0,
    communicator: Communicator | None = None,
) -> DatasetIndex:
    """Read and check all images and labels of folders and list files, or load the index from the cache.

    Several runs may do this at once: a cache file is replaced as a whole, and the last one wins.

    Args:
        cache_dir: None for `default_cache_dir()`. If it cannot be written, there is only a warning.
        workers: threads (decoding releases the GIL); None: one per core, at most 16.
        num_keypoint_values: of `DataSpec`.
        communicator: the ranks that call this together. Each reads its share, all get the same. None: this process alone.

    Raises:
        UserError: a source that does not exist, no image in the sources, none that can be used, or ranks that see
            other files.
    """
    folders = [Path(os.path.abspath(source)) for source in sources]
    workers = workers or min(16, os.cpu_count() or 1)
    communicator = communicator or LocalCommunicator()
    on_all_ranks = partial(run_on_all_ranks, communicator)
    map_files = partial(parallel_map, communicator, num_threads=workers, bar=progress)

    listed = on_all_ranks(
        lambda: [os.path.abspath(image) for image in list_images(folders)], "listing the images"
    )
    repeats = [image for image, count in Counter(listed).items() if count > 1]
    images = sorted(set(listed))
    _check_same(communicator, images, folders)
    digests = map_files(_stamp, images, _digest, "looking for changed files")
    key = _digest([f"{FORMAT_VERSION} {num_classes} {num_keypoint_values}", *digests])
    name = _digest([str(num_classes), *map(str, folders)])
    cache_file = Path(cache_dir or default_cache_dir()) / f"index-{name[:24]}.npz"
    cached = on_all_ranks(lambda: load_cache(cache_file, key), "reading the cached index")
    have = communicator.exchange(cached is not None)
    index = cached if all(have) or not any(have) else communicator.broadcast(have.index(True), cached)
    if index is None:
        read = partial(read_image_record, num_classes=num_classes, num_keypoint_values=num_keypoint_values)
        assemble = partial(assemble_index, num_classes=num_classes)
        parts = map_files(read, images, assemble, "reading the data set")
        index = merge_indexes(parts, [Problem(image, 0, LISTED_TWICE) for image in repeats])
    if not len(index):
        raise UserError(
            f"None of the {len(images)} images in {', '.join(map(str, folders))} can be used",
            by_reason(index.problems),
        )
    keeps = cached is None and communicator.keeps_cache
    on_all_ranks(lambda: save_cache(cache_file, key, index) if keeps else None, "caching the index")
    return index


def _check_same(communicator: Communicator, images: Sequence[str], sources: Sequence[Path]) -> None:
    """Check that all ranks list the same files, since each reads a share of them for all."""
    seen = communicator.exchange((len(images), _digest(images)))
    others = [rank for rank, what in enumerate(seen) if what != seen[0]]
    if others:
        first, other = seen[0][0], seen[others[0]][0]
        names = ", of other names" if first == other else ""
        counts = f"rank 0 finds {first:,} images and rank {others[0]} finds {other:,}{names}"
        rule = "Every host needs the same files under the same paths: share the folder, or copy it again"
        where = ", ".join(map(str, sources))
        raise UserError("The ranks do not see the same data set", [f"{where}: {counts}. {rule}."])


def read_image_record(image: str, num_classes: int, num_keypoint_values: int = 0) -> ImageRecord:
    """Read and check one image and its label file. Depends on nothing else, so any worker or rank can do it."""
    size_hw, reason, detail = check_image(image)
    if size_hw is None:
        return ImageRecord(image, None, no_labels(), (Problem(image, 0, reason, detail),))
    labels, problems = read_labels(label_path(image), num_classes, num_keypoint_values)
    notes = (Problem(image, 0, reason, detail),) if reason else ()
    if problems and not len(labels.classes):
        # It has objects, though none is usable: as a background it would teach that there are none.
        problems.append(Problem(image, 0, NO_ROW_LEFT))
        size_hw = None
    return ImageRecord(image, size_hw, labels, (*notes, *problems))


def _stamp(image: str) -> str:
    return f"{image}\0{_size_and_time(image)}\0{_size_and_time(label_path(image))}"


def _size_and_time(path: str | Path) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the second: a path that cannot be one
        return "-"
    return f"{status.st_size} {status.st_mtime_ns}"


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
