"""Remedies for options that the DeepSpeed JSON owns, where one was given and where none was."""

import re
from pathlib import Path

from dsyolo.config.ready_configs import READY_FOLDER, ready_folder

JSON_OWNS = "the DeepSpeed JSON owns it."
_THERE = re.compile(re.escape(JSON_OWNS) + r" Set (.+?) there\b")


def without_json(problem: str) -> str:
    """Return a problem for a run that was given no JSON: "Set KEY there" would name no file."""
    return _THERE.sub(_in_a_copy, problem)


def without_change(problem: str) -> str:
    """Return a problem for a run that is resumed, in which the JSON may not change the optimizer."""
    if "Set optimizer." not in problem:
        return problem
    rule = "A resumed run keeps the optimizer that it began with: take this option away"
    return _THERE.sub(f"{JSON_OWNS} {rule}, or start another run with --weights", problem)


def _in_a_copy(match: re.Match[str]) -> str:
    ready = Path(READY_FOLDER, "zero1.json")
    path = ready if ready.is_file() else ready_folder() / ready.name
    given = f"Copy {path}, set {match[1]} in the copy, and give it by --deepspeed_config"
    return f"{JSON_OWNS} {given}: its ZeRO stage and precision then hold, and nothing is planned"
