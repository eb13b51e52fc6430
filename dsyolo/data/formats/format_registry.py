"""Data formats by name, and the user's own as `FILE.py:CLASS`. `convert` brings a data set into YOLO format.

A user's own is code that runs. Its name must come from the command line, never from a data set.
"""

from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.base.user_code import is_reference, load_object, raised
from dsyolo.data.formats.coco import Coco
from dsyolo.data.formats.data_format import DataFormat, SourceDataset
from dsyolo.data.formats.voc import Voc
from dsyolo.data.formats.yolo_writer import Conversion, refuse_occupied, write_dataset

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
    source = data_format().read(src) if name in FORMATS else _read_own(name, data_format, src)
    return write_dataset(dst, source)


def _find(name: str) -> type[DataFormat]:
    if name in FORMATS:
        return FORMATS[name]
    if not is_reference(name):
        known = " or ".join(sorted(FORMATS))
        raise _error(name, f"there is no such format. Write {known}, or FILE.py:CLASS for your own")
    found = load_object(name, "FORMAT")
    if not (isinstance(found, type) and issubclass(found, DataFormat)):
        raise _error(name, "it is not a subclass of DataFormat. See docs/data_format.md")
    return found


def _read_own(name: str, data_format: type[DataFormat], src: Path) -> SourceDataset:
    try:
        source = data_format().read(src)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own class raises
        raise _error(name, f"{raised(error)}. Fix its read()") from error
    if not isinstance(source, SourceDataset):
        raise _error(name, f"read() returned a {type(source).__name__}. Return a SourceDataset")
    objects = [one for images in source.splits.values() for image in images for one in image.objects]
    if unnamed := sorted({one.name for one in objects} - set(source.names)):
        raise _error(name, f"its names lack the classes {', '.join(unnamed[:5])}. Add them")
    return source


def _error(name: str, rule: str) -> UserError:
    return UserError("The data set cannot be converted", [f"FORMAT: {name} given, but {rule}."])
