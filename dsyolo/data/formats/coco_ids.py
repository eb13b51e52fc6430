"""Ids of a COCO file, which tools write as numbers or as text, and sometimes as names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CocoId = int | str | None


def id_key(value: Any) -> CocoId:
    """Return an id so that 7, 7.0 and "7" are the same; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text
    return int(value) if value == value and abs(value) != float("inf") and value == int(value) else str(value)


def required_key(value: Any) -> CocoId:
    """Return `id_key`. Raise TypeError for what is none."""
    key = id_key(value)
    if key is None:
        raise TypeError(f"id must be a number or text, not {value!r}")
    return key


def by_name(records: Mapping[CocoId, list[dict[str, Any]]]) -> dict[str, CocoId]:
    """Return ids by file name and by its stem, for annotations that name their image by these. Ambiguous ones lack."""
    found: dict[str, CocoId] = {}
    for key, entries in records.items():
        for entry in entries:
            name = str(entry.get("file_name", "")).replace("\\", "/")
            for text in {name, Path(name).name, Path(name).stem}:
                found[text] = key if found.get(text, key) == key else None
    return found
