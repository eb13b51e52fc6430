"""Data formats by name, and the user's own as `FILE.py:CLASS`. `convert` brings a data set into YOLO format.

A user's own is code that runs. Its name must come from the command line, never from a data set.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import shortened
from dsyolo.base.user_code import is_reference, load_class, raised
from dsyolo.data.formats.coco import Coco
from dsyolo.data.formats.data_format import DataFormat, Image, Object, SourceDataset
from dsyolo.data.formats.voc import Voc
from dsyolo.data.formats.yolo_writer import Conversion, refuse_occupied, write_dataset

SPLITS = ("train", "val", "test")
FORMATS: dict[str, type[DataFormat]] = {"coco": Coco, "voc": Voc}


def convert(name: str, src: str | Path, dst: str | Path) -> Conversion:
    """Convert the data set in `src` into a YOLO data set in `dst`. Images are hard links where possible.

    Args:
        name: one of FORMATS, or FILE.py:CLASS, from the command line only.

    Raises:
        UserError: no such format, a `src` that is not of it, or a `dst` that is not empty.
    """
    src, dst = Path(src), Path(dst)
    refuse_occupied(dst)
    data_format = _find(name)
    if not src.exists():
        raise UserError(f"{src} cannot be converted from {name}", ["no such folder."])
    if src.is_file() and name in FORMATS:
        folder = src.parent.parent if src.parent.name.lower() == "annotations" else src.parent
        rule = "it is a file, and the folder of annotations and images is needed"
        raise UserError(f"{src} cannot be converted from {name}", [f"{rule}. Give {folder}."])
    source = data_format().read(src) if name in FORMATS else _read_own(name, data_format, src)
    return write_dataset(dst, source)


def _find(name: str) -> type[DataFormat]:
    if name in FORMATS:
        return FORMATS[name]
    if not is_reference(name):
        known = " or ".join(sorted(FORMATS))
        raise _error(name, f"there is no such format. Write {known}, or FILE.py:CLASS for your own")
    return load_class(name, "FORMAT", DataFormat, "docs/data_format.md")


def _read_own(name: str, data_format: type[DataFormat], src: Path) -> SourceDataset:
    try:
        source = data_format().read(src)
        if isinstance(source, SourceDataset):
            source.splits = {split: list(images) for split, images in source.splits.items()}
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own class raises
        raise _error(name, f"{raised(error)}. Fix its read()") from error
    if not isinstance(source, SourceDataset):
        raise _error(name, f"read() returned a {type(source).__name__}. Return a SourceDataset")
    if fault := next(_faults(source), None):
        raise _error(name, fault)
    objects = [one for images in source.splits.values() for image in images for one in image.objects]
    if unnamed := sorted({one.name for one in objects} - set(source.names)):
        raise _error(name, f"its names lack the classes {', '.join(unnamed[:5])}. Add them")
    return source


def _faults(source: Any) -> Iterator[str]:
    """Yield what breaks the contract of data_format.py, each with its remedy."""
    names = source.names
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        yield f"its names are {names}. Give at least one, each once"
    if unknown := sorted(map(str, source.splits.keys() - set(SPLITS))):
        yield f"it has a split {unknown[0]}. Name them {', '.join(SPLITS)}"
    for split, images in source.splits.items():
        for image in images:
            if not (isinstance(image, Image) and isinstance(image.file, Path)):
                yield f"{split} holds {shortened(repr(image))}. Give Image(file, name, objects) with a pathlib.Path as file"
                continue
            for one in image.objects:
                if not (isinstance(one, Object) and _are_numbers(one.box_xyxy, (4,))):
                    yield f"{image.name} has the object {shortened(repr(one))}. Give Object(name, box_xyxy) with four numbers"
                elif one.polygon is not None and not _are_numbers(one.polygon, (len(one.polygon), 2)):
                    yield f"{image.name} has the polygon {shortened(repr(one.polygon))}. Give an array (P, 2)"


def _are_numbers(values: Any, shape: tuple[int, ...]) -> bool:
    try:
        array = np.asarray(values)
        return array.shape == shape and array.dtype.kind in "fiu"
    except (TypeError, ValueError):
        return False


def _error(name: str, rule: str) -> UserError:
    return UserError("The data set cannot be converted", [f"FORMAT: {name} given, but {rule}."])
