"""The verdicts on the keys of a DeepSpeed JSON: honoured (by a rule, or as a block), set aside, refused, or an alias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

NEVER = object()  # no value turns the key off
FLAGS = ("enabled", "deepcompile")  # what turns a block of DeepSpeed's on
SIZES = ("autotp_size", "tp_size")  # ranks that share a layer


@dataclass(frozen=True)
class JsonKey:
    """A value: its rule as text, as in "must be ...", and whether a value of JSON keeps it."""

    rule: str
    keeps: Callable[[Any], bool]
    remedy: Callable[[Any], str] | None = None  # for a value that breaks it, as in "Write 2"


@dataclass(frozen=True)
class JsonSection:
    """A block of keys."""

    keys: Keys
    # DeepSpeed refuses a key of the block that it does not know; elsewhere it ignores one.
    is_strict: bool = True
    shorthand: str | None = None  # the key of it that a value in the place of the block means
    switched_on: Any = None  # that key's value where the block is true


@dataclass(frozen=True)
class SetAside:
    """Accepted, without effect here: why."""

    reason: str


@dataclass(frozen=True)
class Alias:
    """Another spelling of a key of the same block."""

    name: str


@dataclass(frozen=True)
class Refused:
    """Not usable: why, and what to do. `off` is the value that turns it off, which is set aside."""

    reason: str
    off: Any = False
    on_by_presence: bool = False  # a block that is on without an "enabled" in it

    def lets_through(self, value: Any) -> bool:
        if value is None or value == "auto":  # as DeepSpeed has it where nothing is given
            return True
        if isinstance(value, dict) and self.off is False:
            return _is_switched_off(value, self.on_by_presence)
        same_kind = isinstance(value, bool) == isinstance(self.off, bool)  # 0 is not false
        return self.off is not NEVER and same_kind and value == self.off


Keys: TypeAlias = Mapping[str, JsonKey | JsonSection | Refused | SetAside | Alias]


def _is_switched_off(block: Mapping[str, Any], on_by_presence: bool) -> bool:
    """Return whether no "enabled" in a block, or in its blocks, turns it on. DeepSpeed's default is off."""
    flags = list(_flags(block))
    if flags or not on_by_presence:
        return not any(flags)
    sizes = list(_sizes(block))  # one rank alone is off too
    values = sizes or list(block.values())
    return all(value is not True and value in (0, 1, None, "auto") for value in values)


def _sizes(block: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in block.items():
        if name in SIZES:
            yield value
        elif isinstance(value, Mapping):
            yield from _sizes(value)


def _flags(block: Mapping[str, Any]) -> Iterator[bool]:
    given = [block[name] for name in FLAGS if name in block]
    if given:
        yield any(value not in (False, None, "auto") for value in given)
        return
    for value in block.values():
        if isinstance(value, Mapping):
            yield from _flags(value)
