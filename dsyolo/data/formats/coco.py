"""COCO into the YOLO format. Images are hard links where the file system allows it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.data.formats.writer import (
    BAD_OBJECT,
    NO_IMAGE,
    Conversion,
    Image,
    Object,
    refuse_occupied,
    write_dataset,
)
from dsyolo.data.labels import Problem

CROWD = "crowd (left out)"


def convert_coco(src: str | Path, dst: str | Path) -> Conversion:
    """Convert a COCO folder: annotations/instances_<split>.json, and the images in <split>/ or images/<split>/.

    Class ids become 0 .. K - 1 in the order of the category ids. Polygons are kept, several parts of one object
    joined by a bridge without width; objects given as a mask become boxes; crowds are left out.

    Raises:
        UserError: no COCO layout, categories that differ between the splits, or a `dst` that is not empty.
    """
    src, dst = Path(src), Path(dst)
    refuse_occupied(dst)
    headline = f"{src} cannot be converted from COCO"
    if not src.is_dir():
        raise UserError(headline, ["no such folder."])
    problems: list[Problem] = []
    splits: dict[str, list[Image]] = {}
    categories: dict[str, dict[int, str]] = {}
    for split, file in _coco_files(src, headline).items():
        splits[split], categories[split] = _coco_read(src, file, headline, problems)
    first = next(iter(categories.values()))
    if differ := [split for split in categories if categories[split] != first]:
        raise UserError(
            headline,
            [f"the categories of {', '.join(differ)} differ from those of {next(iter(categories))}."],
        )
    names = [first[number] for number in sorted(first)]
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise UserError(
            headline, [f"categories: {', '.join(repeated)} given more than once. Rename or merge them."]
        )
    return write_dataset(dst, splits, names, problems)


def _coco_files(src: Path, headline: str) -> dict[str, Path]:
    folder = src / "annotations"
    files = sorted(folder.glob("instances_*.json"))
    problems: list[str] = []
    chosen: dict[str, Path] = {}
    for split in ("train", "val", "test"):
        of_split = [file for file in files if file.stem.removeprefix("instances_").startswith(split)]
        if len(of_split) > 1:
            problems.append(
                f"{split}: {', '.join(f.name for f in of_split)} found. Leave only one in {folder}."
            )
        elif of_split:
            chosen[split] = of_split[0]
        elif split != "test":
            there = [p.name for p in folder.glob("*.json")] if folder.is_dir() else []
            close = difflib.get_close_matches(f"instances_{split}.json", there, 1, 0.6)
            hint = f" Did you mean {close[0]}?" if close else ""
            problems.append(f"{split}: no {folder}/instances_{split}*.json.{hint}")
    if problems:
        raise UserError(headline, problems)
    return chosen


def _coco_read(
    src: Path, file: Path, headline: str, problems: list[Problem]
) -> tuple[list[Image], dict[int, str]]:
    try:
        given = json.loads(file.read_bytes())
        for key in ("categories", "images", "annotations"):
            if not isinstance(given[key], list):
                raise TypeError(f"{key} must be a list")
        categories = {int(one["id"]): str(one["name"]) for one in given["categories"]}
        records = {one["id"]: one for one in given["images"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(headline, [f"{file}: cannot be read as COCO annotations: {what}."]) from error
    objects: dict[Any, list[Object]] = {number: [] for number in records}
    spoiled: set[Any] = set()
    for number, one in enumerate(given["annotations"], 1):
        one = one if isinstance(one, dict) else {}
        place = f"{file} annotation {one.get('id', f'number {number}')}"
        image, category = (one.get(key) for key in ("image_id", "category_id"))
        if one.get("iscrowd"):
            problems.append(Problem(place, 0, CROWD, ""))
        elif not _is_among(image, objects):
            problems.append(Problem(place, 0, BAD_OBJECT, f"image_id {image}"))
        elif not _is_among(category, categories):
            problems.append(Problem(place, 0, BAD_OBJECT, f"category_id {category}"))
            spoiled.add(image)
        elif (found := _coco_object(one, categories[category], place)) is None:
            problems.append(Problem(place, 0, BAD_OBJECT, f"bbox {one.get('bbox')}"))
            spoiled.add(image)
        else:
            objects[image].append(found)
    name = file.stem.removeprefix("instances_")
    folders = [src / name, src / "images" / name, src / "images", src]
    images: list[Image] = []
    for number, record in records.items():
        relative = PurePosixPath(str(record.get("file_name", "")))
        safe = relative.name and not relative.is_absolute() and ".." not in relative.parts
        at = next((f / relative for f in folders if (f / relative).is_file()), None) if safe else None
        if at is None:
            problems.append(Problem(str(folders[0] / relative), 0, NO_IMAGE, f"listed in {file}"))
            continue
        size_hw = (record.get("height"), record.get("width"))
        known = all(isinstance(side, int) and side > 0 for side in size_hw)
        images.append(
            Image(at, str(relative), size_hw if known else None, objects[number], number in spoiled)
        )
    return images, categories


def _is_among(number: Any, known: Mapping[Any, Any]) -> bool:
    return not isinstance(number, (list, dict)) and number in known


def _coco_object(one: dict[str, Any], name: str, place: str) -> Object | None:
    try:
        parts = [np.array(part, np.float64).reshape(-1, 2) for part in _parts(one.get("segmentation"))]
        parts = [part for part in parts if len(part) >= 3 and np.isfinite(part).all()]
        if parts:
            polygon = join_polygons(parts)
            return Object(name, (*polygon.min(0), *polygon.max(0)), polygon, place)
        x, y, width, height = (float(value) for value in one["bbox"])
    except (KeyError, TypeError, ValueError):
        return None
    return (
        Object(name, (x, y, x + width, y + height), None, place)
        if np.isfinite([x, y, width, height]).all()
        else None
    )


def _parts(segmentation: Any) -> list[Any]:
    return segmentation if isinstance(segmentation, list) else []  # else a mask (RLE), or nothing


def join_polygons(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join polygons into one (P, 2), by bridges without width where they are nearest."""
    joined = parts[0]
    for part in parts[1:]:
        gaps = ((joined[:, None] - part[None]) ** 2).sum(-1)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        joined = np.concatenate([joined[: i + 1], part[j:], part[: j + 1], joined[i:]])
    return joined
