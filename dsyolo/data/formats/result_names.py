"""Names of images in a written data set, under which a training lists them."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dsyolo.data.formats.yolo import IMAGE_SUFFIXES

_USUAL = ".jpg"  # images are decoded by their content, whatever their ending
_SUFFIXES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"RIFF", ".webp"),
    (b"BM", ".bmp"),
    (b"GIF8", ".gif"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)


def listed_name(file: Path, name: PurePosixPath) -> PurePosixPath:
    """Return a name that is not hidden, and with the ending of an image: that of the file's content, if it has none.

    Raises:
        OSError: the file cannot be read.
    """
    shown = PurePosixPath(*_shown(name.parts))
    if shown.suffix.lower() in IMAGE_SUFFIXES:
        return shown
    with open(file, "rb") as content:
        head = content.read(4)
    suffix = next((suffix for magic, suffix in _SUFFIXES if head.startswith(magic)), _USUAL)
    return shown.with_name(f"{shown.name}{suffix}")


def _shown(parts: Iterable[str]) -> Iterable[str]:
    return (f"_{part.lstrip('.')}" if part.startswith(".") else part for part in parts)
