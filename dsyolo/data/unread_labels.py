"""Finds label-like files near images that nobody reads, as in `Labels/`, with other endings, or one file for all images."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsyolo.base.safe_io import shortened
from dsyolo.data.formats.yolo import IMAGE_SUFFIXES, label_path

MAX_IMAGE_FOLDERS, MAX_FOLDERS, MAX_ENTRIES = 20, 400, 50_000  # so that a search takes seconds on a slow disk
MAX_DEPTH = 2
HEAD_BYTES = 64 << 10
NUM_SNIFFED = 5  # files of a kind and folder whose content is looked at

_PER_IMAGE = frozenset({".txt", ".xml", ".json", ".csv", ".label", ".labels", ".yolo"})
_FOR_ALL = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".xml"})
_BINARY = frozenset({".tfrecord", ".record", ".parquet"})
_SPLIT_FOLDER = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?|images?", re.IGNORECASE)
_JSON_KEYS = re.compile(rb'"(annotations|bbox|file_name|shapes|regions|rectanglelabels|boxes|objects)"')
_BOX_COLUMN = re.compile(r"x_?min|x_?max|x_?[12]|bbox.*|x_?cent(er|re)|cx|left|bx", re.IGNORECASE)
_XML = re.compile(rb"<(bndbox|box|polygon|object)\b")
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)

_CONVERT = {
    ".xml": "`dsyolo convert voc SRC DST` reads Pascal VOC (docs/data.md)",
    ".json": "`dsyolo convert coco SRC DST` reads COCO (docs/data.md)",
}
_OWN_FORMAT = "A format of your own reads it: docs/data_format.md"


@dataclass
class UnreadLabels:
    """Files of one kind in one folder that look like labels and are not read."""

    folder: str
    suffix: str
    remedy: str
    names: list[str] = field(default_factory=list)
    is_for_all: bool = False  # one file with the labels of many images

    def __str__(self) -> str:
        if self.is_for_all:
            what = f"{os.path.join(self.folder, self.names[0])} looks like labels, but is not read"
        else:
            files = "file looks" if len(self.names) == 1 else "files look"
            what = (
                f"{self.folder}: {len(self.names):,} {self.suffix} {files} like labels of these images, but "
            )
            what += f"{'is' if len(self.names) == 1 else 'are'} not read ({shortened(self.names[0])})"
        return f"{what}. {self.remedy}."


def find_unread_labels(images: Sequence[str], are_read: Collection[str]) -> list[UnreadLabels]:
    """Return label-like files near `images`, the most first; those in `are_read` (paths) are none."""
    by_stem: dict[str, str] = {}
    for image in images:
        by_stem.setdefault(_stem(image).casefold(), image)
    found: dict[tuple[str, str], UnreadLabels] = {}
    for folder in _near(images):
        for entry in _files(folder):
            if entry in are_read:
                continue
            name = os.path.basename(entry)
            stem, suffix = os.path.splitext(name)
            owner = by_stem.get(stem.casefold()) or by_stem.get(_stem(stem).casefold())
            if owner is not None and suffix.lower() in _PER_IMAGE:
                _add(found, folder, name, owner)
            elif suffix.lower() in _FOR_ALL | _BINARY and _is_for_all(entry, suffix.lower()):
                remedy = _CONVERT[".json"] if suffix.lower() == ".json" else _OWN_FORMAT
                found[folder, name] = UnreadLabels(folder, suffix, remedy, [name], is_for_all=True)
    return sorted((one for one in found.values() if _looks_like_labels(one)), key=lambda one: -len(one.names))


def _add(found: dict[tuple[str, str], UnreadLabels], folder: str, name: str, image: str) -> None:
    suffix = os.path.splitext(name)[1]
    if suffix.lower() in (".txt", ".label", ".labels", ".yolo"):
        own = os.path.join(folder, name)
        remedy = f"{own} would have to be {label_path(image)}: rename or move them, or data.yaml's images"
    else:
        remedy = _CONVERT.get(suffix.lower(), _OWN_FORMAT)
    found.setdefault((folder, suffix), UnreadLabels(folder, suffix, remedy)).names.append(name)


def _stem(path: str) -> str:
    stem, suffix = os.path.splitext(os.path.basename(path))
    return stem if suffix.lower() in IMAGE_SUFFIXES else os.path.basename(path)


def _near(images: Iterable[str]) -> list[str]:
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
    return one.is_for_all or any(
        _is_of_image(os.path.join(one.folder, name), one.suffix.lower()) for name in one.names[:NUM_SNIFFED]
    )


def _is_of_image(path: str, suffix: str) -> bool:
    head = _head(path)
    if suffix == ".xml":
        return bool(_XML.search(head))
    if suffix == ".json":
        return bool(_JSON_KEYS.search(head))
    # A caption has words; a label four numbers or more, and perhaps the name of a class.
    rows = [re.split(r"[\s,;]+", line.strip()) for line in head.decode("utf-8", "replace").splitlines()[:3]]
    return any(sum(bool(_NUMBER.fullmatch(word)) for word in row) >= 4 for row in rows)


def _is_for_all(path: str, suffix: str) -> bool:
    """Return whether a file looks like the labels of many images."""
    if suffix in _BINARY:
        return True
    head = _head(path)
    if suffix in (".json", ".jsonl", ".ndjson"):
        return bool(_JSON_KEYS.search(head))
    if suffix == ".xml":
        return bool(_XML.search(head))
    first, *rest = head.decode("utf-8-sig", "replace").splitlines()[:2] or [""]
    columns = [column.strip(" \"'") for column in re.split(r"[,;\t]", first)]
    if suffix != ".txt" and any(_BOX_COLUMN.fullmatch(column) for column in columns):
        return True
    row = re.split(r"[\s,;]+", (rest or [first])[0])
    names_image = any(Path(word.strip("\"'")).suffix.lower() in IMAGE_SUFFIXES for word in row)
    return names_image and sum(bool(_NUMBER.fullmatch(word)) for word in row) >= 4


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""
