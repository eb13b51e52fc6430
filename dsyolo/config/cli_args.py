"""A command line built from the fields of pydantic models. Values stay text: the models judge them.

A field's `json_schema_extra` has its help `group`. Dashes and underscores are the same in an option's name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, get_args

from pydantic.fields import FieldInfo

from dsyolo.base.errors import UserError
from dsyolo.config.messages import choices_of, plain_type


def read_options(
    fields: Mapping[str, FieldInfo],
    argv: Sequence[str] | None,
    unknown: Callable[[str], str],
    problems: list[str],
) -> dict[str, Any]:
    """The options given, by field; `none` and `auto` are None where a field may be None.

    Args:
        argv: the words, None for those of this process.
        unknown: the problem line for an option that no field has.
        problems: gets a line for each word that cannot be placed.

    Raises:
        UserError: an option without its value. `--help` prints and exits with status 0.
    """
    flags = {key for key, field in fields.items() if field.annotation is bool}
    words = [_canonical(word, flags) for word in (sys.argv[1:] if argv is None else argv)]
    known, extras = _build_parser(fields).parse_known_args(words)
    is_value = False  # of the unknown option before it
    for word in extras:
        is_option = word.startswith("--")
        if is_option:
            problems.append(unknown(word[2:].partition("=")[0]))
        elif not is_value:
            rule = "Options start with --, and flags take no value: --ema, --no-ema"
            problems.append(f"{word}: not an option. {rule}.")
        is_value = is_option and "=" not in word
    given = {key: value for key, value in vars(known).items() if key in fields}
    for key, value in given.items():
        if type(None) in get_args(fields[key].annotation) and value.lower() in ("none", "auto"):
            given[key] = None
    return given


def extra_of(field: FieldInfo, key: str) -> Any:
    """What a field says about itself under `key`."""
    assert isinstance(field.json_schema_extra, dict), field
    return field.json_schema_extra[key]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            "The command line cannot be used", [f"{message.removeprefix('argument ')}. See --help."]
        )


def _build_parser(fields: Mapping[str, FieldInfo]) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="train.py --data FILE [options]",
        description="Train a YOLOv5 detector under DeepSpeed.",
        epilog="How it runs (batch sizes, precision, ZeRO, optimizer, lr) stands in the DeepSpeed JSON.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    groups: dict[str, Any] = {}
    for key, field in fields.items():
        title = extra_of(field, "group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(f"--{key}", **_option(field))
    # The launchers pass the first, habit the second; the rank comes from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser


def _option(field: FieldInfo) -> dict[str, Any]:
    if field.annotation is bool:
        default = "yes" if field.default else "no"
        return {"action": argparse.BooleanOptionalAction, "help": f"{field.description} (default: {default})"}
    if field.is_required():
        return {"metavar": "FILE", "help": f"{field.description} (required)"}
    default = "none" if field.default is None else field.default
    choices = choices_of(field)
    text = f"{field.description}{': ' + ', '.join(choices) if choices else ''} (default: {default})"
    if alone := extra_of(field, "alone"):
        return {
            "nargs": "?",
            "const": alone,
            "metavar": "TEXT",
            "help": f"{text}, {alone} where it stands alone",
        }
    return {"metavar": {int: "N", float: "X"}.get(plain_type(field), "TEXT"), "help": text}


def _canonical(word: str, flags: Iterable[str]) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and name[3:] in flags:
        name = "no-" + name[3:]
    return f"--{name}{equals}{value}"
