"""The COCO format."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import parse_json, read_bytes, shortened
from dsyolo.base.text import decode
from dsyolo.data.formats.coco_ids import CocoId, id_key, image_finder, read_names, required_key
from dsyolo.data.formats.coco_layout import CocoFile, coco_files, not_annotations, split_images
from dsyolo.data.formats.coco_shapes import (
    agrees,
    has_area_of_corners,
    is_bad,
    num_short_parts,
    read_box,
    read_polygon,
)
from dsyolo.data.formats.data_format import (
    BAD_OBJECT,
    NO_IMAGE,
    DataFormat,
    Image,
    Object,
    SourceDataset,
    read_size,
)
from dsyolo.data.formats.image_finder import ImageFinder
from dsyolo.data.labels import Problem

MOST_COCO_BYTES = 8 << 30  # COCO's own train split has 450 MB
MOST_NAME = 1000  # characters of a file's name that are shown
CROWD = "crowd (left out)"
BAD_SEGMENTATION = "segmentation cannot be used (its bbox is)"
SHORT_PART = "segmentation has a part of fewer than three points (part left out)"
EMPTY_SUPER = "super-category without objects (dropped)"
SAME_ID = "several images have its id (image left out)"
NOT_MATCHED = "no annotation is of it, while others are of no image (image left out)"
FEW_UNMATCHED = 0.05  # image ids of no image, as a share of the images without annotations
MOST_CORNERS = 0.5
AMBIGUOUS = "several entries lead to this file (left out)"


@dataclass
class _Split:
    """An annotation file as it was read."""

    images: list[Image]
    categories: dict[CocoId, str]
    supers: dict[CocoId, str]
    used: set[CocoId] = field(default_factory=set)  # categories that have annotations


class Coco(DataFormat):
    """A COCO folder: annotations/instances_<split>.json, and the images in <split>/ or images/<split>/.

    Exports of Roboflow (train/_annotations.coco.json), CVAT and Label Studio (one file for all images) are read too.
    Class ids become 0 .. K - 1 in the order of the category ids. Polygons are kept, several parts of one object
    joined by a bridge without width; objects given as a mask become boxes; crowds are left out.
    """

    def read(self, src: Path) -> SourceDataset:
        headline = f"{src} cannot be converted from COCO"
        problems: list[Problem] = []
        notes: list[str] = []
        files = coco_files(src, headline)
        read = {split: _Reader(file, headline, problems, notes).read() for split, file in files.items()}
        first = next(iter(read.values()))
        if differ := [split for split in read if read[split].categories != first.categories]:
            rule = f"the categories of {', '.join(differ)} differ from those of {next(iter(read))}."
            raise UserError(headline, [rule])
        if not first.categories:
            listed = ", ".join(str(file.file) for file in files.values())
            rule = "categories is empty. Export the data set with its classes"
            raise UserError(headline, [f"{listed}: {rule}."])
        for key in _empty_supers(first, set().union(*(one.used for one in read.values()))):
            problems.append(
                Problem(str(next(iter(files.values())).file), 0, EMPTY_SUPER, first.categories.pop(key))
            )
        names = [
            first.categories[key] for key in sorted(first.categories, key=lambda k: (isinstance(k, str), k))
        ]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            rule = f"categories: {', '.join(sorted(repeated))} given more than once. Rename or merge them."
            raise UserError(headline, [rule])
        splits = {split: one.images for split, one in read.items()}
        if "" in splits:
            splits = split_images(splits[""])
            counts = f"{len(splits['val']):,} for val, {len(splits['train']):,} for train"
            notes.append(f"{files[''].file} is for all images: split by a hash of their names, {counts}.")
        return SourceDataset(splits, names, problems, notes)


def _empty_supers(split: _Split, used: set[CocoId]) -> list[CocoId]:
    """Return categories without annotations that are only the super-category of others, as Roboflow exports one."""
    above = {name for key, name in split.supers.items() if name != split.categories[key]}
    empty = [key for key, name in split.categories.items() if key not in used and name in above]
    return empty if len(empty) < len(split.categories) else []


class _Reader:
    """Reads one annotation file."""

    def __init__(self, coco_file: CocoFile, headline: str, problems: list[Problem], notes: list[str]) -> None:
        self._file, self._folders = coco_file
        self._headline, self._problems, self._notes = headline, problems, notes
        self._unmatched = self._uncategorised = self._named = self._corners = self._with_area = 0

    def read(self) -> _Split:
        given, categories, supers, records = self._sections()
        split = _Split([], categories, supers)
        objects: dict[CocoId, list[Object]] = {key: [] for key in records}
        annotated: set[CocoId] = set()  # images with any annotation
        spoiled: set[CocoId] = set()
        annotations = given["annotations"]
        image_of = image_finder(records, annotations)
        unmatched: set[str] = set()  # image ids
        for number, one in enumerate(annotations, 1):
            one = one if isinstance(one, dict) else {}
            place = f"{self._file} annotation {shortened(str(one.get('id', f'number {number}')))}"
            image, category = image_of(one.get("image_id")), id_key(one.get("category_id"))
            self._named += image is not None and image != id_key(one.get("image_id"))
            if image is not None:
                annotated.add(image)
            if category in categories:
                split.used.add(category)
            if _is_crowd(one):
                self._problems.append(Problem(place, 0, CROWD))
                if image is not None:
                    spoiled.add(image)
            elif image is None:
                self._unmatched += 1
                unmatched.add(repr(one.get("image_id")))
                detail = f"image_id {shortened(repr(one.get('image_id')))} is no image's id"
                self._problems.append(Problem(place, 0, BAD_OBJECT, detail))
            elif category not in categories:
                detail = f"category_id {shortened(repr(one.get('category_id')))} is no category's id"
                self._problems.append(Problem(place, 0, BAD_OBJECT, detail))
                self._uncategorised += 1
                spoiled.add(image)
            elif (found := self._object(one, categories[category], place)) is None:
                self._problems.append(
                    Problem(place, 0, BAD_OBJECT, f"bbox {shortened(str(one.get('bbox')))}")
                )
                spoiled.add(image)
            else:
                objects[image].append(found)
        self._check_shares(len(annotations), sum(len(one) for one in objects.values()))
        unsure = self._unsure({key for key in records if key not in annotated}, len(unmatched))
        split.images = self._images(records, objects, spoiled, unsure)
        return split

    def _sections(
        self,
    ) -> tuple[dict[str, Any], dict[CocoId, str], dict[CocoId, str], dict[CocoId, list[dict[str, Any]]]]:
        """Return the content, categories and their super-categories by id, and images by id."""
        try:
            given = parse_json(decode(read_bytes(self._file, MOST_COCO_BYTES), self._file))
            if fault := not_annotations(given):
                raise TypeError(fault)
            for key in ("categories", "images", "annotations"):
                if not isinstance(given[key], list):
                    raise TypeError(f"{key} must be a list")
            categories = read_names(given["categories"])
            supers = {id_key(one["id"]): str(one.get("supercategory", "")) for one in given["categories"]}
            records: dict[CocoId, list[dict[str, Any]]] = {}
            for one in given["images"]:
                records.setdefault(required_key(one["id"]), []).append(one)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            what = (
                f"no {error}"
                if isinstance(error, KeyError)
                else getattr(error, "strerror", None) or str(error)
            )
            rule = f"{self._file}: cannot be read as COCO annotations: {shortened(what)}."
            if isinstance(error, json.JSONDecodeError):
                rule += " It is not a complete JSON: copy or export it again."
            raise UserError(self._headline, [rule]) from error
        return given, categories, supers, records

    def _unsure(self, backgrounds: set[CocoId], num_unmatched: int) -> set[CocoId]:
        """Return the backgrounds that may be those whose annotations are of no image: none where these are few."""
        if not num_unmatched or num_unmatched >= FEW_UNMATCHED * len(backgrounds):
            return backgrounds if num_unmatched else set()
        counts = f"{len(backgrounds):,} images without annotations are kept as backgrounds"
        self._notes.append(f"{self._file}: {counts}, though {num_unmatched:,} image ids are of no image.")
        return set()

    def _check_shares(self, num_annotations: int, num_objects: int) -> None:
        """Note which share of the annotations matches no image. Raise UserError where none can be used."""
        if self._named:
            what = "annotations name their image by its file's name, not by its id"
            self._notes.append(f"{self._file}: {self._named:,} {what}.")
        if self._corners > MOST_CORNERS * self._with_area:
            counts = f"in {self._corners:,} of {self._with_area:,} annotations without a polygon"
            what = f"{counts} area is that of corners x1 y1 x2 y2, but bbox is read as x y width height"
            self._notes.append(f"{self._file}: {what}. Convert bbox.")
        if self._unmatched:
            share = self._unmatched / num_annotations
            line = f"{self._file}: {self._unmatched:,} of {num_annotations:,} annotations ({share:.1%}) are of no image"
            self._notes.append(f"{line} that it lists: their objects are left out.")
            if self._unmatched == num_annotations:
                rule = "their image_id must be the id of one of `images`"
                raise UserError(self._headline, [f"{line} that it lists: {rule}."])
        if self._uncategorised:
            counts = f"{self._uncategorised:,} of {num_annotations:,} annotations"
            counts += f" ({self._uncategorised / num_annotations:.1%})"
            self._notes.append(
                f"{self._file}: {counts} are of no category that it lists: their objects are left out."
            )
        if num_annotations and not num_objects:
            reasons = Counter(
                (problem.reason, problem.detail)
                for problem in self._problems
                if str(self._file) in problem.file
            )
            shown = "; ".join(
                f"{count:,} x {reason} {detail}".strip() for (reason, detail), count in reasons.most_common(3)
            )
            self._notes.append(
                f"{self._file}: none of its {num_annotations:,} annotations can be used: {shown}."
            )

    def _object(self, one: dict[str, Any], name: str, place: str) -> Object | None:
        box, polygon = read_box(one.get("bbox")), read_polygon(one.get("segmentation"))
        if polygon is not None and (box is None or agrees(polygon, box)):
            if short := num_short_parts(one.get("segmentation")):
                self._problems.append(Problem(place, 0, SHORT_PART, f"{short} parts" if short > 1 else ""))
            return Object(name, (*polygon.min(0).tolist(), *polygon.max(0).tolist()), polygon, place)
        if box is None:
            return None
        if polygon is None and (is_corners := has_area_of_corners(one)) is not None:
            self._with_area += 1
            self._corners += is_corners
        if polygon is not None or is_bad(one.get("segmentation")):
            self._problems.append(Problem(place, 0, BAD_SEGMENTATION))
        return Object(name, box, None, place)

    def _images(
        self,
        records: Mapping[CocoId, list[dict[str, Any]]],
        objects: Mapping[CocoId, list[Object]],
        spoiled: set[CocoId],
        unsure: set[CocoId],
    ) -> list[Image]:
        """Return the images whose files are found; entries with the same name are one image."""
        finder = ImageFinder(self._folders)
        images: dict[Path, Image] = {}
        given_names: dict[Path, str] = {}
        ambiguous: dict[Path, None] = {}
        for key, entries in records.items():
            names = dict.fromkeys(str(entry.get("file_name", "")) for entry in entries)
            for name in names:
                found = finder.find(name)
                if found is None:
                    where = str(self._folders[0] / (name if len(name) <= MOST_NAME else shortened(name)))
                    others = [str(folder) for folder in self._folders[1:] if folder.is_dir()]
                    also = f"; {', '.join(others)} searched too" if others else ""
                    self._problems.append(Problem(where, 0, NO_IMAGE, f"listed in {self._file}{also}"))
                elif ".." in PurePosixPath(found[1]).parts:
                    self._problems.append(
                        Problem(str(found[0]), 0, NO_IMAGE, f"{shortened(name)} leads out of the folder")
                    )
                elif len(names) > 1:
                    self._problems.append(Problem(str(found[0]), 0, SAME_ID, f"id {key} in {self._file}"))
                elif key in unsure:
                    self._problems.append(Problem(str(found[0]), 0, NOT_MATCHED, f"in {self._file}"))
                else:
                    file, relative = found
                    size_hw = self._size_hw(entries[0], file)
                    image = Image(file, relative, objects[key], size_hw, key in spoiled)
                    before = images.get(file)
                    if before is None:
                        images[file], given_names[file] = image, name
                    elif given_names[file] == name and before.size_hw == image.size_hw:
                        merged = [*before.objects, *image.objects]
                        is_spoiled = before.is_spoiled or image.is_spoiled
                        images[file] = before._replace(objects=merged, is_spoiled=is_spoiled)
                    else:
                        ambiguous[file] = None
        for file in ambiguous:
            self._problems.append(Problem(str(file), 0, AMBIGUOUS, f"in {self._file}"))
            del images[file]
        return list(images.values())

    def _size_hw(self, record: Mapping[str, Any], file: Path) -> tuple[int, int] | None:
        return read_size(record.get("width"), record.get("height"), str(file), self._problems)


def _is_crowd(one: Mapping[str, Any]) -> bool:
    return str(one.get("iscrowd") or 0).strip().lower() not in ("0", "0.0", "", "false")
