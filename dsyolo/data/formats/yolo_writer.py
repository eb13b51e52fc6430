"""Writes a YOLO data set: the folder appears complete, or not at all."""

import contextlib
import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import yaml

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import shortened
from dsyolo.base.text import name_fault
from dsyolo.data.formats.data_format import BAD_OBJECT, NO_IMAGE, Image, Object, SourceDataset
from dsyolo.data.formats.frames import MeasuredImage, are_of_stored, fit_objects, read_orientation
from dsyolo.data.formats.result_names import listed_name
from dsyolo.data.formats.source_checks import suspicions
from dsyolo.data.formats.yolo import label_path, list_images
from dsyolo.data.images import check_image
from dsyolo.data.labels import NO_SIZE, Problem, by_reason, refused_rows

BAD_IMAGE = "image cannot be used (left out)"
BAD_POLYGON = "object whose polygon is not of three points or more (left out)"
DEGENERATE = "box without width or height (left out)"
OVER_EDGE = "box over the image's edge (clipped)"
NO_OBJECT_LEFT = "none of its objects can be used (image left out)"
SAME_LABEL = "another image has the same name but for its ending (left out)"
IN_TWO_SPLITS = "image in train and in val (kept in both)"
RENAMED = "a training would not list its name (renamed in the result)"


@dataclass
class Conversion:
    """The result of a conversion, and the problems of the source."""

    data_yaml: Path
    names: tuple[str, ...]
    num_images: dict[str, int] = field(default_factory=dict)
    num_objects: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what holds for the whole, and warnings

    def summary(self) -> str:
        counts = "; ".join(
            f"{s} {self.num_images[s]:,} images, {self.num_objects[s]:,} objects" for s in self.num_images
        )
        lines = [f"{self.data_yaml}: {len(self.names)} classes; {counts}", *self.notes]
        if self.problems:
            lines += [f"{len(self.problems):,} problems:", *by_reason(self.problems)]
        return "\n".join(lines)


def write_dataset(dst: Path, source: SourceDataset) -> Conversion:
    """Build the data set beside `dst`, then rename it: `dst` appears complete, or not at all.

    Raises:
        UserError: train, val or another split has no usable image, train has no object, or `dst` cannot be written.
    """
    faults = [f"class {i}: {fault}." for i, name in enumerate(source.names) if (fault := name_fault(name))]
    if faults:
        raise UserError(f"{dst} was not written: its classes cannot have these names", faults)
    problems = list(source.problems)
    result = Conversion(dst / "data.yaml", tuple(source.names), problems=problems, notes=list(source.notes))
    numbers = {name: number for number, name in enumerate(source.names)}
    with new_folder(dst) as building:
        order = dict.fromkeys(("train", "val", *source.splits))
        measured = {split: _measured(source.splits.get(split, []), problems) for split in order}
        problems += _in_two_splits(measured["train"], measured["val"])
        of_stored = are_of_stored(one for images in measured.values() for one in images)
        classes: dict[str, Counter[int]] = {}
        for split, images in measured.items():
            counts = [_write_image(one, of_stored, building, split, numbers, problems) for one in images]
            written = [count for count in counts if count is not None]
            classes[split] = sum(written, Counter())
            result.num_images[split], result.num_objects[split] = len(written), classes[split].total()
        faults = [
            f"{split}: no image can be used." for split, count in result.num_images.items() if not count
        ]
        if not faults and not classes["train"]:
            faults.append(f"train: none of its {result.num_images['train']:,} images has an object.")
        if faults:
            raise UserError(f"{dst} was not written", [*faults, *source.notes, *by_reason(problems)])
        _check_listed(building, dst, result)
        result.notes += suspicions(source, classes)
        write_data_yaml(building, source.names, list(result.num_images))
    return result


def _check_listed(building: Path, dst: Path, result: Conversion) -> None:
    """Raise UserError where a training would list other images than those that were written."""
    for split, count in result.num_images.items():
        listed = len(list_images([building / "images" / split]))
        if listed != count:
            rule = f"{split}: {count:,} images were written, but a training would list {listed:,}"
            raise UserError(f"{dst} was not written", [f"{rule}. Rename the images of the source."])


def _measured(images: Sequence[Image], problems: list[Problem]) -> list[MeasuredImage]:
    """Return the images of a split that can be used; report the others."""
    usable = []
    labels: set[PurePosixPath] = set()
    for image in images:
        file, name = str(image.file), PurePosixPath(image.name)
        if name.is_absolute() or ".." in name.parts:
            problems.append(Problem(file, 0, NO_IMAGE, f"its name, {name}, leads out of the folder"))
            continue
        size_hw, reason, detail = check_image(image.file)
        if size_hw is None:
            problems.append(Problem(file, 0, BAD_IMAGE, f"{reason.split(' (')[0]}: {detail}"))
            continue
        name = listed_name(image.file, name)
        if name.with_suffix("") in labels:
            problems.append(Problem(file, 0, SAME_LABEL))
            continue
        if name != PurePosixPath(image.name):
            problems.append(Problem(file, 0, RENAMED, shortened(str(name))))
        labels.add(name.with_suffix(""))
        if reason:
            problems.append(Problem(file, 0, reason, detail))
        orientation = read_orientation(image.file, size_hw)
        usable.append(MeasuredImage(image._replace(name=str(name)), size_hw, orientation))
    return usable


def _in_two_splits(train: Sequence[MeasuredImage], val: Sequence[MeasuredImage]) -> list[Problem]:
    """Return a problem for each file that both splits have, under whatever name."""
    seen = {(status.st_dev, status.st_ino) for status in (os.stat(one.image.file) for one in train)}
    files = [str(one.image.file) for one in val]
    found = [f for f, status in ((f, os.stat(f)) for f in files) if (status.st_dev, status.st_ino) in seen]
    return [Problem(file, 0, IN_TWO_SPLITS) for file in sorted(found)]


def _write_image(
    measured: MeasuredImage,
    of_stored: bool,
    folder: Path,
    split: str,
    numbers: dict[str, int],
    problems: list[Problem],
) -> Counter[int] | None:
    """Write an image and its labels; return its objects by class, or None if the image is left out, and report it."""
    image, file = measured.image, str(measured.image.file)
    fitted = fit_objects(measured, of_stored)
    if fitted.reason:
        problems.append(Problem(file, 0, fitted.reason, fitted.detail))
    if fitted.objects is None:
        return None
    rows = _rows(fitted.objects, numbers, measured.seen_hw, problems)
    if not rows and (image.objects or image.is_spoiled):
        # As a background it would teach that it has no objects (as in `read_image_record`).
        problems.append(Problem(file, 0, NO_OBJECT_LEFT))
        return None
    if fault := _write_files(image, rows, folder / "images" / split / PurePosixPath(image.name)):
        problems.append(Problem(file, 0, NO_IMAGE, fault))
        return None
    return Counter(rows.values())


def _write_files(image: Image, rows: Iterable[str], target: Path) -> str:
    """Write an image and its rows. Return why it has to be left out, or an empty string."""
    label = label_path(target)  # where it is read from, if the name has a folder `images` too
    try:
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        _link(image.file, target)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            with contextlib.suppress(OSError):
                label.unlink(missing_ok=True)
            return f"its name in the result is longer than any file's: {shortened(image.name)}"
        rule = f"{error.strerror}. Choose another folder"
        raise UserError(f"{label} cannot be written", [f"{rule}."]) from error
    return ""


def _rows(
    objects: Sequence[Object], numbers: dict[str, int], size_hw: tuple[int, int], problems: list[Problem]
) -> dict[str, int]:
    """Return label rows, clipped to the image, and their classes."""
    rows: dict[str, Object] = {}
    wh = np.array([size_hw[1], size_hw[0]], np.float64)
    for one in objects:
        corners = np.array(one.box_xyxy, np.float64).reshape(2, 2) / wh
        inside = corners.clip(0, 1)
        size = inside[1] - inside[0]
        reason = None
        polygon = None if one.polygon is None else np.asarray(one.polygon, np.float64)
        if not np.isfinite(corners).all():
            reason = BAD_OBJECT
        elif polygon is not None and (len(polygon) < 3 or not np.isfinite(polygon).all()):
            reason = BAD_POLYGON
        elif (size <= 0).any():
            reason = DEGENERATE
        elif (np.abs(inside - corners) * wh).max() > 1:
            reason = OVER_EDGE
        if reason:
            given = " ".join(f"{value:g}" for value in one.box_xyxy)
            detail = f"{given} in an image of {size_hw[1]} x {size_hw[0]}"
            problems.append(Problem(one.place, 0, reason, detail))
        if reason in (None, OVER_EDGE):
            box = np.stack([inside.mean(0), size])
            values = box if polygon is None else (polygon / wh).clip(0, 1)
            rows.setdefault(label_row(numbers[one.name], values), one)
    readable = _readable(rows, size_hw, len(numbers), problems)
    return {row: numbers[rows[row].name] for row in readable}


def _readable(
    rows: Mapping[str, Object], size_hw: tuple[int, int], num_classes: int, problems: list[Problem]
) -> list[str]:
    """Return the rows that a training will read. Others are slivers at the image's edge, which six digits make empty."""
    faults = {fault.line - 1: fault for fault in refused_rows(list(rows), num_classes)}
    for at, fault in faults.items():
        one = list(rows.values())[at]
        given = " ".join(f"{value:g}" for value in one.box_xyxy)
        detail = f"{given} in an image of {size_hw[1]} x {size_hw[0]}"
        reason = DEGENERATE if fault.reason == NO_SIZE else fault.reason
        problems.append(Problem(one.place, 0, reason, detail))
    return [row for at, row in enumerate(rows) if at not in faults]


def label_row(number: int, values: np.ndarray) -> str:
    """Return a row of a label file: a class, and shares with six digits, 0.001 px of 1,000."""
    return " ".join([str(number), *(f"{value:.6f}" for value in values.ravel())])


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or links not allowed
        shutil.copyfile(source, target)


def write_data_yaml(folder: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Write data.yaml without `path:`, so that the splits are relative to it and the folder can be moved."""
    content = {**{split: f"images/{split}" for split in splits}, "names": dict(enumerate(names))}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def refuse_occupied(dst: Path) -> None:
    """Raise UserError if `dst` exists and is anything but an empty folder."""
    if dst.exists() and not dst.is_dir():
        raise UserError(f"{dst} was not written", ["it is a file. Name a new folder."])
    if dst.is_dir() and any(dst.iterdir()):
        raise UserError(f"{dst} was not written", ["it is not empty. Name a new folder, or remove it."])


@contextlib.contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """Yield a folder beside `dst` to build in: renamed to `dst` at the end, or removed after a failure.

    Raises:
        UserError: `dst` is not empty, or cannot be created.
    """
    refuse_occupied(dst)
    building = dst.with_name(f"{dst.name}.tmp-{os.getpid()}")
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{dst} was not written", [f"{building} cannot be created: {error}"]) from error
    try:
        yield building
        try:
            os.replace(building, dst)  # onto nothing or an empty folder
        except OSError as error:
            raise UserError(f"{dst} was not written", [f"{building} cannot be renamed: {error}"]) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
