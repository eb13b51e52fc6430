"""Reads files that a stranger may have written: bounded, as plain data, without running anything in them.

YAML aliases are refused, since a few hundred bytes of them expand beyond any memory, and so are Python tags. Pickles are
recognised by their first bytes, whatever their name.
"""

import errno
import json
import os
import pickletools
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from dsyolo.base.text import decode, escaped

MOST_TEXT_BYTES = 4 << 20  # limit for a settings file; 20,000 class names take a tenth
TOO_LONG = "is longer than any name of a file"
CUT = 200  # characters of a value in a message

MOST_DIGITS = 18  # of a whole number: fits 64 bits, and is no work to print

_ZIP, _PICKLE, _HDF5 = b"PK\x03\x04", b"\x80", b"\x89HDF"


def read_bytes(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `most_bytes` bytes.

    Raises:
        OSError: as `open`; or it is larger, or a device or pipe, which may never end.
    """
    with open(_open_at_once(path), "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        size = f"{most_bytes >> 20} MiB" if most_bytes >> 20 else f"{most_bytes} bytes"
        raise OSError(None, f"larger than {size}, the most that is read of such a file", str(path))
    return data


def _open_at_once(path: str | Path) -> int:
    """Return a descriptor of a regular file, opened without blocking: a pipe would wait for a writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # asked first, since opening a device may already act on it
        raise OSError(None, "a folder, device or pipe, but it must be a file", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "a folder, device or pipe, but it must be a file", str(path))
    return descriptor


def read_text(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Read a text file: UTF-8, or UTF-16 with its BOM. Raise what `read_bytes` raises, and EncodingError, an OSError."""
    return decode(read_bytes(path, most_bytes), path)


def why_unusable(path: str | Path) -> str:
    """Return why nothing can be read at a path: it does not exist, is a broken link, or may not be looked at."""
    try:
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            return f"is a link to {os.readlink(path)}, which does not exist"
        return "does not exist"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return TOO_LONG
        return f"cannot be used: {error.strerror}"
    except ValueError:
        return "is no name of a file"
    return "cannot be used"


def names_in(folder: str | Path) -> list[str]:
    """Return what a folder holds, sorted; nothing where there is none. Raise OSError where it may not be read.

    `Path.glob` finds nothing in a folder that it may not read.
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def parse_json(text: str) -> Any:
    """Return plain values. Raise ValueError where it is not JSON, nested too deep, or has a number that none can use."""
    is_long = re.search(
        rf"\d{{{MOST_DIGITS + 1}}}", text
    )  # else Python's own reader of numbers is as safe, and faster
    try:
        return json.loads(text, parse_int=_short_int if is_long else None)
    except RecursionError:
        raise ValueError("nested far deeper than any such file is") from None


def _short_int(text: str) -> int:
    if len(text) > MOST_DIGITS + 1:
        raise ValueError(f"a number of {len(text)} digits, {text[:10]}..., and {MOST_DIGITS} is the maximum")
    return int(text)


class BadYamlError(ValueError):
    """The text is not YAML, or YAML that is refused here. The message has the place and the reason."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases, and keys given twice, of which YAML readers silently take the last."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            reason = f"*{event.anchor} stands for another value. Write the value out"
            raise yaml.constructor.ConstructorError(None, None, reason, event.start_mark)
        return super().compose_node(parent, index)

    def construct_document(self, node: yaml.Node) -> Any:
        """Construct all values; names at the top are kept as written: YAML's numbers would make 10 of 012, 90 of 1:30."""
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == "names" and isinstance(value, yaml.CollectionNode):
                names = [one[1] if isinstance(one, tuple) else one for one in value.value]
                for name in names:
                    if name.tag.endswith((":int", ":float", ":timestamp")) and name.style is None:
                        name.tag = "tag:yaml.org,2002:str"
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                reason = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value. A tag that does not fit it makes PyYAML raise anything: KeyError, IndexError, TypeError."""
        is_long = isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and len(node.value) > 64
        try:
            if is_long:
                raise ValueError(f"a number of {len(node.value)} digits")
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            reason = (
                f"{shortened(str(what)) or 'an empty value'} cannot be read as {node.tag.rpartition(':')[2]}"
            )
            detail = f" ({error})" if isinstance(error, ValueError) and str(error) else ""
            raise yaml.constructor.ConstructorError(None, None, reason + detail, node.start_mark) from None


def parse_yaml(text: str) -> Any:
    """Return plain values: mappings, lists, strings, numbers, dates. Raise BadYamlError where it cannot be read."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except RecursionError:
        raise BadYamlError("nested far deeper than any settings are.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        reason = shortened(getattr(error, "problem", None) or "not YAML")
        if isinstance(error, yaml.constructor.ConstructorError):  # valid YAML that is refused
            raise BadYamlError(f"{place}{reason}.") from None
        raise BadYamlError(f"{place}not YAML: {reason}. {_yaml_remedy(text, reason)}") from None
    except ValueError as error:  # an impossible date, a number of thousands of digits
        raise BadYamlError(f"a value cannot be read ({shortened(str(error))}).") from None
    finally:
        if loader:
            loader.dispose()


def _yaml_remedy(text: str, reason: str) -> str:
    if r"'\t'" in reason:
        return "Write spaces in the place of tabs."
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"\s*([A-Za-z_]\w*):[^\s:/\\]", line):
            return f"Write a space behind `{found[1]}:` in line {number}."
    return "Give `key: value` lines."


def pickled(path: Path) -> str | None:
    """Return what kind of pickle (or container of pickles) a file is, whatever its name; None if it is none."""
    with open(path, "rb") as file:
        start = file.read(4)
        if start.startswith(_ZIP):
            return "a zip file, as torch.save and numpy write pickles in"
        if start[:1] == _PICKLE and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return "a pickle"
        if start.startswith(_HDF5):
            return "an HDF5 file"
        rest = file.read(MOST_TEXT_BYTES)
    return "a pickle" if len(rest) < MOST_TEXT_BYTES and _is_old_pickle(start + rest) else None


def _is_old_pickle(data: bytes) -> bool:
    """Return whether data are a pickle of protocol 0 or 1, which have no signature: all operations must parse."""
    try:
        return sum(1 for _ in pickletools.genops(data)) > 1  # parses, and runs nothing
    except (ValueError, OverflowError, UnicodeDecodeError, IndexError):
        return False


def shortened(text: str) -> str:
    """Return at most `CUT` characters of a text from a file, on one line and without characters that control a terminal."""
    text = escaped(" ".join(text[: 4 * CUT].split()), lines=False)
    return text if len(text) <= CUT else f"{text[:CUT]} ..."
