"""Text of strangers: decoded where its encoding is certain, and escaped before it reaches a terminal, a log or a page."""

import codecs
import os
import sys
import unicodedata
from collections.abc import Callable

# The longest first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Letters that turn the direction of what follows, so that a name looks like another one.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN = frozenset(("Cc", "Cs", "Zl", "Zp"))  # controls, lone surrogates, separators of lines and paragraphs
MOST_NAME = 1000  # characters of a class name


class EncodingError(OSError):
    """The bytes are no text in UTF-8, nor in UTF-16 or UTF-32 with a byte-order mark. `strerror` names the remedy."""


def decode(data: bytes, path: str | os.PathLike[str] = "") -> str:
    """Decode UTF-8, or UTF-16 and UTF-32 with their byte-order marks, which is dropped.

    Raises:
        EncodingError: it is in another encoding, which is named where it is likely.
    """
    encoding = marked_encoding(data)
    mark = next((len(mark) for mark, name in _MARKS if data.startswith(mark) and name == encoding), 0)
    try:
        return data[mark:].decode(encoding)
    except UnicodeDecodeError:
        name = os.fspath(path)
        raise EncodingError(
            None, _foreign(data, escaped(os.path.basename(name), lines=False)), name
        ) from None


def decode_any(data: bytes) -> str:
    """Decode by the byte-order mark, else as UTF-8. Never raise: bytes that are no text become U+FFFD."""
    return data.decode(marked_encoding(data), errors="replace").removeprefix("\ufeff")


def decode_names(
    data: bytes, is_there: Callable[[str], bool], path: str | os.PathLike[str] = ""
) -> list[str]:
    """Return the lines of a list of files' names, stripped, without empty ones. Bytes that are no text may be a file's name.

    Raises:
        EncodingError: half of the lines or more are no text, and no file has such a name: the list has another encoding.
    """
    text = data.decode(marked_encoding(data), "surrogateescape").removeprefix("\ufeff")
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    foreign = [line for line in lines if not _is_encodable(line)]
    if foreign and 2 * len(foreign) >= len(lines) and not any(map(is_there, foreign)):
        decode(data, path)
    return lines


def _is_encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def marked_encoding(data: bytes) -> str:
    """Return the encoding that a byte-order mark promises; UTF-8 without one."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")


def _foreign(data: bytes, name: str) -> str:
    """Return what the bytes likely are, and how to make UTF-8 of them."""
    if marked_encoding(data) != "utf-8":
        return "not a text file: it begins like UTF-16, and is damaged"
    if data.count(0) > len(data) // 8:
        likely = "UTF-16LE" if data[1:2] == b"\0" else "UTF-16BE"
        what = "text in UTF-16 without a byte-order mark, and it must be UTF-8"
    elif any(byte < 9 or 13 < byte < 27 for byte in data):
        return "not a text file"
    elif _is_text_in(data, "gbk"):
        likely, what = "GBK", "not in UTF-8, but likely in GBK"
    else:
        likely, what = "WINDOWS-1252", "not in UTF-8, but likely in Latin-1 or Windows-1252"
    return f"{what}. Save it as UTF-8: iconv -f {likely} -t UTF-8 {name or 'FILE'} > NEW"


def _is_text_in(data: bytes, encoding: str) -> bool:
    """Return whether all letters beyond ASCII are in pairs of bytes that are common Chinese characters."""
    try:
        letters = [letter for letter in data.decode(encoding) if letter > "\x7f"]
    except UnicodeDecodeError:
        return False
    # GB 2312's level 1 has the 3,755 most common characters, in the rows 0xb0 to 0xd7.
    common = sum(0xB0 <= letter.encode(encoding)[0] <= 0xD7 for letter in letters)
    return 2 * common > len(letters)


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
