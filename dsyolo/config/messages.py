"""Messages for what a user got wrong: what was given, the rule, the remedy, did-you-mean."""

import difflib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dsyolo.base.safe_io import shortened

Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model],
    values: Mapping[str, Any],
    prefix: str,
    unknown: Callable[[str], str],
    problems: list[str],
) -> Model | None:
    """Return an instance, or None with a line for each fault added to `problems`.

    Args:
        prefix: of a key as the user wrote it: `--` on the command line.
        unknown: returns the line for a key that the model does not have.
    """
    try:
        return model(
            **{str(key): value for key, value in values.items()}
        )  # a YAML's key may be a number, or null
    except ValidationError as error:
        for fault in error.errors():
            key = str(fault["loc"][0])
            field = model.model_fields.get(key)
            if field is None:
                problems.append(unknown(key))
            elif fault["type"] == "missing":
                problems.append(f"{prefix}{key}: missing. Give the {field.description}.")
            elif fault["type"] == "value_error":
                problems.append(f"{prefix}{key}: {fault['ctx']['error']}")
            else:
                given = shortened(str(fault["input"]))
                remedy = did_you_mean(given, choices_of(field)) or _nearest(given, field)
                problems.append(f"{prefix}{key}: {given} given, but it must be {rule_of(field)}. {remedy}")
    return None


def counted(number: int, what: str) -> str:
    """Return a number and its noun, as in 1 rank, 2 ranks."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """Return a question with the nearest known word, whatever its case; empty where none is near by `cutoff`."""
    word = shortened(word)
    by_lower = {one.lower(): one for one in sorted(known)}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return f"Did you mean {prefix}{by_lower[close[0]]}?" if close else ""


def cannot_hold_files(folder: Path) -> str | None:
    """Return why no files can be written into `folder`, or into its nearest parent that exists; None if they can."""
    there = folder
    try:
        while not there.exists() and there != there.parent:
            if there.is_symlink():
                rule = f"{there} is a link to {os.readlink(there)}, which does not exist"
                return f"{rule}. Remove the link, or make what it leads to."
            there = there.parent
        with tempfile.TemporaryDirectory(prefix=".dsyolo-", dir=there):  # permissions alone do not show it
            return None
    except NotADirectoryError:
        return f"{there} is a file, and a folder is needed there. Name another."
    except OSError as error:
        return f"{there} cannot be written to: {error.strerror}. Name another."


def rule_of(field: FieldInfo) -> str:
    """Return what a value must be, as in "must be ..."."""
    choices = choices_of(field)
    if choices:
        return f"one of {', '.join(choices)}"
    limits = _limits(field)
    if "min_length" in limits:
        return "a name, not empty"
    kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(
        plain_type(field), "a string"
    )
    names = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = " and ".join(f"{names[key]} {limits[key]}" for key in names if key in limits)
    return f"{kind}{', ' + bounds if bounds else ''}"


def _nearest(given: Any, field: FieldInfo) -> str:
    """Return the remedy for a number out of range: the limit where it may be reached, else the default."""
    try:
        number = float(given)
    except (TypeError, ValueError):
        number = math.nan
    limits = _limits(field)
    if number > limits.get("le", math.inf):
        return f"Set it to {limits['le']}, or leave it out."
    if number < limits.get("ge", -math.inf):
        return f"Set it to {limits['ge']}, or leave it out."
    return f"Leave it out for {field.default}." if field.default is not None else "Leave it out."


def _limits(field: FieldInfo) -> dict[str, Any]:
    names = ("ge", "gt", "le", "lt", "min_length")
    return {name: getattr(part, name) for part in field.metadata for name in names if hasattr(part, name)}


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """Return the values of a Literal field, nothing for other fields."""
    return tuple(arg for arg in get_args(field.annotation) if isinstance(arg, str))


def plain_type(field: FieldInfo) -> Any:
    """Return the type of a field, without the None of an optional one."""
    return next((arg for arg in get_args(field.annotation) if isinstance(arg, type)), field.annotation)
