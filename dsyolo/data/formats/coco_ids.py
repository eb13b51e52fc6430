"""Ids of a COCO file, which tools write as numbers or as text, and sometimes as names."""

from collections.abc import Callable, Mapping, Sequence
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


def read_names(categories: Sequence[Mapping[str, Any]]) -> dict[CocoId, str]:
    """Return the names of categories by id.

    Raises:
        KeyError, TypeError, ValueError: a category lacks its id or name, has another than text or a number, or one
            id is given for two names.
    """
    names: dict[CocoId, str] = {}
    for one in categories:
        key, name = required_key(one["id"]), one["name"]
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            raise TypeError(f"the name of category {key} must be text, not {name!r}")
        name = str(name).strip()
        if names.setdefault(key, name) != name:
            raise ValueError(f"category id {key} is given for {names[key]} and for {name}")
    return names


def image_finder(
    records: Mapping[CocoId, list[dict[str, Any]]], annotations: Sequence[Any]
) -> Callable[[Any], CocoId]:
    """Return what finds the image of an annotation by its image_id; None for that of no image.

    Names of files count where ids are text, or where no id of the whole file matches: a number that is only by
    chance the name of another image's file does not.
    """
    ids_by_name = by_name(records)
    has_ids = any(id_key(one.get("image_id")) in records for one in annotations if isinstance(one, dict))

    def find(image_id: Any) -> CocoId:
        key = id_key(image_id)
        if key in records:
            return key
        return ids_by_name.get(str(image_id)) if isinstance(key, str) or not has_ids else None

    return find


def by_name(records: Mapping[CocoId, list[dict[str, Any]]]) -> dict[str, CocoId]:
    """Return ids by file name and by its stem, for annotations that name their image by these. Ambiguous ones lack."""
    found: dict[str, CocoId] = {}
    for key, entries in records.items():
        for entry in entries:
            name = str(entry.get("file_name", "")).replace("\\", "/")
            for text in {name, Path(name).name, Path(name).stem}:
                found[text] = key if found.get(text, key) == key else None
    return found
