"""JPEGs that end too early: whether all of their pixels are there, whatever their end marker says."""

import io

import numpy as np
from PIL import Image

JPEG_END = b"\xff\xd9"
_NUM_COEFFICIENTS = 64  # of a block
JpegHeader = tuple[int, int, int] | None  # height, width, start of the pixel data

_RESTART_INTERVAL = (
    b"\xff\xdd\x00\x04"  # its segment; a cut may be at a restart marker, and one of eight comes next
)


def jpeg_header(data: bytes) -> JpegHeader:
    """Return (height, width, start of the pixel data) of a JPEG as stored, before EXIF orientation; None if truncated."""
    at, height, width = 2, 0, 0
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
            continue
        # SOF0..SOF15, without the tables DHT, JPG and DAC that lie among them
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
        elif marker == 0xDA:
            return height, width, at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def has_all_pixels(data: bytes, start: int) -> bool:
    """Return whether a JPEG without an end marker has all of its pixels. `start`: of its first scan.

    A decoder that lacks a bit takes it from what follows. So all bits are there if other bits behind them change no
    pixel; progressive ones need all of their scans too. Read at full size: few files are like this.
    """
    if not _has_all_scans(data, start):
        return False
    body = data.rstrip(b"\xff")  # half an end marker
    try:
        pixels = _pixels(body + JPEG_END)
        restarts = [bytes((0xFF, 0xD0 + n)) for n in range(8)] if _RESTART_INTERVAL in data[:start] else []
        fillers = [restart + filler for restart in (b"", *restarts) for filler in _fillers()]
        return all(np.array_equal(pixels, _pixels(body + filler + JPEG_END)) for filler in fillers)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def _has_all_scans(data: bytes, start: int) -> bool:
    """Return whether the scans of a JPEG give every coefficient of every component to its last bit."""
    components = _components(data, start)
    missing = {component: set(range(_NUM_COEFFICIENTS)) for component in components}
    at = start
    while 0 <= at < len(data) - 4:
        if data[at + 1] == 0xDA:
            num = data[at + 4]
            spectral = at + 5 + 2 * num
            if spectral + 3 > len(data):
                return False
            first, last, low_bit = data[spectral], data[spectral + 1], data[spectral + 2] & 15
            for component in (data[at + 5 + 2 * i] for i in range(num)):
                if not low_bit:
                    missing.get(component, set()).difference_update(range(first, last + 1))
        at = _next_segment(data, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big"))
    return bool(missing) and not any(missing.values())


def _components(data: bytes, stop: int) -> list[int]:
    """Return the numbers of the components in the frame header, which is before `stop`."""
    at = 2
    while at + 4 <= stop:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return [data[at + 10 + 3 * i] for i in range(data[at + 9]) if at + 10 + 3 * i < stop]
        at += (
            2
            if marker == 0x01 or 0xD0 <= marker <= 0xD8
            else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        )
    return []


def _next_segment(data: bytes, at: int) -> int:
    """Return where the next marker with a length is; -1 if there is none."""
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker not in (0x00, 0x01, 0xFF) and not 0xD0 <= marker <= 0xD9:
            return at
        at += 1 if marker == 0xFF else 2
    return -1


def _fillers() -> list[bytes]:
    """Return pixel data. Both values of the first missing bit are among them, so a decoder that lacks it sees a change."""
    return [_any_blocks(), *(bytes([value]) * 64 for value in (0x00, 0x55, 0xAA, 0xFE))]


def _any_blocks() -> bytes:
    """Return codes of any blocks, with the restart markers 0xd0 to 0xd7 for the JPEGs that have them."""
    return b"".join(bytes(n * 37 % 251 for n in range(64)) + bytes((0xFF, 0xD0 + k % 8)) for k in range(16))


def ends_early(data: bytes, start: int, grey: np.ndarray) -> bool:
    """Return whether a JPEG lacks blocks despite its end marker, as after a repair. Progressive ones are not detected.

    Missing blocks decode to 128. Filler in front of the marker is decoded in their place, but leaves a whole image as
    it is. Only an image with 128 in a corner (the last one, before EXIF rotation) is decoded twice more.
    """
    if 128 not in grey[[0, 0, -1, -1], [0, -1, 0, -1]]:
        return False
    end = data.find(JPEG_END, start)
    try:
        return not np.array_equal(_small(data), _small(data[:end] + _any_blocks() + data[end:]))
    except (OSError, Image.DecompressionBombError):  # none that OpenCV reads is known
        return False


def _small(data: bytes) -> np.ndarray:
    """Decode a JPEG at 1/8 by Pillow: OpenCV would print warnings about the filler."""
    image = Image.open(io.BytesIO(data))
    image.draft("L", (1, 1))
    return np.asarray(image)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))
