"""The COCO format."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import names_in, parse_json, read_bytes, shortened
from dsyolo.base.text import decode, on_disk
from dsyolo.config.messages import did_you_mean
from dsyolo.data.formats.data_format import BAD_OBJECT, NO_IMAGE, DataFormat, Image, Object, SourceDataset
from dsyolo.data.labels import Problem

MOST_JSON_BYTES = 8 << 30  # COCO's own train split has 450 MB
MOST_PAIRS = 1 << 22  # of points, between two parts of an object
CROWD = "crowd (left out)"


class Coco(DataFormat):
    """A COCO folder: annotations/instances_<split>.json, and the images in <split>/ or images/<split>/.

    Class ids become 0 .. K - 1 in the order of the category ids. Polygons are kept, several parts of one object
    joined by a bridge without width; objects given as a mask become boxes; crowds are left out.
    """

    def read(self, src: Path) -> SourceDataset:
        headline = f"{src} cannot be converted from COCO"
        problems: list[Problem] = []
        splits: dict[str, list[Image]] = {}
        categories: dict[str, dict[int, str]] = {}
        for split, file in _coco_files(src, headline).items():
            splits[split], categories[split] = _coco_read(src, file, headline, problems)
        first = next(iter(categories.values()))
        if differ := [split for split in categories if categories[split] != first]:
            rule = f"the categories of {', '.join(differ)} differ from those of {next(iter(categories))}."
            raise UserError(headline, [rule])
        names = [first[number] for number in sorted(first)]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            rule = f"categories: {', '.join(sorted(repeated))} given more than once. Rename or merge them."
            raise UserError(headline, [rule])
        return SourceDataset(splits, names, problems)


def _coco_files(src: Path, headline: str) -> dict[str, Path]:
    folder = src / "annotations"
    files = [folder / name for name in names_in(folder) if name.startswith("instances_")]
    files = [file for file in files if file.suffix == ".json"]
    problems: list[str] = []
    chosen: dict[str, Path] = {}
    for split in ("train", "val", "test"):
        of_split = [file for file in files if file.stem.removeprefix("instances_").startswith(split)]
        if len(of_split) > 1:
            found = ", ".join(file.name for file in of_split)
            problems.append(f"{split}: {found} found. Leave only one in {folder}.")
        elif of_split:
            chosen[split] = of_split[0]
        elif split != "test":
            hint = did_you_mean(f"instances_{split}.json", [file.name for file in folder.glob("*.json")])
            problems.append(f"{split}: no {folder}/instances_{split}*.json. {hint}".rstrip())
    if problems:
        raise UserError(headline, problems)
    return chosen


def _coco_read(
    src: Path, file: Path, headline: str, problems: list[Problem]
) -> tuple[list[Image], dict[int, str]]:
    try:
        given = parse_json(decode(read_bytes(file, MOST_JSON_BYTES), file))
        for key in ("categories", "images", "annotations"):
            if not isinstance(given[key], list):
                raise TypeError(f"{key} must be a list")
        categories = {int(one["id"]): str(one["name"]) for one in given["categories"]}
        records = {one["id"]: one for one in given["images"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = (
            f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
        )
        raise UserError(
            headline, [f"{file}: cannot be read as COCO annotations: {shortened(what)}."]
        ) from error
    objects: dict[Any, list[Object]] = {number: [] for number in records}
    spoiled: set[Any] = set()
    for number, one in enumerate(given["annotations"], 1):
        one = one if isinstance(one, dict) else {}
        place = f"{file} annotation {shortened(str(one.get('id', f'number {number}')))}"
        image: Any = one.get("image_id")
        category: Any = one.get("category_id")
        if one.get("iscrowd"):
            problems.append(Problem(place, 0, CROWD))
        elif not _is_among(image, objects):
            problems.append(Problem(place, 0, BAD_OBJECT, f"image_id {shortened(str(image))}"))
        elif not _is_among(category, categories):
            problems.append(Problem(place, 0, BAD_OBJECT, f"category_id {shortened(str(category))}"))
            spoiled.add(image)
        elif (found := _coco_object(one, categories[category], place)) is None:
            problems.append(Problem(place, 0, BAD_OBJECT, f"bbox {shortened(str(one.get('bbox')))}"))
            spoiled.add(image)
        else:
            objects[image].append(found)
    name = file.stem.removeprefix("instances_")
    folders = [src / name, src / "images" / name, src / "images", src]
    images: list[Image] = []
    for number, record in records.items():
        relative = str(record.get("file_name", ""))
        places = (on_disk(str(folder / relative)) for folder in folders)
        at = next((Path(place) for place in places if os.path.isfile(place)), None)
        if at is None:
            problems.append(Problem(str(folders[0] / relative), 0, NO_IMAGE, f"listed in {file}"))
            continue
        height, width = record.get("height"), record.get("width")
        is_sized = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
        size_hw = (height, width) if is_sized else None
        images.append(Image(at, relative, objects[number], size_hw, number in spoiled))
    return images, categories


def _is_among(number: Any, known: Mapping[Any, Any]) -> bool:
    return not isinstance(number, (list, dict)) and number in known


def _coco_object(one: dict[str, Any], name: str, place: str) -> Object | None:
    segmentation = one.get("segmentation")
    if not isinstance(segmentation, list):
        segmentation = []  # a mask (RLE), or nothing
    try:
        parts = [np.array(part, np.float64).reshape(-1, 2) for part in segmentation]
        parts = [part for part in parts if len(part) >= 3 and np.isfinite(part).all()]
        if parts:
            polygon = join_polygons(parts)
            return Object(name, (*polygon.min(0), *polygon.max(0)), polygon, place)
        x, y, width, height = map(float, one["bbox"])
    except (KeyError, TypeError, ValueError):
        return None
    return Object(name, (x, y, x + width, y + height), None, place)


def join_polygons(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Join polygons into one (P, 2), by bridges without width where they are nearest."""
    joined = parts[0]
    for part in parts[1:]:
        if len(joined) * len(part) > MOST_PAIRS:  # the nearest two would be searched for in gigabytes
            joined = np.concatenate([joined[:1], part, part[:1], joined])
            continue
        gaps = ((joined[:, None] - part[None]) ** 2).sum(-1)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        joined = np.concatenate([joined[: i + 1], part[j:], part[: j + 1], joined[i:]])
    return joined
