"""The sources of `dsyolo detect`: images, folders and lists; patterns are expanded, videos and streams answered."""

import re
from collections.abc import Iterable
from glob import glob, has_magic
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import shortened
from dsyolo.config.foreign_values import NO_VIDEO
from dsyolo.data.formats.yolo import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    {
        ".asf",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".streams",
    }
    | {".ts", ".webm", ".wmv"}
)
_URL = re.compile(r"([A-Za-z][\w+.-]+):/")  # a Path has one slash of two
_CAMERA = re.compile(r"\d+|screen(\s.*)?|/dev/video\d+")
_WEB = ("http", "https", "ftp", "s3", "gs", "hf")


def expanded(sources: Iterable[Path]) -> list[Path]:
    """Return the sources with the files that a pattern matches in its place.

    Raises UserError with the answer for each video, camera, stream and address, and each pattern without a file.
    """
    found: list[Path] = []
    problems: list[str] = []
    for source in sources:
        if fault := _fault(source):
            problems.append(f"{shortened(str(source))}: {fault}")
        elif has_magic(str(source)) and not _exists(source):
            found += (matches := [Path(name) for name in sorted(glob(str(source), recursive=True))])
            if not matches:
                problems.append(
                    f"{shortened(str(source))}: no file matches this pattern. Check the folder and the suffix."
                )
        else:
            found.append(source)
    if problems:
        raise UserError("No images to read", problems)
    return found


def _fault(source: Path) -> str | None:
    """Return why nothing can be read from a source that is neither a file of images nor a folder."""
    text, exists = str(source), _exists(source)
    if source.suffix.lower() in VIDEO_SUFFIXES and not source.is_dir():
        return NO_VIDEO
    if _CAMERA.fullmatch(text) and not (exists and (source.is_dir() or source.is_file())):
        return NO_VIDEO
    if (match := _URL.match(text)) and not exists:
        is_image = source.suffix.partition("?")[0].lower() in IMAGE_SUFFIXES
        if match[1].lower() in _WEB and is_image:
            return "nothing is downloaded. Download the image, and give its path."
        return NO_VIDEO
    return None


def _exists(source: Path) -> bool:
    try:
        return source.exists()
    except (OSError, ValueError):  # list_images says why
        return False
