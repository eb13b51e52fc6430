"""Remedies for values of a DeepSpeed JSON of the wrong type: what a user most likely meant, never its opposite."""

import json
import math
from contextlib import suppress
from typing import Any

from dsyolo.config.deepspeed.verdicts import JsonKey, JsonSection
from dsyolo.config.run_config import AUTO

MAX_TEXT = 40  # characters of a string that may be a number, true or false
WITHOUT_BOUND = 10**9  # an endless number of elements, as DeepSpeed's own defaults have it
COUNTS = ("live", "reuse", "bucket", "threshold", "sub_group")  # parts of the names of such numbers
GIVE_ONE = "Write such a value"


def type_remedy(name: str, value: Any, key: JsonKey | JsonSection) -> str:
    """Return the remedy for a value that breaks the rule of its key, without a full stop.

    Args:
        name: of the key, without its block.
    """
    if isinstance(value, str) and value.lower() == AUTO:
        return f'Write "{AUTO}"'
    if isinstance(key, JsonSection):
        return _block_remedy(value, key)
    if key.remedy is not None:
        return key.remedy(value)
    found = _meant(name, value, key)
    return GIVE_ONE if found is None else f"Write {found}"


def _block_remedy(value: Any, section: JsonSection) -> str:
    """Return the block that a value in its place means."""
    block: dict[str, Any] | None = None
    short = section.shorthand or ""
    means_key = _keeps(section.keys.get(short), value)
    if "enabled" in section.keys:
        if isinstance(value, str) and means_key:
            block = {"enabled": True, short: value}
        elif isinstance(value, (bool, int, float)) and value in (0, 1):
            block = {"enabled": bool(value)}
    elif value is True and section.switched_on is not None:
        block = {short: section.switched_on}
    elif means_key:
        block = {short: value}
    return f"Write {json.dumps(block)}" if block else "Write its keys in braces"


def _meant(name: str, value: Any, key: JsonKey) -> str | None:
    """Return as JSON the value that keeps the rule and is most likely meant; None where none is likely."""
    if isinstance(value, float) and math.isfinite(value) and key.keeps(int(value)) and value >= 1:
        return str(int(value))
    if value == math.inf and key.keeps(WITHOUT_BOUND) and any(part in name for part in COUNTS):
        return "1e9"
    if value is False and key.keeps(0):
        return "0"
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value in (0, 1)
        and key.keeps(True)
    ):
        return json.dumps(bool(value))
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return None
    bare = value.rstrip(", ")  # HJSON takes a line's comma into a string without quotes
    if bare != value and key.keeps(bare):
        return f"{json.dumps(bare)}, in quotes"
    if key.keeps(bare.lower()):
        return json.dumps(bare.lower())
    if name == "loss_scale" and bare.lower() == "dynamic":
        return "0"
    with suppress(ValueError, OverflowError, RecursionError):
        if key.keeps(json.loads(bare.lower())):
            return f"{bare.lower()} without quotes"
    return None


def _keeps(key: Any, value: Any) -> bool:
    return isinstance(key, JsonKey) and key.keeps(value)
