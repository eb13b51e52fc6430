"""The schedules that a DeepSpeed JSON may ask for: the one table of their keys, defaults and checks.

Source: DeepSpeed 0.19.8, runtime/lr_schedules.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsyolo.config.deepspeed.schema import JsonKey, JsonSection, Keys, Refused, number, one_of, whole
from dsyolo.config.messages import did_you_mean
from dsyolo.config.run_config import AUTO
from dsyolo.config.spec import SchedulerSpec

# Fields of a recipe that a scheduler of the JSON takes the place of.
SCHEDULE_KEYS = (
    "schedule",
    "lrf",
    "lr_scaling",
    "warmup_epochs",
    "warmup_min_images",
    "warmup_bias_lr",
    "warmup_momentum",
)


@dataclass(frozen=True)
class SchedulerFacts:
    """Keys and defaults of one schedule. None: required, or what `open` says."""

    defaults: Mapping[str, Any]
    required: tuple[str, ...] = ()


_RATES: Mapping[str, Any] = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001}
_WARMUP: Mapping[str, Any] = {"warmup_num_steps": 1000, "warmup_type": "log"}
_TOTAL: Mapping[str, Any] = {"total_num_steps": None}
_RATIOS: Mapping[str, Any] = {"warmup_min_ratio": 0.0, "cos_min_ratio": 0.0001}
SCHEDULERS: Mapping[str, SchedulerFacts] = {
    # Without warmup_max_lr, DeepSpeed takes the optimizer's rate.
    "WarmupLR": SchedulerFacts({**_RATES, "warmup_max_lr": None, **_WARMUP}),
    "WarmupDecayLR": SchedulerFacts({**_RATES, **_WARMUP, **_TOTAL}, ("total_num_steps",)),
    "WarmupCosineLR": SchedulerFacts({**_RATIOS, **_WARMUP, **_TOTAL}, ("total_num_steps",)),
}

_RATIO = JsonKey("a number from 0 to 1", lambda v: number().keeps(v) and v <= 1)
SCHEDULE_PARAMS: Keys = {
    # DeepSpeed takes a list too, with a value for each of its groups. Here they are others than in the user's script.
    "warmup_min_lr": number(),
    "warmup_max_lr": number(above=True),
    "warmup_min_ratio": _RATIO,
    "cos_min_ratio": _RATIO,
    "warmup_num_steps": whole(1),  # DeepSpeed refuses 0
    "warmup_type": one_of("log", "linear"),
    "total_num_steps": whole(1),
}
_LAST_ITERATION = Refused("a resumed run continues at its own step. Leave it out.", -1)

# What an "auto" leaves open, in words.
OPEN = {
    "warmup_min_lr": "0",
    "warmup_max_lr": "the optimizer's lr",
    "warmup_min_ratio": "0",
    "warmup_num_steps": "the steps of the recipe's warm-up",
    "warmup_type": "log",
    "cos_min_ratio": "0.0001",
    "total_num_steps": "the steps of the run",
}

_ONE_CYCLE = "--schedule cosine with --warmup_epochs"
# The own schedule that is nearest to each type of DeepSpeed, torch and Transformers; a part of the type's name suffices.
_NEAREST = {
    "onecycle": _ONE_CYCLE,
    "cycl": _ONE_CYCLE,
    "rangetest": "a run for each of a few values of optimizer.params.lr",
    "cos": "--schedule cosine with --lrf",
    "constant": "--lrf 1",
    "plateau": "--schedule linear with --patience",
    "linear": "--schedule linear with --lrf",
    "poly": "--schedule linear with --lrf",
    "exponential": "--schedule cosine with --lrf",
    "step": "--schedule cosine with --lrf",
}


def scheduler_keys(source: Mapping[str, Any]) -> JsonSection:
    """Return the keys of the block `scheduler`: those of `params` follow from its type."""
    block = source.get("scheduler")
    given = block.get("type") if isinstance(block, dict) else None
    params: JsonSection | JsonKey = JsonKey("a block of values", lambda v: isinstance(v, dict))
    facts = SCHEDULERS.get(given) if isinstance(given, str) else None
    if facts:
        keys: Keys = {name: SCHEDULE_PARAMS[name] for name in facts.defaults}
        foreign: Keys = {
            name: Refused(_owners(name)) for name in SCHEDULE_PARAMS if name not in facts.defaults
        }
        params = JsonSection({**keys, **foreign, "last_batch_iteration": _LAST_ITERATION})
    elif given == AUTO:
        params = JsonSection({**SCHEDULE_PARAMS, "last_batch_iteration": _LAST_ITERATION})
    # Any string: `scheduler_spec` refuses an unknown one with the nearest schedule.
    kind = JsonKey(" or ".join(map(json.dumps, SCHEDULERS)), lambda v: isinstance(v, str))
    return JsonSection({"type": kind, "params": params}, shorthand="type")


def open_text(key: str) -> str:
    """Return in words what an "auto" of `scheduler.params` is: of one of its keys, or of all of them."""
    return OPEN.get(key) or ", ".join(f"{name} {text}" for name, text in OPEN.items())


def _owners(key: str) -> str:
    owners = " and ".join(name for name, facts in SCHEDULERS.items() if key in facts.defaults)
    return f"it belongs to {owners}. Leave it out, or set scheduler.type."


def scheduler_spec(
    valid: Mapping[str, Any], left_open: frozenset[tuple[str, ...]], problems: list[str]
) -> SchedulerSpec | None:
    """Return the schedule that the JSON asks for; None for the recipe's.

    Args:
        valid: the part of the JSON with legal keys and types.
        left_open: paths of values that are "auto".
    """
    block = valid.get("scheduler")
    if not block:
        return None
    names = " or ".join(map(json.dumps, SCHEDULERS))
    if ("scheduler", "type") in left_open:
        if any(block.get("params", {}).values()):
            rule = f"and the values in scheduler.params need a type. Write {names}, or leave scheduler out"
            problems.append(f'scheduler.type: "auto" given, {rule}.')
        return None
    if "type" not in block:
        problems.append(f"scheduler.type: missing. Write {names}, or leave scheduler out.")
        return None
    given = block["type"]
    if given not in SCHEDULERS:
        problems.append(
            f"scheduler.type: {json.dumps(given)} given, but it must be {names}. {_remedy(given)}"
        )
        return None
    facts = SCHEDULERS[given]
    params = {**facts.defaults, **block.get("params", {})}
    opened = {path[-1] for path in left_open if path[:2] == ("scheduler", "params")}
    if ("scheduler", "params") in left_open:
        opened = set(facts.defaults)
    # "auto" is what follows from the run, where a default of DeepSpeed's would not.
    follows = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")
    params |= {key: None for key in opened if key in follows}
    for key in facts.required:
        if params[key] is None and key not in opened:
            rule = f'missing, and {given} needs it. Write "auto" for the steps of the run'
            problems.append(f"scheduler.params.{key}: {rule}.")
    steps = ("warmup_num_steps", "total_num_steps")
    params |= {key: int(params[key]) for key in steps if params.get(key) is not None}
    return SchedulerSpec(given, params)


def _remedy(given: str) -> str:
    """Return the nearest of the types, or the nearest own schedule."""
    name = given.lower().replace("_", "")
    for known in SCHEDULERS:
        if name == known.lower() or (
            name.startswith("warmup") and name.removesuffix("lr") == known[:-2].lower()
        ):
            return f"Did you mean {known}?"
    near = next((own for part, own in _NEAREST.items() if part in name), None)
    if near is None:
        near = "--schedule linear or cosine with --lrf"
        if hint := did_you_mean(given, SCHEDULERS):
            return hint
    return f"Leave scheduler out; the nearest here is {near}."
