"""Spellings of a path that a data set names, and what is wrong where nothing is found at it."""

import contextlib
import difflib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import TOO_LONG, read_text, shortened, why_unusable
from dsyolo.data.formats.image_finder import as_posix


def spellings(path: str) -> list[str]:
    """Return a path as it is given, and with a Windows path's separators as `/`."""
    return list(dict.fromkeys((path, as_posix(path))))


def escapes(path: str) -> str:
    """Return a remedy where YAML has read a backslash and a letter between double quotes as a control character."""
    if path.isprintable():
        return ""
    return " Between double quotes YAML reads \\ and a letter as a special character. Write / instead of \\."


def near(path: Path) -> str:
    """Return a did-you-mean for the deepest part of `path` that does not exist."""
    while not os.path.exists(path.parent) and path.parent != path:
        path = path.parent
    try:
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.5)
    except OSError:
        close = []
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def images_beside(folder: Path) -> str:
    """Return a did-you-mean for the images of a folder of labels."""
    parts = list(folder.parts)
    for i, part in enumerate(parts):
        if part.lower() == "labels" and os.path.isdir(beside := Path(*parts[:i], "images", *parts[i + 1 :])):
            return f" Did you mean {beside}?"
    return ""


def tried(paths: Iterable[Path]) -> str:
    """Return where something was looked for, with what is special about a place: a broken link, a folder without access."""
    usual = "does not exist"
    reasons = {str(path): why_unusable(path) for path in paths}
    listed = (shortened(path) + (f" ({why})" if why != usual else "") for path, why in reasons.items())
    return f"tried {', '.join(listed)}"


def unusable(paths: Sequence[Path]) -> str:
    """Return what is wrong with a thing that was found at none of these paths."""
    reasons = {why_unusable(path) for path in paths}
    return reasons.pop() if reasons == {TOO_LONG} else f"does not exist: {tried(paths)}"


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
