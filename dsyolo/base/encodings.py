"""Recognises the encoding of a text without relying on a guess: what is not sure is listed, not chosen."""

import codecs
import re
import unicodedata
from collections.abc import Callable

# The longest first: UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NAMES = ("GBK", "SHIFT-JIS", "BIG5", "EUC-KR", "CP1251", "CP1252")
_SHOWN = {"CP1252": "Latin-1 or Windows-1252", "CP1251": "Windows-1251"}
_ICONV = {"CP1252": "WINDOWS-1252", "CP1251": "WINDOWS-1251"}
_HANGUL, _KANA = "HANGUL", ("HIRAGANA", "KATAKANA")


def marked_encoding(data: bytes) -> str:
    """Return the encoding that a byte-order mark promises; UTF-8 without one."""
    return next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")


def encoding_of(data: bytes) -> str:
    """Return the encoding to read in: of the byte-order mark, or UTF-16 that is sure without one, or UTF-8."""
    encoding = marked_encoding(data)
    wide = wide_encoding(data) if encoding == "utf-8" else None
    if wide and wide.startswith("utf-16"):
        nuls = (data[0::2].count(0), data[1::2].count(0))
        if not min(nuls) and 4 * max(nuls) > len(data):  # no other text has a NUL in every other byte
            return wide
    return encoding


def wide_encoding(data: bytes) -> str | None:
    """Return UTF-16 or UTF-32, whose ASCII letters have NULs beside them, for bytes without a mark; None if neither."""
    even, odd = data[0::2].count(0), data[1::2].count(0)
    if 16 * max(even, odd) <= len(data):
        return None
    quarter = max(len(data) // 4, 1)
    if data[2::4].count(0) >= quarter and data[3::4].count(0) >= quarter:  # 00 00 up to U+FFFF
        likely = "utf-32-le"
    elif data[0::4].count(0) >= quarter and data[1::4].count(0) >= quarter:
        likely = "utf-32-be"
    else:
        likely = "utf-16-le" if odd > even else "utf-16-be"
    try:
        text = data.decode(likely)
    except UnicodeDecodeError:
        return None
    is_text = all(letter.isprintable() or letter.isspace() for letter in text)
    return likely if is_text else None


def foreign(data: bytes, name: str) -> str:
    """Return what encoding the bytes that are no UTF-8 can have, and how to make UTF-8 of a file `name`."""
    if marked_encoding(data) != "utf-8":
        return "not a text file: it begins like UTF-16, and is damaged"
    if wide := wide_encoding(data):
        found = wide.upper().removesuffix("-LE").removesuffix("-BE")
        what = f"text in {found} without a byte-order mark, and it must be UTF-8"
        return f"{what}. {_remedy(found + wide[-2:].upper(), name)}"
    if any(byte < 9 or 13 < byte < 27 for byte in data):
        return "not a text file"
    likely = [encoding for encoding in _NAMES if _can_be(data, encoding)] or list(_NAMES)
    if len(likely) == 1:
        what = f"not in UTF-8, but likely in {_SHOWN.get(likely[0], likely[0])}"
        return f"{what}. {_remedy(_ICONV.get(likely[0], likely[0]), name)}"
    which = f"{', '.join(likely[:-1])} or {likely[-1]}"
    return f"not in UTF-8. {_remedy('ENCODING', name)}, with the encoding that it has: {which}"


def _remedy(encoding: str, name: str) -> str:
    return f"Save it as UTF-8: iconv -f {encoding} -t UTF-8 {name or 'FILE'} > NEW"


def _can_be(data: bytes, encoding: str) -> bool:
    """Return whether bytes beyond ASCII make letters of a script that is usual in an encoding."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return False
    letters = [letter for letter in text if letter > "\x7f"]
    if encoding == "CP1251":
        # A word is in one script. Western words seldom have three accented letters in a row.
        mixed = any(re.search("[A-Za-z]", word) for word in re.findall(r"\w+", text) if not word.isascii())
        return not mixed and all(unicodedata.name(letter, "").startswith("CYRILLIC") for letter in letters)
    if encoding == "CP1252":
        return not re.search(rb"[\x80-\xff]{3}", data) and _most(letters, lambda one: one.isalpha())
    if encoding == "SHIFT-JIS":
        return _most(
            letters, lambda one: unicodedata.name(one, "").startswith((*_KANA, "CJK", "IDEOGRAPHIC"))
        )
    if encoding == "EUC-KR":
        # Modern Korean has hardly any other letters; the codes of Hangul are common Chinese characters in GBK.
        hangul = sum(unicodedata.name(letter, "").startswith(_HANGUL) for letter in letters)
        return 10 * hangul >= 9 * len(letters)
    # The most common characters: level 1 of GB 2312, in rows 0xb0 to 0xd7, and of Big5, in 0xa4 to 0xc6.
    if encoding == "GBK":
        return _most(letters, lambda one: _in_rows(one, encoding, 0xB0, 0xD7, 0xA1))
    return _most(letters, lambda one: _in_rows(one, encoding, 0xA4, 0xC6, 0x40))


def _in_rows(letter: str, encoding: str, first: int, last: int, trail: int) -> bool:
    lead, *rest = letter.encode(encoding)
    return first <= lead <= last and bool(rest) and rest[0] >= trail


def _most(letters: list[str], is_usual: Callable[[str], bool]) -> bool:
    return 2 * sum(map(is_usual, letters)) > len(letters)
