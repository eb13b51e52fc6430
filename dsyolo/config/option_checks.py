"""Checks of command-line values that several commands share."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.run_config import check_model_name


def model_option(text: str) -> str:
    """Return the value of a command's --model, for argparse."""
    try:
        return check_model_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def out_of_range(args: argparse.Namespace, bounds: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a problem for each option that is outside its (least, most). An option left out is in range."""
    problems = []
    for option, (least, most) in bounds.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None and not least <= value <= most:
            given = str(value).removesuffix(".0")
            problems.append(f"--{option}: {given} given, but it must be between {least} and {most}.")
    return problems


def cannot_hold_file(path: Path) -> str | None:
    """Return why a file cannot be written at `path`; None where it can."""
    if path.exists() and not path.is_file():
        return f"{path} given, but it is a folder or device. Name a file."
    return cannot_hold_files(path.parent)
