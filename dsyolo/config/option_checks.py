"""Checks of command-line values that several commands share."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsyolo.base.atomic_file import write_file
from dsyolo.base.safe_io import read_bytes
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


def cannot_replace_json(path: Path, key: str) -> str | None:
    """Return why a report cannot be written at `path`, as where a file without its `key` lies; None where it can."""
    fault = cannot_hold_file(path)
    if fault or not path.exists():
        return fault
    try:
        content = read_bytes(path)
    except OSError as error:
        return f"{path} given, but what is there cannot be read: {error.strerror}. Name another file."
    if content and f'"{key}"'.encode() not in content:
        return f"{path} given, but it holds something else than such a report. Name another file."
    return None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all. Raise OSError; what was there is then kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
