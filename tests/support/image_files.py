"""A small YOLO data set, file by file."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np

NUM_CLASSES = 3


def picture(width: int = 64, height: int = 48) -> np.ndarray:
    """RGB: the left half red, the right half blue, its upper part green."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = (250, 0, 0)
    image[:, width // 2 :] = (0, 0, 250)
    image[: height // 2, width // 2 :] = (0, 250, 0)
    return image


def encoded(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    options = {".jpg": [cv2.IMWRITE_JPEG_QUALITY, 98]}.get(suffix, [])
    return cv2.imencode(suffix, image[..., ::-1], options)[1].tobytes()


def with_exif(jpeg: bytes, orientation: int) -> bytes:
    tiff = b"MM\x00*\x00\x00\x00\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    segment = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


def add(
    root: Path, name: str, content: bytes | None = None, label: str | None = "0 0.5 0.5 0.5 0.5\n"
) -> Path:
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(), Path(name).suffix) if content is None else content)
    if label is not None:
        at = (root / "labels" / name).with_suffix(".txt")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(label)
    return path
