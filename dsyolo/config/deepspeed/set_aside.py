"""Sets aside what a DeepSpeed JSON holds that is harmless and has no effect here, each key with its reason.

Two passes: `settle` needs no more than the key and its value, and leaves a JSON in one spelling; `without_effect` finds
what the rest of the JSON makes useless. A run, `dsyolo doctor` and `dsyolo scale` report both in one line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.schema import short_dtype
from dsyolo.config.deepspeed.verdicts import Alias, JsonKey, JsonSection, Keys, Refused, SetAside

COMMENT = re.compile(
    r"_|//|/\*|#|\$|((comment|note|description|docs?|readme|author|todo)s?[0-9]*([_-].*)?$)|.*[_-](comment|note)s?$",
    re.IGNORECASE,
)
NEVER_PRINTS = ("inf", "+inf", "infinity", "+infinity")
OFF, SWITCHED_OFF = "off", "its block is switched off"
OFFLOADS = ("offload_optimizer", "offload_param")
INERT = 'it does nothing by itself; "recompute": "blocks" in it recomputes'


class Reason(NamedTuple):
    """A key that is set aside: its path, and why."""

    path: str
    reason: str


class Settled(NamedTuple):
    """A JSON without what is set aside."""

    content: dict[str, Any]
    set_aside: tuple[Reason, ...]
    problems: tuple[str, ...]


# Returns why an unknown key is set aside, or None to have it refused: (name, value, keys, prefix, whether it is strict).
Unknown = Callable[[str, Any, Keys, str, bool], str | None]


def settle(content: Mapping[str, Any], keys: Keys, unknown: Unknown) -> Settled:
    """Return the JSON in its modern spelling, without the keys that have no effect here."""
    aside: list[Reason] = []
    problems: list[str] = []
    modern = _modern(content, aside, problems)
    rest = _Walk(unknown, aside, problems).block(modern, keys, "", is_strict=False)
    return Settled(rest, tuple(aside), tuple(problems))


def explain(set_aside: Iterable[Reason]) -> list[str]:
    """Return the line of a report, or nothing: keys of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in set_aside:
        by_reason.setdefault(reason, []).append(path)
    parts = [f"{', '.join(paths)} ({reason})" for reason, paths in by_reason.items()]
    return [f"set aside, without effect here: {'; '.join(parts)}"] if parts else []


class _Walk:
    """One walk over a JSON beside the tables of its keys."""

    def __init__(self, unknown: Unknown, aside: list[Reason], problems: list[str]) -> None:
        self._unknown, self._aside, self._problems = unknown, aside, problems

    def block(self, block: Mapping[str, Any], keys: Keys, prefix: str, *, is_strict: bool) -> dict[str, Any]:
        """Return the block without what is set aside."""
        rest: dict[str, Any] = {}
        is_off = bool(prefix) and block.get("enabled") is False
        for given, value in block.items():
            name, key = given, keys.get(given)
            if isinstance(key, Alias):
                name, key = key.name, keys[key.name]
                if name in block and value != block[name]:
                    rule = f"so is {name}, which is the same key. Leave one out"
                    self._problems.append(f"{prefix}{given}: {_shown(value)} given, and {rule}.")
                    continue
            reason = self._reason(given, value, key, keys, prefix, is_strict)
            if reason is None and is_off and not _is_kept(key, value):
                reason = SWITCHED_OFF
            if reason is not None:
                self._aside.append(Reason(prefix + given, reason))
            elif isinstance(key, JsonSection) and isinstance(value, Mapping):
                rest[name] = self.block(value, key.keys, f"{prefix}{name}.", is_strict=key.is_strict)
            else:
                rest[name] = value
        return rest

    def _reason(
        self, name: str, value: Any, key: Any, keys: Keys, prefix: str, is_strict: bool
    ) -> str | None:
        """Return why a key is set aside, None where it is not."""
        if key is None:
            return "a comment" if COMMENT.match(name) else self._unknown(name, value, keys, prefix, is_strict)
        if isinstance(key, SetAside):
            return key.reason
        if isinstance(key, Refused):
            return off_reason(key, value)
        if value is None and not (isinstance(key, JsonKey) and key.keeps(None)):
            return "null, so its default holds"
        return OFF if value is False and isinstance(key, JsonSection) else None


def off_reason(key: Refused, value: Any) -> str | None:
    """Return why a key is set aside that would be refused with another value; None where it is refused."""
    if not key.lets_through(value):
        return None
    return OFF if key.off is False or value is None or value == "auto" else "as it is here"


def _is_kept(key: Any, value: Any) -> bool:
    is_auto = value == "auto" and isinstance(key, (JsonKey, JsonSection))
    return is_auto or isinstance(key, JsonSection) or (isinstance(key, JsonKey) and key.keeps(value))


# ---- old spellings


def _modern(content: Mapping[str, Any], aside: list[Reason], problems: list[str]) -> dict[str, Any]:
    """Return the JSON with the blocks that DeepSpeed itself makes of old spellings."""
    result = dict(content)
    if _never_prints(result.get("steps_per_print")):
        del result["steps_per_print"]
        aside.append(Reason("steps_per_print", "endless: DeepSpeed prints nothing of its own"))
    if result.get("gradient_clipping") == math.inf:
        result["gradient_clipping"] = 0.0  # DeepSpeed clips nothing then
    types = result.get("data_types")
    if isinstance(types, Mapping):  # DeepSpeed takes the long names here
        result["data_types"] = {
            key: short_dtype(value) if key.endswith("_dtype") else value for key, value in types.items()
        }
    zero = result.get("zero_optimization")
    if isinstance(zero, bool):
        zero = {"stage": int(zero)}
        if "allgather_size" in result and zero["stage"]:
            zero["allgather_bucket_size"] = result.pop("allgather_size")
    if isinstance(zero, Mapping):
        result["zero_optimization"] = _modern_zero(zero, aside, problems)
    return result


def _modern_zero(zero: Mapping[str, Any], aside: list[Reason], problems: list[str]) -> dict[str, Any]:
    result = dict(zero)
    for old, new in (
        ("cpu_offload", "offload_optimizer"),
        ("cpu_offload_param", "offload_param"),
        ("cpu_offload_params", "offload_param"),
    ):
        value = result.get(old)
        is_flag = isinstance(value, (bool, int, float)) and value in (0, 1)
        if is_flag:
            result[old] = bool(value)  # as DeepSpeed reads 1
        if new in result or value in (None, "auto") or (is_flag and not value):
            continue
        if not is_flag:
            problems.append(
                f"zero_optimization.{old}: {_shown(value)} given, but it must be true or false. Write one."
            )
        elif result.get("stage", 0) == 0:
            stages = "3" if new == "offload_param" else "1, 2 or 3"
            remedy = f"Set zero_optimization.stage to {stages[0]}, or leave it out"
            rule = f"it needs stage {stages}, and stage 0 is given. {remedy}"
            problems.append(f"zero_optimization.{old}: {_shown(value)} given, but {rule}.")
        else:
            result[new] = {"device": "cpu"}
        del result[old]
    for name in OFFLOADS:
        block = result.get(name)
        if isinstance(block, Mapping) and "device" in block and block["device"] in (None, "auto"):
            result[name] = {**block, "device": "none"}
            reason = f"{json.dumps(block['device'])}, so nothing is offloaded"
            aside.append(Reason(f"zero_optimization.{name}.device", reason))
    return result


def _never_prints(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower() in NEVER_PRINTS
    return isinstance(value, float) and value == math.inf


# ---- what the rest of the JSON makes useless


def without_effect(valid: Mapping[str, Any], recompute: str) -> Iterator[Reason]:
    """Yield the keys of a JSON of legal keys and types that other keys leave without effect.

    Args:
        recompute: the option of the command line.
    """
    zero = valid.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    if stage < 3:
        names = [name for name in zero if name.startswith("stage3_")]
        yield from (Reason(f"zero_optimization.{name}", "ZeRO 3 alone uses it") for name in names)
    if "offload_param" in zero and stage in (1, 2):
        yield Reason(
            "zero_optimization.offload_param", "ZeRO 3 alone divides the weights, and can offload them"
        )
    for name in OFFLOADS:
        block = zero.get(name, {})
        if block and "device" not in block and "nvme_path" not in block:
            yield Reason(f"zero_optimization.{name}", "no device in it, so nothing is offloaded")
        if "nvme_path" in block and block.get("device") in ("cpu", "none"):
            path = f"zero_optimization.{name}"
            if not (name == "offload_param" and stage in (1, 2)):
                yield Reason(f"{path}.nvme_path", 'only the device "nvme" uses it')
    block = valid.get("activation_checkpointing")
    if block is not None and block.get("recompute", "auto") == "auto" and recompute in ("auto", "none"):
        yield Reason("activation_checkpointing", INERT)


def remove(content: dict[str, Any], found: Iterable[Reason]) -> None:
    """Take what was found out of a JSON whose blocks may be changed."""
    for path, _ in found:
        *above, name = path.split(".")
        block: Any = content
        for key in above:
            block = block.get(key, {})
        block.pop(name, None)


def merged(first: Iterable[Reason], then: Iterable[Reason]) -> tuple[Reason, ...]:
    """Return both, without the keys of a block that is set aside as a whole."""
    both = list(dict.fromkeys([*first, *then]))
    blocks = tuple(f"{path}." for path, _ in both)
    return tuple(one for one in both if not one.path.startswith(blocks))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:36] + " ..."
