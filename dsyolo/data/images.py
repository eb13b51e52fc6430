"""Image files: checks them, finds their size, and reads their pixels at the size that is needed.

Sizes are those after the EXIF orientation, which OpenCV applies when it reads.
"""

from pathlib import Path

import cv2
import numpy as np

from dsyolo.base.safe_io import read_bytes
from dsyolo.data.jpeg_ends import JPEG_END, JpegHeader, ends_early, has_all_pixels, jpeg_header

MIN_SIDE_PX = 10
MOST_IMAGE_BYTES = 1 << 30  # OpenCV reads at most 2^30 pixels

NOT_FOUND = "image file cannot be read (left out)"
NOT_AN_IMAGE = "not an image (left out)"
EMPTY = "empty image file (left out)"
TRUNCATED = "truncated image (left out)"
TOO_SMALL = "image too small (left out)"
NO_END_MARKER = "JPEG without its end marker, but with all its pixels (read)"

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

# OpenCV 5 refuses IMREAD_REDUCED_COLOR_n together with IMREAD_COLOR_RGB, which both carry a channel order: these are
# the reducing bits alone. Measured on 640 x 480 JPEGs: RGB 1.4 ms; reduced to 1/2 0.9 ms, 1/4 0.7 ms; 1/8 grey 0.5 ms.
_REDUCED_BITS = {1: 0, 2: 16, 4: 32, 8: 64}


def check_image(path: str | Path) -> tuple[tuple[int, int] | None, str, str]:
    """Read a whole image file and check that it can be trained on.

    Some versions of OpenCV decode a truncated JPEG silently, with its missing part grey. So this looks for the end
    markers too. A JPEG that lacks nothing but its end marker is usable.

    Returns:
        size_hw in px, or None with a reason and a detail; a usable image may have a reason too: NO_END_MARKER.
    """
    try:
        data = read_bytes(path, MOST_IMAGE_BYTES)
    except (OSError, ValueError) as error:  # the second: a path that cannot be one
        return None, NOT_FOUND, getattr(error, "strerror", None) or str(error)
    if not data:
        return None, EMPTY, ""
    header = jpeg_header(data) if data.startswith(_JPEG) else None
    note = ""
    if header and data.find(JPEG_END, header[2]) < 0 and has_all_pixels(data, header[2]):
        data, note = data + JPEG_END, NO_END_MARKER
    if cut := _truncation(data, header):
        return None, TRUNCATED, cut
    size_hw, grey = _size_hw(data, header)
    if size_hw is None or grey is None:
        known = data.startswith((_JPEG, _PNG))
        detail = "its data are damaged" if known else "OpenCV cannot decode it: convert it to JPEG or PNG"
        return None, NOT_AN_IMAGE, detail
    if header and not note and ends_early(data, header[2], grey):
        return None, TRUNCATED, "JPEG whose end marker comes before its pixel data ends"
    if min(size_hw) < MIN_SIDE_PX:
        return None, TOO_SMALL, f"{size_hw[1]} x {size_hw[0]} px, at least {MIN_SIDE_PX} needed"
    return size_hw, note, ""


def _truncation(data: bytes, header: JpegHeader) -> str:
    """Return why the file is truncated, or an empty string."""
    # An EXIF thumbnail has its own end marker: only one after the start of the pixel data counts. There 0xff is
    # always escaped, so no marker is found by chance.
    if data.startswith(_JPEG) and (header is None or data.find(JPEG_END, header[2]) < 0):
        return "JPEG without its end marker"
    if data.startswith(_PNG) and data.rfind(b"IEND") < 0:
        return "PNG without its IEND chunk"
    promised = 0
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        promised = int.from_bytes(data[4:8], "little") + 8
    elif data.startswith(b"BM"):
        promised = int.from_bytes(data[2:6], "little")
    return f"{len(data)} of {promised} bytes" if len(data) < promised else ""


def _size_hw(data: bytes, header: JpegHeader) -> tuple[tuple[int, int] | None, np.ndarray | None]:
    """Return the size of an image and its pixels, or None twice. A JPEG at 1/8: all is read, in a third of the time."""
    if header is not None and header[0] and header[1]:
        small = _decode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8)
        if small is None:
            return None, None
        height, width = header[:2]
        sizes_hw = [size for size in {(height, width), (width, height)} if _reduced(size, 8) == small.shape]
        if len(sizes_hw) == 1:  # else only the full image shows whether EXIF rotates it
            return sizes_hw[0], small
    image = _decode(data, cv2.IMREAD_GRAYSCALE)
    return (None if image is None else (image.shape[0], image.shape[1])), image


def read_rgb(path: str | Path, size_hw: tuple[int, int], long_side_px: int) -> np.ndarray | None:
    """Read an image with a long side of exactly `long_side_px`: (H, W, 3) uint8 RGB.

    A JPEG at least twice as large is decoded at 1/2, 1/4 or 1/8, which costs half as much and averages as INTER_AREA
    does; the rest is bilinear. Other formats at least twice as large use INTER_AREA.

    Args:
        size_hw: of the file, as `check_image` found it.

    Returns:
        None if the file cannot be decoded or no longer has that size.
    """
    try:
        data = read_bytes(path, MOST_IMAGE_BYTES)
    except (OSError, ValueError):
        return None
    reduction = 1
    if data.startswith(_JPEG):
        if not data.endswith(JPEG_END):  # behind another end marker it is ignored
            data += JPEG_END
        reduction = next((n for n in (8, 4, 2) if max(size_hw) >= n * long_side_px), 1)
    image = _decode(data, cv2.IMREAD_COLOR_RGB | _REDUCED_BITS[reduction])
    if image is None or image.shape[:2] != _reduced(size_hw, reduction):
        return None
    height, width = scaled_hw(size_hw, long_side_px)
    if image.shape[:2] != (height, width):
        # Below a factor of 2, bilinear sees nearly all pixels, and costs 0.3 ms instead of INTER_AREA's 2.
        far = max(image.shape[:2]) >= 2 * long_side_px
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if far else cv2.INTER_LINEAR)
    return image


def scaled_hw(size_hw: tuple[int, int], long_side_px: int) -> tuple[int, int]:
    """Return the size of an image with its long side at `long_side_px`; the other is rounded, at least 1."""
    scale = long_side_px / max(size_hw)
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def _reduced(size_hw: tuple[int, int], reduction: int) -> tuple[int, int]:
    return -(-size_hw[0] // reduction), -(-size_hw[1] // reduction)


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # an empty buffer, or more pixels than OpenCV allows
        return None
