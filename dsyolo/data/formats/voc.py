"""The Pascal VOC format."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import names_in, read_bytes, shortened
from dsyolo.base.text import decode_names, on_disk
from dsyolo.data.formats.data_format import BAD_OBJECT, NO_IMAGE, DataFormat, Image, Object, SourceDataset
from dsyolo.data.formats.yolo import IMAGE_SUFFIXES, MOST_LIST_BYTES
from dsyolo.data.labels import Problem

BAD_ANNOTATION = "annotation cannot be read (image left out)"
DIFFICULT = "object marked difficult (left out)"
IN_TWO_SPLITS = "image in train and in val (kept in both)"


# size_hw, objects, and whether it has others that cannot be read
_Annotation = tuple[tuple[int, int] | None, list[Object], bool]


class Voc(DataFormat):
    """A VOC folder (JPEGImages, Annotations, ImageSets/Main), or a VOCdevkit of several.

    Trains on `trainval` and validates on `test`; where no folder has a `test` list, on `train` and `val`. Classes
    are sorted by name. Objects marked difficult are left out, as VOC's own evaluation does.
    """

    def read(self, src: Path) -> SourceDataset:
        headline = f"{src} cannot be converted from VOC"
        roots = _voc_roots(src, headline)
        problems: list[Problem] = []
        lists = _voc_lists(roots, headline)
        splits = {split: _voc_read(files, len(roots) > 1, problems) for split, files in lists.items()}
        both = {image.file for image in splits["train"]} & {image.file for image in splits["val"]}
        problems += [Problem(str(file), 0, IN_TWO_SPLITS) for file in sorted(both)]
        names = sorted({one.name for images in splits.values() for image in images for one in image.objects})
        if not names:
            raise UserError(headline, ["no object in any annotation", *map(str, problems[:5])])
        return SourceDataset(splits, names, problems)


def _voc_roots(src: Path, headline: str) -> list[Path]:
    names_in(src)  # raises where it may not be read, in which nothing would be found
    candidates = [src, *sorted(src.glob("*/")), *sorted(src.glob("*/*/"))]
    roots = [c for c in candidates if (c / "Annotations").is_dir() and (c / "JPEGImages").is_dir()]
    if not roots:
        missing = [d for d in ("Annotations", "JPEGImages") if not (src / d).is_dir()]
        rule = f"no folder {' and no folder '.join(missing)} in it, nor one or two folders deeper."
        raise UserError(headline, [rule])
    return roots


def _voc_lists(roots: Sequence[Path], headline: str) -> dict[str, dict[Path, Path]]:
    """Return the list file of every root for train and for val."""
    has = {root: {p.stem: p for p in _lists_in(root)} for root in roots}

    def all_named(name: str) -> dict[Path, Path]:
        return {root: lists[name] for root, lists in has.items() if name in lists}

    # Without any test list, trainval would hold the val images as well.
    test = all_named("test")
    found = {
        "train": all_named("train") | (all_named("trainval") if test else {}),
        "val": test or all_named("val"),
    }
    if not found["train"] or not found["val"]:
        given = sorted({name for lists in has.values() for name in lists if "_" not in name}) or ["none"]
        rule = "Needed: trainval.txt (or train.txt) and test.txt, or train.txt and val.txt; one image name a line."
        raise UserError(headline, [f"lists in ImageSets/Main: {', '.join(given)}. {rule}"])
    return found


def _lists_in(root: Path) -> list[Path]:
    folder = root / "ImageSets" / "Main"
    return [folder / name for name in names_in(folder) if name.endswith(".txt")]


def _voc_read(lists: dict[Path, Path], has_prefixes: bool, problems: list[Problem]) -> list[Image]:
    images: list[Image] = []
    for root, list_file in lists.items():
        prefix = f"{root.name}_" if has_prefixes else ""
        stems = [_on_disk(root, stem) for stem in _voc_names(root, list_file, problems)]
        parsed = [(stem, _voc_annotation(root / "Annotations" / f"{stem}.xml", problems)) for stem in stems]
        # VOC counts pixels from 1, both ends within the box; a set with a 0 in it evidently counts from 0.
        starts = [min(one.box_xyxy[:2]) for _, found in parsed if found for one in found[1]]
        shift = 1.0 if min(starts, default=1.0) >= 1.0 else 0.0
        for stem, found in parsed:
            file = _voc_image(root / "JPEGImages", stem)
            if file is None:
                missing = str(root / "JPEGImages" / f"{stem}.jpg")
                problems.append(Problem(missing, 0, NO_IMAGE, f"listed in {list_file}"))
            elif found is not None:
                size_hw, objects, is_spoiled = found
                objects = [_shifted(one, shift) for one in objects]
                images.append(Image(file, prefix + file.name, objects, size_hw, is_spoiled))
    return images


def _voc_names(root: Path, list_file: Path, problems: list[Problem]) -> list[str]:
    """Return the names in a list, each once. One that leads out of the folder is reported."""

    def is_there(line: str) -> bool:
        return os.path.exists(root / "Annotations" / f"{line}.xml")

    try:
        lines = decode_names(read_bytes(list_file, MOST_LIST_BYTES), is_there, list_file)
    except OSError as error:
        raise UserError(f"{list_file} cannot be read", [f"{error.strerror}."]) from None
    names: dict[str, None] = {}
    for line in lines:
        # Names may have spaces; lists of one class have ` 1`, ` 0` or ` -1` behind each name.
        name, _, flag = line.rpartition(" ")
        is_whole = flag not in ("1", "0", "-1") or os.path.isfile(root / "Annotations" / f"{line}.xml")
        name = line if is_whole else name.rstrip()
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            detail = f"listed in {list_file}: a name without its folder and ending is needed"
            problems.append(Problem(name, 0, NO_IMAGE, detail))
        else:
            names[name] = None
    return list(names)


def _on_disk(root: Path, stem: str) -> str:
    """Return a name as the file system spells it."""
    folder = str(root / "Annotations") + os.sep
    return on_disk(f"{folder}{stem}.xml").removeprefix(folder).removesuffix(".xml")


def _shifted(one: Object, shift: float) -> Object:
    x1, y1, x2, y2 = one.box_xyxy
    # The shift makes a box of one pixel one wide; what was empty or turned around before stays so.
    return one._replace(box_xyxy=(x1 - shift, y1 - shift, x2, y2)) if x2 > x1 and y2 > y1 else one


def _voc_image(folder: Path, stem: str) -> Path | None:
    files = [folder / f"{stem}.jpg", *sorted(folder.glob(f"{glob.escape(stem)}.*"))]
    return next((f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(f)), None)


def _voc_annotation(file: Path, problems: list[Problem]) -> _Annotation | None:
    """Return the content of one XML file; a missing or bad file is reported."""
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: its encoding
        problems.append(
            Problem(str(file), 0, BAD_ANNOTATION, shortened(str(getattr(error, "strerror", None) or error)))
        )
        return None
    try:
        height, width = (root.findtext(f"size/{side}", "").strip() for side in ("height", "width"))
        size_hw = (int(height), int(width)) if max(len(height), len(width)) < 10 else (0, 0)
    except ValueError:
        size_hw = (0, 0)
    objects: list[Object] = []
    is_spoiled = False
    for number, node in enumerate(root.iterfind("object"), 1):
        place = f"{file} object {number}"
        name = (node.findtext("name") or "").strip()
        if (node.findtext("difficult") or "0").strip() == "1":
            problems.append(Problem(place, 0, DIFFICULT, name))
            continue
        sides = [node.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = map(float, sides)
            is_good = bool(name) and np.isfinite([x1, y1, x2, y2]).all()
        except ValueError:
            is_good = False
        if is_good:
            objects.append(Object(name, (x1, y1, x2, y2), None, place))
        else:
            problems.append(
                Problem(place, 0, BAD_OBJECT, shortened(f"name {name!r}, bndbox {' '.join(sides)}"))
            )
            is_spoiled = True
    return (size_hw if min(size_hw) > 0 else None), objects, is_spoiled
