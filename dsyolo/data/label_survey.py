"""Reads the labels of a data set without its images, for checks before a run: all of them, or an even sample."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import label_path
from dsyolo.data.index import ImageRecord, assemble_index
from dsyolo.data.labels import by_reason, read_labels
from dsyolo.data.split_checks import refuse_lost_objects

MAX_READ = 20_000  # label files of a split that are read first
_THREADS = 16  # a look-up on a network disk is mostly waiting


class Survey(NamedTuple):
    """The reports of a training on the labels, by split where it says so."""

    warnings: list[str]
    problems: dict[str, list[str]]  # rows that are left out or clipped: a line for each reason
    num_unread: dict[str, int]  # label files


def survey_labels(data: DataSpec, images: Mapping[str, Sequence[str]]) -> Survey:
    """Check the labels of all splits as a training does.

    Args:
        images: the absolute paths of each split's images.

    Raises:
        UserError: what would end a training: no object in train, no row that can be used, unknown classes.
    """
    records = {split: _records(paths, data) for split, paths in images.items()}
    indexes = {split: assemble_index(found, data.num_classes) for split, found in records.items()}
    for split, index in indexes.items():
        if not len(index):
            line = f"{split}: no label row of its {len(set(images[split])):,} images can be used."
            raise UserError(f"{data.path} cannot be trained on", [line, *by_reason(index.problems)])
    return Survey(
        refuse_lost_objects(data, indexes),
        {split: [line.strip() for line in by_reason(index.problems)] for split, index in indexes.items()},
        {split: len(set(images[split])) - len(found) for split, found in records.items()},
    )


def _records(images: Sequence[str], data: DataSpec) -> list[ImageRecord]:
    """Return the labels of all images, or of an even sample; the sizes are not those of the images."""
    distinct = sorted(set(images))
    step = -(-len(distinct) // MAX_READ)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = list(pool.map(lambda image: _record(image, data), distinct[::step]))
        # Rare objects may all be beside the sample.
        if not any(len(record.labels.classes) for record in records):
            rest = [image for i, image in enumerate(distinct) if i % step]
            records += pool.map(lambda image: _record(image, data), rest)
    return records


def _record(image: str, data: DataSpec) -> ImageRecord:
    labels, problems = read_labels(label_path(image), data.num_classes, data.num_keypoint_values)
    is_left_out = bool(problems) and not len(labels.classes)
    return ImageRecord(image, None if is_left_out else (1, 1), labels, tuple(problems))
