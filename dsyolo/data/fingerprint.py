"""Fingerprints that show in a few kilobytes whether two hosts have the same data set, and where they differ.

They cover the paths of all images, the sizes of images and label files, and the content of label files; in large data
sets, the sizes of a sample and the content of a smaller one. The sample depends on the paths alone, so all hosts take
the same. A million images cost a listing of their folders and some 100,000 look-ups.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dsyolo.base.safe_io import read_bytes
from dsyolo.data.formats.yolo import label_path, list_images, read_data_yaml
from dsyolo.data.label_survey import survey_labels
from dsyolo.data.labels import MOST_LABEL_BYTES

MAX_SIZES = 100_000  # images whose size is looked up, and their labels'
MAX_READ = 2_000  # label files that are read
BUCKETS = 1024
MAX_LISTED = 2_000
SPLITS = ("train", "val")
_THREADS = 16  # a look-up on a network disk is mostly waiting
_CHUNK = 64  # images per task


def of_data(path: str, buckets: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """Return a fingerprint of each split of a data.yaml, and warnings about its labels, in plain JSON types.

    Args:
        buckets: the buckets of each split to list instead, for a second look where fingerprints differ.

    Raises:
        UserError: the data.yaml or its folders cannot be used, or its labels would end a training.
    """
    data = read_data_yaml(path)
    images = {split: [os.path.abspath(p) for p in list_images(getattr(data, split))] for split in SPLITS}
    if buckets is not None:
        return {"listed": {split: listed(images[split], wanted) for split, wanted in buckets.items()}}
    splits = {split: fingerprint(paths) for split, paths in images.items()}
    survey = survey_labels(data, images)
    for split, found in splits.items():
        found |= {"num_unread": survey.num_unread[split], "problems": survey.problems[split]}
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return {"digest": digest, "splits": splits, "warnings": survey.warnings}


def fingerprint(images: Sequence[str]) -> dict[str, Any]:
    """Return the number of images, the share that was looked up and read, and a sum of hashes per bucket."""
    sums = [0] * BUCKETS
    for image, entry in _entries(images):
        hashed = hashlib.blake2b(entry.encode(errors="surrogateescape"), digest_size=8)
        bucket = _bucket(image)
        sums[bucket] = (sums[bucket] + int.from_bytes(hashed.digest(), "big")) % 2**64
    one_in = {"sizes": _one_in(len(images), MAX_SIZES), "labels": _one_in(len(images), MAX_READ)}
    return {"num_images": len(images), "one_in": one_in, "buckets": [f"{one:x}" for one in sums]}


def listed(images: Sequence[str], buckets: Iterable[int]) -> dict[str, str]:
    """Return by path the entries of some buckets: sizes of image and label in bytes, hash of the label."""
    entries = islice(_entries(images, set(buckets)), MAX_LISTED)
    return {image: entry.partition("\0")[2] for image, entry in entries}


def _bucket(image: str) -> int:
    return zlib.crc32(os.fsencode(image)) >> 22  # the upper ten bits; the lower ones choose the sample


def _one_in(num_images: int, most: int) -> int:
    """Return the smallest power of two that leaves at most `most` images."""
    return 1 << max(0, (-(-num_images // most) - 1).bit_length())


def _entries(images: Sequence[str], buckets: set[int] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (path, entry) of all images, or of those in some buckets, in no order."""
    sizes, reads = _one_in(len(images), MAX_SIZES), _one_in(len(images), MAX_READ)
    to_see = []
    for image in images:
        chosen = zlib.crc32(os.fsencode(image))
        if buckets is not None and _bucket(image) not in buckets:
            continue
        if chosen % sizes:
            yield image, image
        else:
            to_see.append((image, not chosen % reads))
    chunks = [to_see[first : first + _CHUNK] for first in range(0, len(to_see), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from chain.from_iterable(
            pool.map(lambda chunk: [(image, _seen(image, is_read)) for image, is_read in chunk], chunks)
        )


def _seen(image: str, is_read: bool) -> str:
    label = label_path(image)
    entry = f"{image}\0image {_size(image)}, label {_size(label)}"
    if is_read:
        try:
            entry += f", content {hashlib.sha256(read_bytes(label, MOST_LABEL_BYTES)).hexdigest()[:12]}"
        except OSError:
            entry += ", no content"
    return entry


def _size(path: str | Path) -> str:
    try:
        return f"{os.stat(path).st_size} bytes"
    except OSError:
        return "missing"
