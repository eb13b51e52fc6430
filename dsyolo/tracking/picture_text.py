"""Text in pictures: ASCII by OpenCV's own strokes, everything else by a font of this machine that has all of its letters.

Where no font has them, a class is drawn as `class 3`: two names that look the same would be worse than numbers.
"""

import logging
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from dsyolo.base.text import escaped, within

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

MOST_COLUMNS = 40  # of a class name in a picture
FONT = cv2.FONT_HERSHEY_SIMPLEX  # has ASCII alone, and draws `?` for the rest
CAP_HEIGHT = 21.0  # pixels of a capital letter of FONT at scale 1
CAP_SHARE = 0.72  # height of a capital letter, as a share of a font's size: 0.73 in DejaVu, 0.73 in Noto
NEED_SHAPING = frozenset(("R", "AL"))  # written from the right, and Arabic letters join: libraqm does both
ASCII = frozenset(range(0x20, 0x7F))
REMEDY = "Install a font that has them, such as fonts-noto-cjk (for Arabic and Hebrew libfribidi too)"
log = logging.getLogger(__name__)


class Text:
    """A text of one line, with its size.

    Args:
        text: as `drawable_names` returns it; letters that no font has are drawn as `?`.
        capital_px: height of a capital letter.

    Attributes:
        width, height, below: in pixels; `height` is above the base line, and `below` under it.
    """

    def __init__(self, text: str, capital_px: float) -> None:
        self._text, self._scale = unicodedata.normalize("NFC", text), capital_px / CAP_HEIGHT
        self.stroke_px = max(round(self._scale * 1.8), 1)
        self._font_path = None if self._text.isascii() else _font_of(self._text)
        if self._font_path is None:
            (self.width, self.height), self.below = cv2.getTextSize(
                self._text, FONT, self._scale, self.stroke_px
            )
            return
        self._font_px = max(round(capital_px / CAP_SHARE), 1)
        left, top, right, bottom = _font(self._font_path, self._font_px).getbbox(self._text, anchor="ls")
        self._left = int(left)
        self.width, self.height, self.below = int(right - left) + 1, max(int(-top), 1), max(int(bottom), 1)

    def draw(self, picture: np.ndarray, origin: tuple[int, int], rgb: tuple[int, int, int]) -> None:
        """Draw into a picture (H, W, 3) uint8, with the base line's left end at `origin`, (x, y) in pixels."""
        if self._font_path is None:
            cv2.putText(picture, self._text, origin, FONT, self._scale, rgb, self.stroke_px, cv2.LINE_AA)
            return
        from PIL import Image, ImageDraw

        height, width = picture.shape[:2]
        x, y = origin
        x1, y1 = max(x, 0), max(y - self.height, 0)
        x2, y2 = min(x + self.width, width), min(y + self.below, height)
        if x1 >= x2 or y1 >= y2:
            return
        mask = Image.new("L", (x2 - x1, y2 - y1))
        font = _font(self._font_path, self._font_px)
        ImageDraw.Draw(mask).text((x - x1 - self._left, y - y1), self._text, fill=255, font=font, anchor="ls")
        share = np.asarray(mask, np.float32)[..., None] / 255
        part = picture[y1:y2, x1:x2]
        part[:] = np.rint(part + share * (np.array(rgb, np.float32) - part)).astype(np.uint8)


def drawable_names(class_names: Sequence[str]) -> list[str]:
    """Return the class names as pictures show them: `class 3` for what no font of this machine has, said once."""
    return list(_drawable(tuple(class_names)))


@lru_cache(maxsize=8)
def _drawable(class_names: tuple[str, ...]) -> tuple[str, ...]:
    shown = [
        within(unicodedata.normalize("NFC", escaped(name, lines=False)), MOST_COLUMNS) for name in class_names
    ]
    missing = [i for i, name in enumerate(shown) if not name.isascii() and _font_of(name) is None]
    for i in missing:
        shown[i] = f"class {i}"
    if missing:
        first = escaped(class_names[missing[0]], lines=False)
        num_others = len(missing) - 1
        others = f" and of {num_others:,} other class{'es' * (num_others > 1)}" if num_others else ""
        what = f"no font of this machine has the letters of {first}{others}, drawn as `class {missing[0]}`"
        log.warning("Pictures: %s. %s.", what, REMEDY)
    return tuple(shown)


def _font_of(text: str) -> Path | None:
    """Return the first font that has all letters of a text; None where none has, or where letters cannot be joined."""
    return _font_with(frozenset(map(ord, text)) - ASCII)  # one search for all scores of a class


@lru_cache(maxsize=4096)
def _font_with(letters: frozenset[int]) -> Path | None:
    from PIL import features

    needs_shaping = any(unicodedata.bidirectional(chr(letter)) in NEED_SHAPING for letter in letters)
    if needs_shaping and not features.check("raqm"):
        return None
    needed = np.array(sorted(letter for letter in letters | ASCII if not chr(letter).isspace()), np.uint32)
    return next((path for path in _font_paths() if np.isin(needed, _letters(path)).all()), None)


@lru_cache(maxsize=1)
def _font_paths() -> tuple[Path, ...]:
    """Return Matplotlib's DejaVu Sans, then the fonts of the system: plain ones of a sans-serif kind first."""
    import matplotlib  # here: half a second that most commands need not pay
    from matplotlib.font_manager import (
        findSystemFonts,
    )  # looks now: Matplotlib's list may be older than a font

    own = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return (own, *sorted(map(Path, findSystemFonts()), key=_rank))


def _rank(path: Path) -> tuple[bool, bool, str]:
    name = path.stem.lower()
    is_styled = any(word in name for word in ("bold", "italic", "oblique", "black", "light", "thin", "mono"))
    return is_styled, "serif" in name.replace("sansserif", ""), name


@lru_cache(maxsize=512)
def _letters(path: Path) -> np.ndarray:
    """Return the code points that a font has, (N,) uint32; none of a font that cannot be used, or has boxes for all."""
    from matplotlib.ft2font import FT2Font

    found: list[int] = []
    if "lastresort" not in path.stem.lower():
        with suppress(OSError, RuntimeError, ValueError):
            _font(path, 20)  # raises for pictures in a fixed size, such as colour emoji
            found = list(FT2Font(str(path)).get_charmap())
    return np.array(found, np.uint32)


@lru_cache(maxsize=64)
def _font(path: Path, size_px: int) -> "FreeTypeFont":
    from PIL import ImageFont

    return ImageFont.truetype(str(path), size_px)
