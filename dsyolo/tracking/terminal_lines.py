"""Breaks long lines for a terminal between words or figures, where the terminal itself would break words."""

import os
import re
from typing import TextIO

from dsyolo.base.text import columns

LEAST_WIDTH = 60  # columns; a narrower terminal breaks lines itself
# A command must stay in one line: it is copied.
COMMAND = re.compile(r"\b(dsyolo|deepspeed|torchrun|python3?|pip|kill|export|ulimit|sudo|iconv) +\S")
BETWEEN_FIGURES = re.compile(r"( {2,}|(?<=;) )")
BETWEEN_WORDS = re.compile(r"( +)")


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of a terminal; None where they are not known."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def wrapped(text: str, width: int | None) -> str:
    """Return the text in lines of at most `width` columns; those with a command, and words that are longer, stay whole."""
    if width is None or width < LEAST_WIDTH:
        return text
    return "\n".join(
        line if columns(line) <= width or COMMAND.search(line) else _broken(line, width)
        for line in text.split("\n")
    )


def _broken(line: str, width: int) -> str:
    """Return a line as several; what follows the first is indented as it is, or by two columns."""
    body = line.lstrip(" ")
    indent = " " * (len(line) - len(body))
    is_figures = bool(indent) or "  " in body
    hanging = indent or "  "
    lines, now = [], indent
    pieces = ["", *(BETWEEN_FIGURES if is_figures else BETWEEN_WORDS).split(body)]
    for gap, piece in zip(pieces[::2], pieces[1::2], strict=True):
        if now.strip() and columns(now + gap + piece) > width:
            lines.append(now)
            now = hanging + piece
        else:
            now += gap + piece
    return "\n".join([*lines, now])
