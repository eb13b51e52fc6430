"""Answers `--data FOLDER`, where labelling tools have exported a data set without a data.yaml."""

import contextlib
import math
from pathlib import Path

import yaml

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import read_text


def missing_data_yaml(folder: Path) -> str:
    """Return what to do with a folder without a data.yaml, as labelling tools export it; empty where nothing is known."""
    names = {one.name for one in folder.iterdir()}
    if "classes.txt" in names:
        with contextlib.suppress(OSError, UserError):
            classes = [line.strip() for line in read_text(folder / "classes.txt").splitlines()]
            listed = yaml.safe_dump(
                list(filter(None, classes)), default_flow_style=True, allow_unicode=True, width=math.inf
            )
            splits = (f"images/{split}" for split in ("train", "val"))
            train, val = (split if (folder / split).is_dir() else "images" for split in splits)
            text = f"`train: {train}`, `val: {val}` (better images of its own) and `names: {listed.strip()}`"
            return f"Write {folder}/data.yaml with the lines {text}, which are those of classes.txt (docs/data.md)."
    if "Annotations" in names:
        return f"If it is an export as Pascal VOC, convert it: dsyolo convert voc {folder} DST."
    if any(name.endswith(".json") for name in names):
        return f"If it is an export as COCO, convert it: dsyolo convert coco {folder} DST."
    return ""
