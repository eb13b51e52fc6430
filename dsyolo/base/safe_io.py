"""Reads files that a stranger may have written: bounded, as plain data, without running anything in them.

YAML aliases are refused, since a few hundred bytes of them expand beyond any memory, and so are Python tags. Pickles are
recognised by their first bytes, whatever their name.
"""

import os
import pickletools
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_TEXT_BYTES = 4 << 20  # limit for a settings file; 20,000 class names take a tenth
CUT = 200  # characters of a value in a message

_ZIP, _PICKLE, _HDF5 = b"PK\x03\x04", b"\x80", b"\x89HDF"


def read_bytes(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `most_bytes` bytes.

    Raises:
        OSError: as `open`; or it is larger, or a device or pipe, which may never end.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        size = f"{most_bytes >> 20} MiB" if most_bytes >> 20 else f"{most_bytes} bytes"
        raise OSError(None, f"larger than {size}, the most that is read of such a file", str(path))
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open a regular file; without blocking, as opening a pipe waits for a writer, and one may have replaced the file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # asked first, since opening a device may already act on it
        raise OSError(None, "a folder, device or pipe, but it must be a file", str(path))
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "a folder, device or pipe, but it must be a file", str(path))
    return descriptor


def read_text(path: str | Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """Read a UTF-8 file with or without a BOM. Raise what `read_bytes` raises, and UnicodeDecodeError."""
    return read_bytes(path, most_bytes).decode("utf-8-sig")


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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                reason = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


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
        raise BadYamlError(f"{place}not YAML: {reason}. Give `key: value` lines.") from None
    except ValueError as error:  # an impossible date, a number of thousands of digits
        raise BadYamlError(f"a value cannot be read ({shortened(str(error))}).") from None
    finally:
        if loader:
            loader.dispose()


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
    """Return at most `CUT` characters of a text from a file, on one line."""
    text = " ".join(text[: 4 * CUT].split())
    return text if len(text) <= CUT else f"{text[:CUT]} ..."
