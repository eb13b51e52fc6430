"""The kinds of keys of a DeepSpeed JSON: checked, a block, or refused; and the kinds of values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsyolo.config.run_config import RECOMPUTE_RULE, read_recompute

NEVER = object()  # no value turns the key off: DeepSpeed refuses its presence, or a value would do nothing


@dataclass(frozen=True)
class JsonKey:
    """A value: its rule as text, as in "must be ...", and whether a value of JSON keeps it."""

    rule: str
    keeps: Callable[[Any], bool]


@dataclass(frozen=True)
class JsonSection:
    """A block of keys."""

    keys: Keys
    may_be_null: bool = False


@dataclass(frozen=True)
class Refused:
    """Not usable: why, and what to do. `off` is the value that turns it off, which is let through."""

    reason: str
    off: Any = False

    def lets_through(self, value: Any) -> bool:
        if self.off is NEVER:
            return False
        disabled = isinstance(value, dict) and value.get("enabled") is False
        same_kind = isinstance(value, bool) == isinstance(self.off, bool)  # 0 is not false
        return (same_kind and value == self.off) or (self.off is False and disabled)


Keys: TypeAlias = Mapping[str, JsonKey | JsonSection | Refused]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int = 0, *, even: bool = False) -> JsonKey:
    """Describe a whole number; 5e8 is one."""
    rule = f"{'an even' if even else 'a'} whole number of at least {least}"
    return JsonKey(rule, lambda v: _is_number(v) and v == int(v) and v >= least and not (even and v % 2))


def number(least: float = 0.0, *, above: bool = False, below: float = math.inf) -> JsonKey:
    """Describe a finite number: of at least `least`, or `above` it, and `below` a bound."""
    rule = f"a number {'above' if above else 'of at least'} {least:g}"
    rule += f" and below {below:g}" if below < math.inf else ""
    return JsonKey(rule, lambda v: _is_number(v) and (v > least if above else v >= least) and v < below)


def one_of(*values: str) -> JsonKey:
    """Describe one of these texts."""
    names = [json.dumps(value) for value in values]
    return JsonKey(" or ".join(names), lambda v: isinstance(v, str) and v in values)


FLAG = JsonKey("true or false", lambda v: isinstance(v, bool))
TEXT = JsonKey("text in quotes", lambda v: isinstance(v, str))
TEXTS = JsonKey(
    "a list of texts in quotes", lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v)
)
BETAS = JsonKey(
    "two numbers of at least 0 and below 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(x) and 0 <= x < 1 for x in v),
)
PATTERNS = JsonKey('"auto" or a list of names', lambda v: v == "auto" or TEXTS.keeps(v))
PARTITION = JsonKey(
    '"balanced" or a list of layer indices, growing',
    lambda v: (
        v == "balanced" or (isinstance(v, list) and all(whole(1).keeps(x) for x in v) and v == sorted(set(v)))
    ),
)
RECOMPUTE = JsonKey(RECOMPUTE_RULE, lambda v: isinstance(v, str) and read_recompute(v) is not None)
DTYPE = one_of("fp32", "fp16", "bf16")
