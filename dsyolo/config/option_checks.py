"""Checks of command-line values that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsyolo.config.messages import cannot_hold_files, rule_of, validate
from dsyolo.config.run_config import RunConfig, check_model_name


def model_option(text: str) -> str:
    """Return the value of a command's --model, for argparse."""
    try:
        return check_model_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_option(key: str) -> Callable[[str], Any]:
    """Return a reader, for argparse, of values that follow the rule of the field `key` of `RunConfig`."""

    def value_of(text: str) -> Any:
        run = validate(RunConfig, {"data": "", key: text}, "", str, [])
        if run is None:
            rule = rule_of(RunConfig.model_fields[key])
            raise argparse.ArgumentTypeError(f"{text} given, but it must be {rule}")
        return getattr(run, key)

    return value_of


def out_of_range(args: argparse.Namespace, bounds: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a problem for each option that is outside its (least, most). An option left out is in range."""
    problems = []
    for option, (least, most) in bounds.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None and not least <= value <= most:
            given = str(value).removesuffix(".0")
            problems.append(f"--{option}: {given} given, but it must be {least} to {most}. Correct it.")
    return problems


def cannot_hold_file(path: Path) -> str | None:
    """Return why a file cannot be written at `path`; None where it can."""
    if path.exists() and not path.is_file():
        return f"{path} given, but it is a folder or device. Name a file."
    return cannot_hold_files(path.parent)
