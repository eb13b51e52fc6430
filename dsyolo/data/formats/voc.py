"""The Pascal VOC format."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import names_in, read_bytes, shortened
from dsyolo.base.text import decode, decode_names, on_disk
from dsyolo.data.formats.data_format import (
    BAD_OBJECT,
    NO_IMAGE,
    DataFormat,
    Image,
    Object,
    SourceDataset,
    read_size,
)
from dsyolo.data.formats.image_finder import as_posix
from dsyolo.data.formats.yolo import IMAGE_SUFFIXES, MOST_LIST_BYTES
from dsyolo.data.labels import Problem

BAD_ANNOTATION = "annotation cannot be read (image left out)"
DIFFICULT = "object marked difficult (left out)"
MOST_VOC_BYTES = 64 << 20
_DECLARED = re.compile(rb"<\?xml[^>]*\sencoding\s*=\s*[\"']([A-Za-z0-9._-]+)[\"']")


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
        names = sorted({one.name for images in splits.values() for image in images for one in image.objects})
        if not names:
            raise UserError(headline, ["no object in any annotation", *map(str, problems[:5])])
        splits, line = _from_first_pixel(splits)
        return SourceDataset(splits, names, problems, [line])


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
    """Return the images of a split, whose boxes are in pixels as they are given."""
    images: list[Image] = []
    for root, list_file in lists.items():
        for name in ("Annotations", "JPEGImages"):
            names_in(root / name)  # as in `_voc_roots`
        prefix = f"{root.name}_" if has_prefixes else ""
        for stem in _voc_names(root, list_file, problems):
            found = _voc_annotation(root / "Annotations" / f"{stem}.xml", problems)
            file = _voc_image(root / "JPEGImages", stem)
            if file is None:
                missing = str(root / "JPEGImages" / f"{stem}.jpg")
                problems.append(Problem(missing, 0, NO_IMAGE, f"listed in {list_file}"))
            elif found is not None:
                size_hw, objects, is_spoiled = found
                images.append(Image(file, prefix + file.name, objects, size_hw, is_spoiled))
    return images


def _from_first_pixel(splits: dict[str, list[Image]]) -> tuple[dict[str, list[Image]], str]:
    """Return the images with boxes in pixels from 0, and a line about the first pixel, decided once for all of them.

    VOC counts pixels from 1, both ends within the box. Corners from 0 to below 1 speak for a first pixel 0; boxes
    that end at the last pixel, and touch no first one, for 1: the more decide.
    """
    objects = [(o, image.size_hw) for images in splits.values() for image in images for o in image.objects]
    of_0 = [o for o, _ in objects if 0 <= min(o.box_xyxy[:2]) < 1]
    num_of_1 = sum(
        min(o.box_xyxy[:2]) >= 1 and size_hw is not None and _ends_at(o, size_hw) for o, size_hw in objects
    )
    counts = (
        f"{len(of_0):,} boxes have a corner at 0, {num_of_1:,} others end at their image's width or height"
    )
    if of_0 and len(of_0) >= num_of_1:
        place = f"{of_0[0].place} has a corner at {min(of_0[0].box_xyxy[:2]):g}"
        return splits, f"boxes are taken as they are, with 0 as the first pixel: {place} ({counts})."
    shifted = {
        split: [image._replace(objects=[_shifted(one, 1.0) for one in image.objects]) for image in images]
        for split, images in splits.items()
    }
    return shifted, f"boxes are taken to count pixels from 1, as VOC does: {counts}."


def _ends_at(one: Object, size_hw: tuple[int, int]) -> bool:
    return one.box_xyxy[2] == size_hw[1] or one.box_xyxy[3] == size_hw[0]


def _voc_names(root: Path, list_file: Path, problems: list[Problem]) -> list[str]:
    """Return the names in a list, each once. One that leads out of the folder is reported."""

    def is_there(line: str) -> bool:
        return os.path.isfile(_annotation_file(root, line))

    try:
        lines = decode_names(read_bytes(list_file, MOST_LIST_BYTES), is_there, list_file)
    except OSError as error:
        raise UserError(f"{list_file} cannot be read", [f"{error.strerror}."]) from None
    names: dict[str, None] = {}
    for line in lines:
        # Names may have spaces; lists of one class have ` 1`, ` 0` or ` -1` behind each name.
        name, _, flag = line.rpartition(" ")
        is_whole = flag not in ("1", "0", "-1") or is_there(line)
        name = _voc_stem(root, line if is_whole else name.rstrip())
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            detail = f"listed in {list_file}: a name without its folder and ending is needed"
            problems.append(Problem(name, 0, NO_IMAGE, detail))
        else:
            names[name] = None
    return list(names)


def _voc_stem(root: Path, name: str) -> str:
    """Return a listed name without the folder and ending that some lists have, where its annotation is found so."""
    plain = PurePosixPath(as_posix(name))
    if plain.suffix.lower() in IMAGE_SUFFIXES and not os.path.isfile(_annotation_file(root, name)):
        stem = plain.stem if plain.parts[:-1] in ((), ("JPEGImages",)) else str(plain.with_suffix(""))
        name = stem if os.path.isfile(_annotation_file(root, stem)) else name
    folder = f"{root / 'Annotations'}{os.sep}"
    return _annotation_file(root, name).removeprefix(folder).removesuffix(".xml")


def _annotation_file(root: Path, stem: str) -> str:
    """Return the annotation file of a name, as the file system spells it."""
    return on_disk(f"{root / 'Annotations'}{os.sep}{stem}.xml")


def _shifted(one: Object, shift: float) -> Object:
    x1, y1, x2, y2 = one.box_xyxy
    # The shift makes a box of one pixel one wide; what was empty or turned around before stays so.
    return one._replace(box_xyxy=(x1 - shift, y1 - shift, x2, y2)) if x2 > x1 and y2 > y1 else one


def _voc_image(folder: Path, stem: str) -> Path | None:
    usual = folder / f"{stem}.jpg"
    if os.path.isfile(usual):
        return usual
    files = sorted(folder.glob(f"{glob.escape(stem)}.*"))
    return next((f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(f)), None)


def _parse(data: bytes, file: Path) -> ElementTree.Element:
    """Parse XML in the encoding that it declares: Python knows more of them than its XML parser, GBK and Big5 too.

    Raises OSError, ParseError, and of an encoding LookupError and ValueError.
    """
    declared = _DECLARED.match(data)
    name = declared[1].decode("ascii").lower() if declared else ""
    # What declares UTF-16 in single bytes is not in it.
    is_own = bool(name) and not name.startswith(("utf-16", "utf-32", "ucs", "iso-10646", "utf-8", "utf8"))
    return ElementTree.fromstring(data.decode(name) if is_own else decode(data, file))


def _voc_annotation(file: Path, problems: list[Problem]) -> _Annotation | None:
    """Return the content of one XML file; a missing or bad file is reported."""
    try:
        root = _parse(read_bytes(file, MOST_VOC_BYTES), file)
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:  # the last two: its encoding
        problems.append(
            Problem(str(file), 0, BAD_ANNOTATION, shortened(str(getattr(error, "strerror", None) or error)))
        )
        return None
    width, height = (root.findtext(f"size/{side}", "").strip() for side in ("width", "height"))
    size_hw = read_size(width, height, str(file), problems)
    objects: list[Object] = []
    is_spoiled = False
    for number, node in enumerate(root.iterfind("object"), 1):
        place = f"{file} object {number}"
        name = (node.findtext("name") or "").strip()
        if (node.findtext("difficult") or "0").strip() == "1":
            problems.append(Problem(place, 0, DIFFICULT, name))
            is_spoiled = True
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
    if not objects and not is_spoiled and (strays := _stray_boxes(root)):
        problems.append(
            Problem(str(file), 0, BAD_OBJECT, f"{strays} of <bndbox>, but none in annotation/object")
        )
        is_spoiled = True
    return size_hw, objects, is_spoiled


def _stray_boxes(root: ElementTree.Element) -> int:
    """Return the number of boxes of another form than VOC's, as with a namespace or one level deeper."""
    boxes = sum(node.tag.lower().endswith("bndbox") for node in root.iter() if isinstance(node.tag, str))
    return boxes - sum(node.find("bndbox") is not None for node in root.iterfind("object"))
