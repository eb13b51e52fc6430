"""Small data sets as people bring them, and what a training says about one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from image_files import encoded, with_exif

from dsyolo.base.errors import UserError
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.formats.format_registry import convert
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.index_builder import build_index
from dsyolo.data.split_checks import refuse_lost_objects

WIDTH, HEIGHT = 100, 60
BOX = (24.0, 16.0, 56.0, 40.0)  # in pixels of an image of WIDTH x HEIGHT
ROW = "0 0.4 0.466667 0.32 0.4\n"  # the same in YOLO format


class Outcome(NamedTuple):
    """Return the lines at the start of a training."""

    error: str = ""
    lines: str = ""  # summaries and warnings
    boxes: dict[str, list[list[float]]] = {}  # noqa: RUF012  # px, by image name


def picture(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int = 1) -> Path:
    """Write an image of (width, height) as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(np.full((size[1], size[0], 3), 90, np.uint8), path.suffix.lower())
    path.write_bytes(with_exif(content, orientation) if orientation > 1 else content)
    return path


def text(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def yolo(root: Path, train: str = "images/train", val: str = "images/val", names: str = "[cat]") -> Path:
    return text(root / "data.yaml", f"train: {train}\nval: {val}\nnames: {names}\n")


def images(root: Path, folder: str = "images/train", count: int = 4, suffix: str = ".jpg") -> list[Path]:
    return [picture(root / folder / f"{folder[-3:].strip('/')}{n}{suffix}") for n in range(count)]


def val_split(root: Path) -> None:
    """A good validation split."""
    for image in images(root, "images/val", 2):
        text(root / "labels/val" / f"{image.stem}.txt", ROW)


def started(data_yaml: Path) -> Outcome:
    """Read a data set as the start of a training does."""
    try:
        data = read_data_yaml(data_yaml)
        indexes = {
            split: build_index(
                getattr(data, split),
                data.num_classes,
                data_yaml.parent / ".cache",
                progress=False,
                num_keypoint_values=data.num_keypoint_values,
            )
            for split in ("train", "val")
        }
        warned = refuse_lost_objects(data, indexes)
    except UserError as error:
        return Outcome(str(error))
    boxes = {}
    for index in indexes.values():
        read = DetectionDataset(index, 64)
        for number in range(len(index)):
            name = Path(index.path(number)).name
            boxes[name] = np.round(read.ground_truth(number)[1], 1).tolist()
    return Outcome("", "\n".join([*(index.summary() for index in indexes.values()), *warned]), boxes)


def converted(name: str, root: Path) -> Outcome:
    """Convert a data set, and read the result as the start of a training does."""
    try:
        result = convert(name, root, root.with_name(f"{root.name}_yolo"))
    except UserError as error:
        return Outcome(str(error))
    outcome = started(result.data_yaml)
    return outcome._replace(lines=f"{result.summary()}\n{outcome.lines}")


def coco(root: Path, split: str = "train", count: int = 4, **changes: Any) -> dict[str, Any]:
    """Write a split of a COCO data set with a box an image; `changes` of an annotation or of an image's entry."""
    for_image = {key: value for key, value in changes.items() if key in ("width", "height", "file_name")}
    for_annotation = {key: value for key, value in changes.items() if key not in for_image}
    content: dict[str, Any] = {"categories": [{"id": 1, "name": "cat"}], "images": [], "annotations": []}
    x1, y1, x2, y2 = BOX
    for number in range(1, count + 1):
        picture(root / split / f"{split}{number}.jpg")
        entry = {"id": number, "file_name": f"{split}{number}.jpg", "width": WIDTH, "height": HEIGHT}
        content["images"].append({**entry, **for_image})
        one = {
            "id": number,
            "image_id": number,
            "category_id": 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "iscrowd": 0,
        }
        content["annotations"].append({**one, **for_annotation})
    write_coco(root, content, split)
    return content


def write_coco(root: Path, content: dict[str, Any], split: str = "train") -> None:
    text(root / "annotations" / f"instances_{split}.json", json.dumps(content))


def voc_xml(*boxes: tuple[float, ...], size: tuple[int, int] = (WIDTH, HEIGHT), name: str = "cat") -> str:
    nodes = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{b[0]:g}</xmin><ymin>{b[1]:g}</ymin><xmax>{b[2]:g}</xmax>"
        f"<ymax>{b[3]:g}</ymax></bndbox></object>"
        for b in boxes
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{nodes}</annotation>"


def voc(root: Path, annotations: dict[str, str], val: dict[str, str] | None = None, **lists: str) -> Path:
    """Write a VOC data set of images of WIDTH x HEIGHT; an annotation of each by stem."""
    val = {"v": voc_xml(BOX)} if val is None else val
    for stem, xml in {**annotations, **val}.items():
        if not any((root / "JPEGImages").glob(f"{stem}.*")):
            picture(root / "JPEGImages" / f"{stem}.jpg")
        text(root / "Annotations" / f"{stem}.xml", xml)
    for split, stems in {"train": "\n".join(annotations), "val": "\n".join(val), **lists}.items():
        text(root / "ImageSets/Main" / f"{split}.txt", stems)
    return root
