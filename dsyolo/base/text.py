"""Text of strangers: decoded where its encoding is certain, and escaped before it reaches a terminal, a log or a page."""

import os
import sys
import unicodedata
from collections.abc import Callable

from dsyolo.base.encodings import MARKS as _MARKS
from dsyolo.base.encodings import encoding_of, foreign, wide_encoding

# Letters that turn the direction of what follows, so that a name looks like another one.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN = frozenset(("Cc", "Cs", "Zl", "Zp"))  # controls, lone surrogates, separators of lines and paragraphs
MOST_NAME = 1000  # characters of a class name


class EncodingError(OSError):
    """The bytes are no text in UTF-8, nor surely in UTF-16 or UTF-32. `strerror` names the remedy."""


def decode(data: bytes, path: str | os.PathLike[str] = "") -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with their byte-order marks, which is dropped; UTF-16 without where it is sure.

    Raises:
        EncodingError: it is in another encoding, which is named where it is likely.
    """
    encoding = encoding_of(data)
    mark = next((len(mark) for mark, name in _MARKS if data.startswith(mark) and name == encoding), 0)
    try:
        if encoding == "utf-8" and wide_encoding(data):  # valid UTF-8, with a NUL beside each letter
            raise UnicodeDecodeError(encoding, data, 0, 1, "NUL")
        return data[mark:].decode(encoding)
    except UnicodeDecodeError:
        name = os.fspath(path)
        reason = foreign(data, escaped(os.path.basename(name), lines=False))
        raise EncodingError(None, reason, name) from None


def decode_any(data: bytes) -> str:
    """Decode by the byte-order mark, as UTF-16 where it is sure, else as UTF-8. Never raise: bytes that are no text become U+FFFD."""
    return data.decode(encoding_of(data), errors="replace").removeprefix("\ufeff")


def decode_names(
    data: bytes, is_there: Callable[[str], bool], path: str | os.PathLike[str] = ""
) -> list[str]:
    """Return the lines of a list of files' names, stripped, without empty ones. Bytes that are no text may be a file's name.

    Raises:
        EncodingError: half of the lines or more are no text, and no file has such a name: the list has another encoding.
    """
    encoding = encoding_of(data)
    if encoding != "utf-8":  # whose odd bytes are not single ones
        text = decode(data, path)
    else:
        text = data.decode(encoding, "surrogateescape").removeprefix("\ufeff")
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    foreign = [line for line in lines if not _is_encodable(line)]
    if foreign and 2 * len(foreign) >= len(lines) and not any(map(is_there, foreign)):
        decode(data, path)
    return lines


def _is_encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def escaped(text: str, *, lines: bool = True) -> str:
    r"""Return a text that cannot control a terminal: controls, turned directions and lone surrogates as \x1b, \u202e.

    Args:
        lines: keep line breaks and tabs.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if not _is_hidden(letter) or (lines and letter in "\n\t") else _escape(letter)
        for letter in text
    )


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in _HIDDEN or letter in _TURNING


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def columns(text: str) -> int:
    """Return the columns that a text takes on a terminal: two a Chinese letter, none an accent of its own."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.category(letter) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def within(text: str, most: int) -> str:
    """Return the text in at most so many columns of a terminal: its begin and end, where it is longer."""
    if columns(text) <= most:
        return text
    begin, end = "", ""
    for first, last in zip(text, reversed(text), strict=True):
        if columns(f"{begin}{first}...{last}{end}") > most:
            break
        begin, end = begin + first, last + end
    return f"{begin}...{end}"


def name_fault(name: object) -> str | None:
    """Return why a class cannot have this name; None if it can."""
    if isinstance(name, bytes):
        return "it is binary. Write it as text"
    text = str(name)
    if not text.strip():
        return "it is empty. Give every class a name"
    if len(text) > MOST_NAME:
        return f"it has {len(text):,} characters. Give it a short name"
    if not text.isprintable() and any(map(_is_hidden, text)):
        return f"{escaped(text, lines=False)[:MOST_NAME]} has characters that cannot be shown. Remove them"
    return None


def on_disk(name: str) -> str:
    """Return the path that a UTF-8 text file names as this process spells it.

    Python spells paths by the locale. Where that is not UTF-8, files whose names are UTF-8 have other letters here.
    """
    if name.isascii() or sys.getfilesystemencoding() == "utf-8" or os.path.lexists(name):
        return name
    try:
        other = os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a pair of UTF-16, as JSON can write it: no file's name
        return name
    return other if os.path.lexists(other) else name
