"""Finds label-like files near images that nobody reads, as in `Labels/`, with other endings, or one file for all images."""

import difflib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dsyolo.base.safe_io import shortened
from dsyolo.data.formats.yolo import IMAGE_SUFFIXES, label_path
from dsyolo.data.label_signs import BINARY, FOR_ALL, PER_IMAGE, is_archive, is_for_all, is_of_image, remedy

MAX_IMAGE_FOLDERS, MAX_FOLDERS, MAX_ENTRIES = 20, 400, 50_000  # so that a search takes seconds on a slow disk
MAX_DEPTH = 2
MAX_COMPARED = 2_000  # names of images
NUM_SNIFFED = 5  # files of a kind and folder whose content is looked at

_SPLIT_FOLDER = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?|images?", re.IGNORECASE)
_LIKE_YOLO = (".txt", ".label", ".labels", ".yolo")


@dataclass
class UnreadLabels:
    """Files of one kind in one folder that look like labels and are not read."""

    folder: str
    suffix: str
    remedy: str
    names: list[str] = field(default_factory=list)
    is_for_all: bool = False  # one file with the labels of many images
    is_stray: bool = False  # in the right place, and named as no image is

    def __str__(self) -> str:
        name, count = shortened(self.names[0]), len(self.names)
        if self.is_for_all:
            return f"{os.path.join(self.folder, name)} looks like labels, but is not read. {self.remedy}."
        if self.is_stray:
            files = "label file there matches" if count == 1 else "label files there match"
            return f"{self.folder}: {count:,} {files} no image by name. {self.remedy}."
        looks, is_read = ("file looks", "is not read") if count == 1 else ("files look", "are not read")
        what = f"{count:,} {self.suffix} {looks} like labels of these images, but {is_read} ({name})"
        return f"{self.folder}: {what}. {self.remedy}."


def find_unread_labels(images: Sequence[str], are_read: Collection[str]) -> list[UnreadLabels]:
    """Return label-like files near `images`, the most first; those in `are_read` (paths) are none."""
    by_stem: dict[str, str] = {}
    for image in images:
        by_stem.setdefault(_stem(image).casefold(), image)
    right_places = _stems_by_label_folder(images)
    found: dict[tuple[str, str], UnreadLabels] = {}
    strays: dict[str, UnreadLabels] = {}
    for folder in folders_near(images):
        for entry in _files(folder):
            if entry in are_read:
                continue
            name = os.path.basename(entry)
            stem, suffix = os.path.splitext(name)
            kind = suffix.lower()
            owner = by_stem.get(stem.casefold()) or by_stem.get(_stem(stem).casefold())
            if owner is not None and kind in PER_IMAGE:
                _add(found, folder, name, owner)
            elif stem.casefold() in right_places.get(folder, ()):
                continue  # the labels of an image of another split
            elif kind == ".txt" and folder in right_places and _is_stray(entry, strays.get(folder)):
                strays.setdefault(folder, UnreadLabels(folder, suffix, "", is_stray=True)).names.append(name)
            elif kind in FOR_ALL | BINARY and is_for_all(entry, kind):
                found[folder, name] = _single(folder, name, remedy(entry, per_image=False))
            elif is_archive(name):
                unpack = f"Unpack it, so that {label_path(images[0])} is there"
                found[folder, name] = _single(folder, name, unpack)
    for stray in strays.values():
        stray.remedy = _pair(stray, images)
    likely = [one for one in found.values() if one.is_for_all or _looks_like_labels(one)]
    return sorted([*likely, *strays.values()], key=lambda one: -len(one.names))


def _stems_by_label_folder(images: Iterable[str]) -> dict[str, set[str]]:
    """Return the folders where the labels of `images` would be, and the stems of all images that lie where these do."""
    stems: dict[str, set[str]] = {}
    folders = dict.fromkeys(os.path.dirname(image) for image in images)
    for folder in list(folders)[:MAX_IMAGE_FOLDERS]:
        there = (
            _stem(name) for name in _names(folder) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        )
        label_folder = os.path.dirname(label_path(os.path.join(folder, "0")))
        stems.setdefault(label_folder, set()).update(stem.casefold() for stem in there)
    return stems


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def unsearched_folders(images: Sequence[str]) -> list[str]:
    """Return folders near `images` that may not be read, so that labels in them are not found."""
    return [folder for folder in folders_near(images) if os.path.isdir(folder) and not _may_search(folder)]


def _may_search(folder: str) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _single(folder: str, name: str, remedy: str) -> UnreadLabels:
    return UnreadLabels(folder, os.path.splitext(name)[1], remedy, [name], is_for_all=True)


def _is_stray(path: str, before: UnreadLabels | None) -> bool:
    """Return whether a .txt file of no image is a label file. After a few, all beside them are taken as such."""
    if before is not None and len(before.names) >= NUM_SNIFFED:
        return True
    return is_of_image(path, ".txt") and not is_for_all(path, ".txt")


def _pair(stray: UnreadLabels, images: Sequence[str]) -> str:
    """Return a remedy that names a label file and the image that is most likely its own."""
    of_folder = [image for image in images if os.path.dirname(label_path(image)) == stray.folder]
    by_stem = {_stem(image): image for image in of_folder[:MAX_COMPARED]}
    close = difflib.get_close_matches(os.path.splitext(stray.names[0])[0], by_stem, 1, 0.0)
    image = by_stem[close[0]]
    names = f"{shortened(stray.names[0])} would have to be {shortened(label_path(image).name)}"
    return f"{names} for the image {shortened(os.path.basename(image))}: rename the labels or the images"


def _add(found: dict[tuple[str, str], UnreadLabels], folder: str, name: str, image: str) -> None:
    suffix = os.path.splitext(name)[1]
    if (folder, suffix) not in found:
        own = os.path.join(folder, name)
        move = f"{own} would have to be {label_path(image)}: rename or move them, or data.yaml's images"
        advice = move if suffix.lower() in _LIKE_YOLO else remedy(own, per_image=True)
        found[folder, suffix] = UnreadLabels(folder, suffix, advice)
    found[folder, suffix].names.append(name)


def _stem(path: str) -> str:
    stem, suffix = os.path.splitext(os.path.basename(path))
    return stem if suffix.lower() in IMAGE_SUFFIXES else os.path.basename(path)


def folders_near(images: Iterable[str]) -> list[str]:
    """Return the folders to search: those of the images, and what lies beside them and below that."""
    tops: dict[str, None] = {}
    for folder in list(dict.fromkeys(os.path.dirname(image) for image in images))[:MAX_IMAGE_FOLDERS]:
        before, images, _ = f"{folder}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
        top = before if images and before else folder  # where `labels` would be
        for _ in range(3):  # from set/train up to set
            if not _SPLIT_FOLDER.fullmatch(os.path.basename(top)) or os.path.dirname(top) in (top, os.sep):
                break
            top = os.path.dirname(top)
        tops |= {folder: None, top: None}
        if top == folder and os.path.dirname(folder) not in (folder, os.sep):
            tops[os.path.dirname(folder)] = None
    folders: dict[str, None] = {}
    for top in tops:
        for folder in _below(top, MAX_DEPTH):
            folders[folder] = None
            if len(folders) >= MAX_FOLDERS:
                return list(folders)
    return list(folders)


def _below(folder: str, depth: int) -> Iterator[str]:
    yield folder
    if depth:
        try:
            with os.scandir(folder) as entries:
                inner = sorted(one.path for one in entries if not one.name.startswith(".") and one.is_dir())
        except OSError:
            return
        for one in inner[:MAX_FOLDERS]:
            yield from _below(one, depth - 1)


def _files(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            paths = []
            for number, one in enumerate(entries):
                if number >= MAX_ENTRIES:
                    break
                if not one.name.startswith(".") and one.is_file():
                    paths.append(one.path)
            return sorted(paths)
    except OSError:
        return []


def _looks_like_labels(one: UnreadLabels) -> bool:
    paths = (os.path.join(one.folder, name) for name in one.names[:NUM_SNIFFED])
    return any(is_of_image(path, one.suffix.lower()) for path in paths)
