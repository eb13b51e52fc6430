"""Reads a DeepSpeed JSON as DeepSpeed does, HJSON included, and keeps what has a legal key and type."""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hjson

from dsyolo.base.safe_io import read_text
from dsyolo.config.deepspeed.optimizer_table import OPTIMIZERS, nearest_optimizer, optimizer_name
from dsyolo.config.deepspeed.remedies import type_remedy
from dsyolo.config.deepspeed.scheduler_table import scheduler_keys
from dsyolo.config.deepspeed.schema import MAX_GRAD_NORM, TOP_LEVEL
from dsyolo.config.deepspeed.set_aside import Reason, Settled, settle
from dsyolo.config.deepspeed.unknown_keys import fault_of, why_set_aside
from dsyolo.config.deepspeed.verdicts import Alias, JsonKey, JsonSection, Keys, Refused, SetAside
from dsyolo.config.run_config import AUTO

# ---- the file

MAX_DIGITS = 18  # so many always fit into 64 bits
MAX_DEPTH = 20  # the keys that are known go four deep


_WORDS: Mapping[str, bool | None] = {"True": True, "False": False, "None": None}
_WORD = re.compile(r"(\+?[Ii]nf|\+?Infinity|True|False|None)\s*,?\s*((#|//|/\*).*)?")


class _Object(dict[str, Any]):
    """A JSON object that remembers the keys given twice."""

    twice: tuple[str, ...] = ()


@dataclass(frozen=True)
class JsonSource:
    """A DeepSpeed JSON as its file was read."""

    name: str  # the file's path, or what messages call it
    content: Mapping[str, Any] | None  # without the values that are "auto"; None: it could not be read
    left_open: tuple[tuple[str, ...], ...] = ()  # the paths of these values
    problems: tuple[str, ...] = ()  # mistakes in its syntax
    set_aside: tuple[Reason, ...] = ()  # the keys without effect here, which `content` lacks


def read_json(path: str | Path) -> JsonSource:
    """Read a file of JSON or HJSON (no NaN, no key twice), in which "auto" is a value like others.

    What has no effect here is set aside. Its problems are left for `check` to raise.
    """
    try:
        text = read_text(path)
        source = _parsed(text)
        if _is_deep(source):
            raise RecursionError
    except OSError as error:
        problem = f"cannot be read: {error.strerror}. Check --deepspeed_config."
    except json.JSONDecodeError as error:
        remedy = _syntax_remedy(text, error.pos)
        problem = f"line {error.lineno}, column {error.colno}: {error.msg}. {remedy}"
    except _BadNumberError as error:
        problem = f"{error}. Write a number, or leave the key out."
    except RecursionError:
        problem = f"nested more than {MAX_DEPTH} deep, as no key here is. Leave that out."
    else:
        if isinstance(source, dict):
            twice = (f"{key}: given twice. Leave one out." for key in _given_twice(source, ""))
            return settled(JsonSource(str(path), source, problems=tuple(twice)))
        problem = 'must be an object, as in {"train_batch_size": 64}.'
    return JsonSource(str(path), None, problems=(problem,))


def read_source(path: str | Path) -> JsonSource:
    """Read a JSON. Values that are "auto" are taken out and listed in `left_open`."""
    read = read_json(path)
    if read.content is None:
        return read
    content, left_open = without_auto(read.content)
    return replace(read, content=content, left_open=tuple(left_open))


def settled(source: JsonSource) -> JsonSource:
    """Return the JSON without what has no effect here. A second time changes nothing."""
    if source.content is None:
        return source
    found: Settled = settle(source.content, _keys_for(source.content), why_set_aside)
    problems, aside = (*source.problems, *found.problems), (*source.set_aside, *found.set_aside)
    return replace(source, content=found.content, problems=problems, set_aside=aside)


class _BadNumberError(Exception):
    pass


def _parsed(text: str) -> Any:
    """Return what JSON makes of a text, or else HJSON, as DeepSpeed reads it; raise JSON's error where both fail."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_int=_whole_number)
    except json.JSONDecodeError:
        try:
            read = hjson.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
        except hjson.HjsonDecodeError:
            read = None
        if not isinstance(read, dict) or not read:  # HJSON takes any text for a string, and none for a block
            raise
        return _certain(read)


def _certain(value: Any) -> Any:
    """Return what HJSON read with the words that it takes for strings, often with a line's comma or comment, as values."""
    if isinstance(value, _Object):
        for key, part in value.items():
            value[key] = _certain(part)
    elif isinstance(value, list):
        return [_certain(part) for part in value]
    elif isinstance(value, str) and (match := _WORD.fullmatch(value)):
        return _WORDS.get(match[1], math.inf)
    return value


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    result = _Object(pairs)
    if len(result) < len(pairs):
        times = Counter(key for key, _ in pairs)
        result.twice = tuple(key for key in result if times[key] > 1)
    return result


def _constant(name: str) -> float:
    if name == "NaN":
        raise _BadNumberError(f"{name} is not JSON")
    return float(name)


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:  # Python would refuse to read thousands, and no float holds hundreds
        raise _BadNumberError(f"{text[:8]}... has {len(text)} digits, and {MAX_DIGITS} is the most")
    return int(text)


def _is_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deep(part, levels - 1) for part in parts)


def _given_twice(value: Any, prefix: str) -> list[str]:
    if not isinstance(value, _Object):
        return []
    inner = [path for key, part in value.items() for path in _given_twice(part, f"{prefix}{key}.")]
    return [prefix + key for key in value.twice] + inner


def _syntax_remedy(text: str, position: int) -> str:
    here = text[position:].lstrip()
    if here.startswith(("//", "/*", "#")):
        return "JSON has no comments: leave it out."
    if here.startswith(("}", "]")) and text[:position].rstrip().endswith(","):
        return "Leave out the comma before it."
    if text[position:].startswith(",") and text[position + 1 :].lstrip().startswith(("}", "]")):
        return "Leave out this comma, the last of its block."
    if here.startswith("'"):
        return 'Strings need double quotes: "stage".'
    if here.startswith(("True", "False", "None")):
        return "Write true, false or null."
    return "Correct the syntax there."


# ---- keys and types


def valid_part(source: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the part of the JSON with legal keys and types; add a problem for each of the others."""
    return _valid_block(source, _keys_for(source), "", problems)


def without_auto(source: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Return (a copy without the values that are "auto", their paths). Under an unknown key "auto" stays, to be refused."""
    return _without_auto(source, _keys_for(source), ())


def _keys_for(source: Mapping[str, Any]) -> Keys:
    """Return all keys: those of `optimizer.params` follow from `optimizer.type`, SGD where it gives none."""
    block = source.get("optimizer")
    given = block.get("type", AUTO) if isinstance(block, dict) else None
    name = optimizer_name("SGD" if given == AUTO else given)
    params: JsonSection | JsonKey = JsonKey("a block of values", lambda v: isinstance(v, dict))
    if name:
        # Beside a type that is "auto" each optimizer's keys may be "auto" too.
        every = {key: rule for facts in OPTIMIZERS.values() for key, rule in facts.keys.items()}
        known = every if isinstance(block, dict) and block.get("type") == AUTO else OPTIMIZERS[name].keys
        params = JsonSection({**known, "max_grad_norm": MAX_GRAD_NORM})
    names = " or ".join(f'"{name}"' for name in OPTIMIZERS)
    keys: Keys = {
        "type": JsonKey(names, lambda value: optimizer_name(value) is not None, nearest_optimizer),
        "params": params,
        "legacy_fusion": Refused("it is for Lamb. Leave it out."),
    }
    return {
        **TOP_LEVEL,
        "optimizer": JsonSection(keys, shorthand="type"),
        "scheduler": scheduler_keys(source),
    }


def _without_auto(
    block: Mapping[str, Any], keys: Mapping[str, Any], above: tuple[str, ...]
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    rest, found = {}, []
    for name, value in block.items():
        key, path = keys.get(name), (*above, name)
        means_something = path == ("activation_checkpointing", "recompute")  # the JSON's own word there
        if value == AUTO and isinstance(key, (JsonKey, JsonSection)) and not means_something:
            found.append(path)
        elif isinstance(value, Mapping):
            rest[name], inner = _without_auto(value, key.keys if isinstance(key, JsonSection) else {}, path)
            found += inner
        else:
            rest[name] = copy.deepcopy(value)
    return rest, found


def _valid_block(
    block: Mapping[str, Any], keys: Mapping[str, Any], prefix: str, problems: list[str]
) -> dict[str, Any]:
    valid = {}
    for name, value in block.items():
        path, key = prefix + name, keys.get(name)
        if key is None:
            problems.append(f"{path}: {fault_of(name, value, keys, prefix)}")
        elif isinstance(key, (SetAside, Alias)):
            continue  # settled before
        elif isinstance(key, Refused):
            if not key.lets_through(value):
                problems.append(f"{path}: {shown(value)} given, but {key.reason}")
        elif isinstance(key, JsonSection) and isinstance(value, dict):
            valid[name] = _valid_block(value, key.keys, f"{path}.", problems)
        elif isinstance(key, JsonKey) and key.keeps(value):
            valid[name] = value
        else:
            rule = "a block of keys, in braces" if isinstance(key, JsonSection) else key.rule
            remedy = type_remedy(name, value, key)
            end = "" if remedy.endswith("?") else "."
            problems.append(f"{path}: {shown(value)} given, but it must be {rule}. {remedy}{end}")
    return valid


def shown(value: Any) -> str:
    """Return a value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:36] + " ..."
