"""Spellings of a path that a data set names, and what is wrong where nothing is found at it."""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsyolo.base.safe_io import TOO_LONG, shortened, why_unusable
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
        close = difflib.get_close_matches(path.name, os.listdir(path.parent), 1, 0.6)
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
