"""Checks of whole splits: objects that got lost on the way, and data that are not what they seem.

Every rank has the same index, so all come to the same errors.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import label_path, list_images
from dsyolo.data.index import DatasetIndex
from dsyolo.data.labels import (
    AS_CORNERS,
    AS_TOP_LEFT,
    CLIPPED,
    DUPLICATE,
    NOT_PIXELS,
    NUM_SHOWN,
    Problem,
    first_places,
)
from dsyolo.data.shared_images import shared_images
from dsyolo.data.unread_labels import MAX_IMAGE_FOLDERS, UnreadLabels, find_unread_labels, unsearched_folders

FEW_LABELLED = 0.2  # a folder where fewer images have labels is suspicious if label-like files lie beside it
MOST_ROWS = 0.5
TOP_LEFT_SHARE, TOP_LEFT_FITS = 0.05, 0.99  # see `_top_left`
CORNER_SHARE, OVERHANG_SHARE, MIRRORED_SHARE, MIN_ROWS = 0.9, 0.2, 0.5, 4  # see `_corners`
MAX_LOOKED_UP = 20_000  # label files of backgrounds
MAX_CLASSES_NAMED = 5
LIKE_NAMED = "label-like files are named as they are"
MOST_LEFT_OUT = 0.01
MOST_COPIES = 0.5  # share of val
MAX_FOUND = 5  # lines about unread files


class SplitReport(NamedTuple):
    """Lines about what is wrong: with `errors` nothing can be trained."""

    errors: list[str]
    warnings: list[str]


def refuse_lost_objects(
    data: DataSpec, splits: Mapping[str, DatasetIndex], *, with_warnings: bool = True
) -> list[str]:
    """Return warnings about splits; none without `with_warnings`, which spares the disk on all ranks but one.

    Raises:
        UserError: the training split has no object, or labels have classes that `data` does not name.
    """
    refuse_unknown_classes(data, splits)
    if not with_warnings and ("train" not in splits or splits["train"].num_boxes):
        return []
    report = check_splits(data, splits)
    if report.errors:
        raise UserError(f"{data.path} has no object to train on", report.errors)
    return report.warnings


def refuse_unknown_classes(data: DataSpec, splits: Mapping[str, DatasetIndex]) -> None:
    """Refuse labels of a class without a name: left out, its objects would be learned as background.

    Raises:
        UserError: labels in `splits` have classes that `data` does not name.
    """
    problems = []
    for split, index in splits.items():
        unknown = index.unknown_classes()
        for detail, rows in list(unknown.items())[:NUM_SHOWN]:
            problems.append(f"{split}: {detail}: {len(rows):,} rows ({first_places(rows)}).")
        if len(unknown) > NUM_SHOWN:
            problems.append(f"{split}: and {len(unknown) - NUM_SHOWN} more such classes.")
    if problems:
        remedy = f"Add these classes to names ({', '.join(data.names[:20])}), or remove the rows."
        if _starts_at_one(data, splits):
            rule = "No row has class 0, so these labels count from 1, and classes count from 0"
            remedy = f"{rule}: subtract 1 from the class of all rows."
        problems[-1] += f" {remedy}"
        raise UserError(f"{data.path} lacks classes that its labels have", problems)


def _starts_at_one(data: DataSpec, splits: Mapping[str, DatasetIndex]) -> bool:
    """Return whether the rows have the classes from 1 to their number, where two or more have names."""
    known = {number for index in splits.values() for number in np.unique(index.classes).tolist()}
    beyond = {detail for index in splits.values() for detail in index.unknown_classes()}
    is_next = len(beyond) == 1 and beyond.pop().startswith(f"class {data.num_classes},")
    return data.num_classes > 1 and 0 not in known and len(known) > 0 and is_next


def check_splits(data: DataSpec, splits: Mapping[str, DatasetIndex]) -> SplitReport:
    """Check the splits of a data set, and those against each other."""
    errors: list[str] = []
    warnings: list[str] = []
    are_read = _label_files(data, splits)
    for split, index in splits.items():
        if not index.num_boxes:
            (errors if split == "train" else warnings).extend(_no_object(split, index, are_read))
        else:
            warnings += _partly_unlabelled(split, index, are_read)
        warnings += _likely_mistakes(split, index)
        warnings += _left_out(split, index)
    if data.names == tuple(f"class{number}" for number in range(data.num_classes)):
        warnings.append(
            f"names: the classes are called class0 to class{data.num_classes - 1}, as where {data.path} "
            "gives none. Name them there."
        )
    if data.num_keypoint_values:
        warnings.append("kpt_shape: keypoints are not learned. The boxes of their rows are.")
    if not errors:
        warnings += _classes_without_objects(data, splits)
    if "train" in splits and "val" in splits:
        warnings += _overlap(splits["train"], splits["val"])
    return SplitReport(errors, warnings)


def _label_files(data: DataSpec, splits: Mapping[str, DatasetIndex]) -> frozenset[str]:
    """Return the label files of all images, those of splits that are not trained on too.

    None where every image has labels, as then nothing is searched.
    """
    if not any(index.num_backgrounds for index in splits.values()):
        return frozenset()
    files = {str(label_path(index.path(i))) for index in splits.values() for i in range(len(index))}
    for split in ("train", "val", "test"):
        if split not in splits and (sources := getattr(data, split)):
            with contextlib.suppress(UserError):  # its folder has no image
                files.update(str(label_path(os.path.abspath(image))) for image in list_images(sources))
    return frozenset(files)


def _no_object(split: str, index: DatasetIndex, are_read: frozenset[str]) -> Iterator[str]:
    images = [index.path(i) for i in range(len(index))]
    missing = sum(not os.path.exists(label_path(image)) for image in images[:MAX_LOOKED_UP])
    looked_up = min(len(images), MAX_LOOKED_UP)
    of = f" (of the first {looked_up:,})" if looked_up < len(images) else ""
    files = "label file is" if missing == 1 else "label files are"
    yield (
        f"{split}: none of its {len(images):,} images has an object: {missing:,} {files} missing, "
        f"{looked_up - missing:,} {'is' if looked_up - missing == 1 else 'are'} empty{of}. The labels of {images[0]} were looked for in {label_path(images[0])}."
    )
    found = find_unread_labels(images[:MAX_LOOKED_UP], are_read)
    yield from _lines(split, found)
    for folder in unsearched_folders(images[:MAX_LOOKED_UP])[:MAX_FOUND]:
        yield f"{split}: {folder} may not be searched for labels. Change its permissions: `chmod -R a+rX`."
    if not found and not missing:
        yield f"{split}: all its label files are there, but empty. Export them again, with their objects."
    elif not found:
        rule = "the folder `images` of a path becomes `labels`, and the ending .txt: docs/data.md"
        yield f"{split}: no label-like file was found near the images. Put the labels there: {rule}."


def _lines(split: str, found: Sequence[UnreadLabels]) -> Iterator[str]:
    for one in found[:MAX_FOUND]:
        yield f"{split}: {one}"
    if len(found) > MAX_FOUND:
        yield f"{split}: and {len(found) - MAX_FOUND} more places with label-like files."


def _partly_unlabelled(split: str, index: DatasetIndex, are_read: frozenset[str]) -> Iterator[str]:
    """Yield warnings for backgrounds near which label-like files lie unread."""
    backgrounds = [index.path(i) for i in np.flatnonzero(np.diff(index.offsets) == 0).tolist()]
    if not backgrounds:
        return
    unlabelled = [path for path in backgrounds[:MAX_LOOKED_UP] if not os.path.exists(label_path(path))]
    per_image = [one for one in find_unread_labels(unlabelled, are_read) if not one.is_for_all]
    if per_image:
        files = "label files match no image" if all(one.is_stray for one in per_image) else LIKE_NAMED
        yield f"{split}: {len(unlabelled):,} images without a label file are taken as backgrounds, but {files}."
        yield from _lines(split, per_image)
    num_images = Counter(os.path.dirname(index.path(i)) for i in range(len(index)))
    num_backgrounds = Counter(map(os.path.dirname, backgrounds))
    few = [f for f, count in num_backgrounds.items() if num_images[f] - count < FEW_LABELLED * num_images[f]]
    few = few[:MAX_IMAGE_FOLDERS]
    within = [path for path in backgrounds if os.path.dirname(path) in few][:MAX_LOOKED_UP]
    found = [one for one in find_unread_labels(within, are_read) if one.is_for_all] if few else []
    for folder in few if found else ():
        labelled = num_images[folder] - num_backgrounds[folder]
        yield f"{split}: only {labelled:,} of {num_images[folder]:,} images in {folder} have objects."
    yield from _lines(split, found)


def _left_out(split: str, index: DatasetIndex) -> Iterator[str]:
    """Yield a warning where more than a few images or rows cannot be used. What they are is in the summary."""
    kinds = Counter((one.line > 0, one.reason) for one in index.problems if one.reason != DUPLICATE)
    rows, images = (
        sum(n for (is_row, reason), n in kinds.items() if is_row == wants_rows and "left out)" in reason)
        for wants_rows in (True, False)
    )
    for number, total, what in (
        (images, images + len(index), "images"),
        (rows, rows + index.num_boxes, "label rows"),
    ):
        if number > MOST_LEFT_OUT * total:
            yield (
                f"{split}: {number:,} of {total:,} {what} cannot be used and are left out: their objects are not "
                "learned. The lines above name the first: correct them or export them again."
            )


def _likely_mistakes(split: str, index: DatasetIndex) -> Iterator[str]:
    """Yield warnings about rows that are most likely in another format than `class cx cy w h` in shares."""
    pixels = [problem for problem in index.problems if NOT_PIXELS in problem.detail]
    num_rows = index.num_boxes + sum(
        problem.line > 0 and problem.reason != CLIPPED for problem in index.problems
    )
    if len(pixels) > MOST_ROWS * num_rows:
        yield (
            f"{split}: {len(pixels):,} of {num_rows:,} label rows look like pixels ({first_places(pixels)}). "
            "They are left out: divide x by the image's width and y by its height."
        )
    if _corners(index):
        clipped = [problem for problem in index.problems if AS_CORNERS in problem.detail]
        places = f" ({first_places(clipped)})" if clipped else ""
        yield (
            f"{split}: most label rows look like corners, x1 y1 x2 y2{places}, "
            "but are read as cx cy w h. Convert them if they are."
        )
    elif clipped := _top_left(index):
        yield (
            f"{split}: {len(clipped):,} of {index.num_boxes:,} boxes are over the left or upper edge "
            f"({first_places(clipped)}), and all would fit if a row were the top left corner, width and height. "
            "They are read as cx cy w h: add half of the width to x and half of the height to y if they are."
        )


def _top_left(index: DatasetIndex) -> list[Problem]:
    """Return the rows over an edge where rows look like the top left corner and the size, as in COCO.

    Read as centres, many of these are over the left or upper edge and none is over the others; and centres would not all
    leave the whole of a box's size to their right and below.
    """
    clipped = [problem for problem in index.problems if problem.reason == CLIPPED]
    fitting = sum(AS_TOP_LEFT in problem.detail for problem in clipped)
    if len(clipped) < max(MIN_ROWS, TOP_LEFT_SHARE * index.num_boxes) or fitting < TOP_LEFT_FITS * len(
        clipped
    ):
        return []
    low, high = index.boxes[:, :2], index.boxes[:, 2:]
    leaves_room = ((low + high) / 2 + (high - low) <= 1.01).all(1)
    return clipped if leaves_room.mean() >= TOP_LEFT_FITS else []


def _corners(index: DatasetIndex) -> bool:
    """Return whether most rows look like corners.

    Corners have w >= cx and h >= cy throughout. Boxes that fill their images have this too, but as well from the other
    side, w >= 1 - cx and h >= 1 - cy, and are not over the image's edge.
    """
    if not index.num_boxes:
        return False
    over = sum(problem.reason == CLIPPED for problem in index.problems)
    low, high = index.boxes[:, :2], index.boxes[:, 2:]
    size, centre = high - low + 1e-6, (low + high) / 2
    is_like, is_mirrored = (size >= centre).all(1), (size >= 1 - centre).all(1)
    is_inside = ((index.boxes > 0) & (index.boxes < 1)).all(1)
    # Boxes at the very edge were clipped, `over` of them, or end there.
    at_edge = max(int((~is_inside).sum()) - over, 0)
    like_corners = sum(AS_CORNERS in problem.detail for problem in index.problems)
    like_corners += int((is_like & is_inside).sum()) + min(at_edge, int((is_like & ~is_inside).sum()))
    if like_corners <= CORNER_SHARE * (over + int(is_inside.sum()) + at_edge):
        return False
    is_one_sided = len(is_like) >= MIN_ROWS and is_mirrored.mean() < MIRRORED_SHARE
    return bool(over > OVERHANG_SHARE * index.num_boxes or is_one_sided)


def _classes_without_objects(data: DataSpec, splits: Mapping[str, DatasetIndex]) -> Iterator[str]:
    in_train: np.ndarray | None = None
    for split, index in splits.items():
        if not index.num_boxes:
            continue
        has_objects = np.bincount(index.classes, minlength=data.num_classes) > 0
        lacking = ~has_objects if in_train is None else ~has_objects & in_train
        names = [data.names[number] for number in np.flatnonzero(lacking).tolist()]
        if names:
            shown = ", ".join(names[:MAX_CLASSES_NAMED])
            more = f" and {len(names) - MAX_CLASSES_NAMED} more" * (len(names) > MAX_CLASSES_NAMED)
            why = "They will never be detected" if split == "train" else "Their metrics are not counted"
            yield f"{split}: no object of the classes {shown}{more}. {why}: check names and labels."
        if split == "train":
            in_train = has_objects


def _overlap(train: DatasetIndex, val: DatasetIndex) -> Iterator[str]:
    common, copies, first = shared_images(train, val)
    remedy = "Metrics of images that were trained on are too good: keep some images for val alone."
    if common and common == len(train) == len(val):
        yield f"val has the same {common:,} images as train. {remedy}"
    elif common:
        yield f"{common:,} of {len(val):,} val images are in train too, as {first}. {remedy}"
    elif copies > MOST_COPIES * len(val):
        what = "have the name, size and labels of one in train, as copies do"
        yield f"{copies:,} of {len(val):,} val images {what}: {first}. {remedy}"
