"""Whether two hosts have the same data set, told from a few kilobytes each, and where they differ.

It covers the paths of all images, the sizes of images and label files, and the content of label files; of large data
sets the sizes of a part and the content of a smaller one. Which part that is depends on the paths alone, so all hosts
take the same. A million images cost a listing of their folders and some 100,000 look-ups.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsyolo.data.formats.yolo import label_path, list_images, read_data_yaml

MAX_SIZES = 100_000  # images whose size is looked up, and their labels'
MAX_READ = 2_000  # label files that are read
BUCKETS = 1024
MAX_LISTED = 2_000
SPLITS = ("train", "val")
_THREADS = 16  # a look-up on a network's disk is a wait
_CHUNK = 64  # images per task


def of_data(path: str, buckets: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """A fingerprint of each split of a data.yaml, in plain JSON types.

    Args:
        buckets: of each split, those whose images are listed: a second look, where fingerprints differ.

    Raises:
        UserError: the data.yaml or its folders cannot be used.
    """
    data = read_data_yaml(path)
    images = {split: [os.path.abspath(p) for p in list_images(getattr(data, split))] for split in SPLITS}
    if buckets is not None:
        return {"listed": {split: listed(images[split], wanted) for split, wanted in buckets.items()}}
    splits = {split: fingerprint(paths) for split, paths in images.items()}
    return {"digest": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "splits": splits}


def fingerprint(images: Sequence[str]) -> dict[str, Any]:
    """Number of images, which part of them was looked up and read, and a sum of hashes for each bucket of them."""
    sums = [0] * BUCKETS
    for image, record in _records(images):
        hashed = hashlib.blake2b(record.encode(errors="surrogateescape"), digest_size=8)
        bucket = _bucket(image)
        sums[bucket] = (sums[bucket] + int.from_bytes(hashed.digest(), "big")) % 2**64
    one_in = {"sizes": _one_in(len(images), MAX_SIZES), "labels": _one_in(len(images), MAX_READ)}
    return {"num_images": len(images), "one_in": one_in, "buckets": [f"{one:x}" for one in sums]}


def listed(images: Sequence[str], buckets: Iterable[int]) -> dict[str, str]:
    """By path, what is known of the images of some buckets: sizes of image and label in bytes, hash of the label."""
    wanted = set(buckets)
    records = {}
    for image, record in _records(images, wanted):
        if len(records) == MAX_LISTED:
            break
        records[image] = record.partition("\0")[2]
    return records


def _bucket(image: str) -> int:
    return (
        zlib.crc32(os.fsencode(image)) >> 22
    )  # the upper ten bits; the lower ones choose the part looked up


def _one_in(num_images: int, most: int) -> int:
    """The least power of two that leaves at most `most` images."""
    return 1 << max(0, (-(-num_images // most) - 1).bit_length())


def _records(images: Sequence[str], buckets: set[int] | None = None) -> Iterator[tuple[str, str]]:
    """(path, path and what is known of it) of all images, or of those in some buckets, in no order."""
    sizes, reads = _one_in(len(images), MAX_SIZES), _one_in(len(images), MAX_READ)
    to_see = []
    for image in images:
        if buckets is not None and _bucket(image) not in buckets:
            continue
        chosen = zlib.crc32(os.fsencode(image))
        if chosen % sizes:
            yield image, image
        else:
            to_see.append((image, not chosen % reads))
    with ThreadPoolExecutor(_THREADS) as pool:
        chunks = [to_see[first : first + _CHUNK] for first in range(0, len(to_see), _CHUNK)]
        for seen in pool.map(
            lambda chunk: [(image, _seen(image, is_read)) for image, is_read in chunk], chunks
        ):
            yield from seen


def _seen(image: str, is_read: bool) -> str:
    label = label_path(image)
    record = f"{image}\0image {_size(image)}, label {_size(label)}"
    if is_read:
        try:
            record += f", content {hashlib.sha256(label.read_bytes()).hexdigest()[:12]}"
        except OSError:
            record += ", no content"
    return record


def _size(path: str | Path) -> str:
    try:
        return f"{os.stat(path).st_size} bytes"
    except OSError:
        return "missing"
