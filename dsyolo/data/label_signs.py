"""Recognises labels by a file's name and first bytes, and knows what can be done with those of other tools."""

import os
import re
from pathlib import Path

from dsyolo.base.text import decode_any
from dsyolo.data.formats.yolo import IMAGE_SUFFIXES

HEAD_BYTES = 64 << 10
PER_IMAGE = frozenset({".txt", ".xml", ".json", ".csv", ".label", ".labels", ".yolo"})
FOR_ALL = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".xml"})
BINARY = frozenset({".tfrecord", ".record", ".parquet"})

_ARCHIVE = re.compile(r"\.(zip|rar|7z|tar|tgz|tbz2?|txz|(tar\.)?(gz|bz2|xz|zst))$", re.IGNORECASE)
_LABEL_NAME = re.compile(
    r"label|annot|yolo|bbox|boxes|ground.?truth|(^|[_\W])(gt|txt|xml)([_\W]|$)", re.IGNORECASE
)
_JSON_KEYS = re.compile(r'"(annotations|bbox|file_name|shapes|regions|rectanglelabels|boxes|objects)"')
_BOX_COLUMN = re.compile(r"x_?min|x_?max|x_?[12]|bbox.*|x_?cent(er|re)|cx|left|bx", re.IGNORECASE)
_XML = re.compile(r"<(bndbox|box|polygon|object)\b")
_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)

OWN_FORMAT = "A format of your own reads it: docs/data_format.md"
_VOC = "`dsyolo convert voc SRC DST` reads Pascal VOC (docs/data.md)"
_COCO = "`dsyolo convert coco SRC DST` reads COCO (docs/data.md)"
_COCO_KEY = re.compile(r'"(images|categories)"\s*:\s*\[|"(image_id|category_id)"\s*:')
# The keys that a tool's own JSON has, in the order in which they are looked for.
_TOOLS = (
    (re.compile(r'"shapes"\s*:'), "LabelMe"),
    (re.compile(r'"(regions|_via_[a-z_]+)"\s*:'), "the VGG Image Annotator"),
    (re.compile(r'"(rectangle|polygon|brush|keypoint)labels"\s*:'), "Label Studio"),
    (re.compile(r'"(classTitle|classId)"\s*:'), "Supervisely"),
)


def is_of_image(path: str, suffix: str) -> bool:
    """Return whether a file that is named as an image looks like its labels."""
    head = _head(path)
    if suffix == ".xml":
        return bool(_XML.search(head))
    if suffix == ".json":
        return bool(_JSON_KEYS.search(head))
    # A caption has words; a label four numbers or more, and perhaps the name of a class.
    return any(_num_numbers(_columns(line)) >= 4 for line in head.splitlines()[:3])


def is_for_all(path: str, suffix: str) -> bool:
    """Return whether a file looks like the labels of many images."""
    if suffix in BINARY:
        return True
    head = _head(path)
    if suffix in (".json", ".jsonl", ".ndjson"):
        return bool(_JSON_KEYS.search(head))
    if suffix == ".xml":
        return bool(_XML.search(head))
    first, *rest = head.splitlines()[:2] or [""]
    columns = [column.strip(" \"'") for column in re.split(r"[,;\t]", first)]
    if suffix != ".txt" and any(_BOX_COLUMN.fullmatch(column) for column in columns):
        return True
    columns = _columns((rest or [first])[0])
    names_image = any(Path(word.strip("\"'")).suffix.lower() in IMAGE_SUFFIXES for word in columns)
    return names_image and _num_numbers(columns) >= 4


def is_archive(name: str) -> bool:
    """Return whether a file is by its name an archive of labels."""
    ending = _ARCHIVE.search(name)
    return bool(ending and _LABEL_NAME.search(name[: ending.start()]))


def remedy(path: str, *, per_image: bool) -> str:
    """Return what can be done with labels of another format than YOLO's."""
    suffix = Path(path).suffix.lower()
    if suffix == ".xml" and per_image:
        return _VOC
    if suffix != ".json":
        return OWN_FORMAT
    head = _head(path)
    if _COCO_KEY.search(head):
        return (
            f"It is one file per image, and COCO has one for all: export that. {OWN_FORMAT}"
            if per_image
            else _COCO
        )
    if tool := next((tool for key, tool in _TOOLS if key.search(head)), None):
        return f"It is in the format of {tool}: export it as YOLO or as COCO. {OWN_FORMAT}"
    return OWN_FORMAT


def _columns(line: str) -> list[str]:
    return re.split(r"[\s,;]+", line.strip())


def _num_numbers(columns: list[str]) -> int:
    return sum(bool(_NUMBER.fullmatch(word)) for word in columns)


def _head(path: str) -> str:
    try:
        if not os.path.isfile(path):  # a pipe would wait for a writer
            return ""
        with open(path, "rb") as file:
            return decode_any(file.read(HEAD_BYTES))
    except OSError:
        return ""
