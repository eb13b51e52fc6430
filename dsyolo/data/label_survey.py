"""Reads the labels of a data set without its images, for checks before a run: all of them, or an even sample."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dsyolo.base.errors import UserError
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import label_path
from dsyolo.data.index import DatasetIndex, ImageRecord, assemble_index
from dsyolo.data.labels import by_reason, read_labels
from dsyolo.data.split_checks import refuse_lost_objects

MAX_READ = 20_000  # label files of a split that are read first
_THREADS = 16  # a look-up on a network disk is mostly waiting


def survey_labels(data: DataSpec, images: Mapping[str, Sequence[str]]) -> list[str]:
    """Check the labels of all splits as a training does; return its warnings.

    Args:
        images: the absolute paths of each split's images.

    Raises:
        UserError: what would end a training: no object in train, no row that can be used, unknown classes.
    """
    indexes = {split: _labels_alone(paths, data) for split, paths in images.items()}
    for split, index in indexes.items():
        if not len(index):
            line = f"{split}: no label row of its {len(set(images[split])):,} images can be used."
            raise UserError(f"{data.path} cannot be trained on", [line, *by_reason(index.problems)])
    return refuse_lost_objects(data, indexes)


def _labels_alone(images: Sequence[str], data: DataSpec) -> DatasetIndex:
    """Return an index whose sizes are not those of the images."""
    distinct = sorted(set(images))
    step = -(-len(distinct) // MAX_READ)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = list(pool.map(lambda image: _record(image, data), distinct[::step]))
        if not any(
            len(record.labels.classes) for record in records
        ):  # rare objects may all be beside the sample
            rest = [image for i, image in enumerate(distinct) if i % step]
            records += pool.map(lambda image: _record(image, data), rest)
    return assemble_index(records, data.num_classes)


def _record(image: str, data: DataSpec) -> ImageRecord:
    labels, problems = read_labels(label_path(image), data.num_classes, data.num_keypoint_values)
    is_left_out = bool(problems) and not len(labels.classes)
    return ImageRecord(image, None if is_left_out else (1, 1), labels, tuple(problems))
