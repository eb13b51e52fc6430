"""Where the annotation files and images of a COCO data set are: COCO's own layout, and those of common exports."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import names_in, shortened
from dsyolo.config.messages import did_you_mean
from dsyolo.data.formats.data_format import Image

SPLITS = ("train", "val", "test")
_ROBOFLOW = "_annotations.coco.json"
_ROBOFLOW_FOLDERS = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
# Label Studio, CVAT and others export one file for all images.
_FOR_ALL = (
    "result.json",
    "annotations/instances_default.json",
    "annotations.json",
    _ROBOFLOW,
    "instances.json",
)
VAL_SHARE = 0.1


class CocoFile(NamedTuple):
    """An annotation file, and the folders that its images may be in."""

    file: Path
    folders: list[Path]


def coco_files(src: Path, headline: str) -> dict[str, CocoFile]:
    """Return the annotation file of each split; of the split "" where one file is for all images, or of train alone.

    Raises:
        UserError: no file for train or val, or several for one split.
        OSError: a folder that may not be read, in which nothing would be found.
    """
    folder = src / "annotations"
    names = [name for name in names_in(folder) if name.endswith(".json")]
    files = [folder / name for name in names if name.startswith("instances_")]
    problems: list[str] = []
    chosen: dict[str, CocoFile] = {}
    for split in SPLITS:
        of_split = [file for file in files if file.stem.removeprefix("instances_").startswith(split)]
        exported = [src / name / _ROBOFLOW for name in _ROBOFLOW_FOLDERS[split]]
        of_split = of_split or [file for file in exported if _is_there(file)]
        if len(of_split) > 1:
            found = ", ".join(str(file.relative_to(src)) for file in of_split)
            problems.append(f"{split}: {found} found. Leave only one in {src}.")
        elif of_split:
            chosen[split] = _coco_file(src, of_split[0])
        elif split != "test":
            others = [name for name in names if folder / name not in {one.file for one in chosen.values()}]
            hint = did_you_mean(f"instances_{split}.json", others)
            exports = f"{_ROBOFLOW_FOLDERS[split][0]}/{_ROBOFLOW}"
            problems.append(f"{split}: no {folder}/instances_{split}*.json and no {exports}. {hint}".rstrip())
    for_all = [src / name for name in _FOR_ALL if _is_there(src / name)]
    if not chosen and len(for_all) == 1:
        return {"": _coco_file(src, for_all[0])}
    is_alone = len(names) <= 1 and "val" not in chosen and len(problems) == 1
    if is_alone and "train" in chosen:
        return {"": chosen["train"]}
    if problems:
        raise UserError(headline, problems)
    return chosen


def _is_there(file: Path) -> bool:
    """Return whether a folder has a file. Raise OSError where it may not be read."""
    return file.name in names_in(file.parent) and os.path.isfile(file)


def _coco_file(src: Path, file: Path) -> CocoFile:
    if file.name == _ROBOFLOW:
        return CocoFile(file, [file.parent, file.parent / "images"])
    name = file.stem.removeprefix("instances_")
    return CocoFile(file, [src / name, src / "images" / name, src / "images", src])


def not_annotations(given: Any) -> str | None:
    """Return what a JSON is in the place of COCO annotations, and the rule; None where it is an object."""
    if isinstance(given, dict):
        return None
    rule = "they are an object with images, annotations and categories"
    is_results = isinstance(given, list) and given and isinstance(given[0], dict) and "score" in given[0]
    kind = "a list" if isinstance(given, list) else f"only {shortened(str(given))}"
    what = "detections, as COCO's results are" if is_results else kind
    return f"it holds {what}, and {rule}"


def split_images(images: Sequence[Image]) -> dict[str, list[Image]]:
    """Split images by a hash of their names: one in ten, and at least one, is for validation."""
    # As bytes of the file system: Python spells some names by the locale.
    order = sorted(images, key=lambda image: hashlib.sha256(os.fsencode(image.name)).digest())
    num_val = min(max(1, round(len(images) * VAL_SHARE)), len(images) - 1)
    chosen = {id(image) for image in order[: max(num_val, 0)]}
    return {
        "train": [image for image in images if id(image) not in chosen],
        "val": [image for image in images if id(image) in chosen],
    }
