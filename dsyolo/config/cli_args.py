"""Reads the command line of a run, whose options are the fields of `RunConfig` and `Recipe`.

Values stay text until pydantic checks them. Dashes and underscores are the same in an option's name.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic.fields import FieldInfo

from dsyolo.base.environment import wandb_options
from dsyolo.base.errors import UserError
from dsyolo.base.user_code import is_reference
from dsyolo.config.messages import choices_of, did_you_mean, plain_type, validate
from dsyolo.config.recipe import PRESETS, RECIPE_KEYS, Recipe, extra_of, preset
from dsyolo.config.resume import ResumePoint, config_path, resume_point
from dsyolo.config.resume_path import settle_resume
from dsyolo.config.run_config import AUTO, RUN_KEYS, RunConfig, read_yaml, unknown_in_recipe, unknown_option

FOLDER_KEYS = ("project", "name")


def parse(argv: Sequence[str] | None = None) -> RunConfig:
    """Return the run configuration of a command line, as `read_command_line` does."""
    return read_command_line(argv)[0]


def read_command_line(
    argv: Sequence[str] | None = None, program: str = "train.py"
) -> tuple[RunConfig, ResumePoint | None]:
    """Read a command line (None: of this process); return the run and where it resumes. The help names `program`.

    Order of precedence: an option, then the recipe file or preset of `--hyp`, then, under `--resume`, the
    `config.yaml` of the resumed run, then W&B's own variables (WANDB_MODE even before that file), then the defaults.

    Raises:
        UserError: unknown options, values out of range, missing files: all of them at once.
    """
    problems: list[str] = []
    fields = {key: RunConfig.model_fields[key] for key in RunConfig.model_fields if key in RUN_KEYS}
    given = read_options({**fields, **Recipe.model_fields}, argv, problems, program)
    is_known = settle_resume(given, problems)  # else the run's own settings are not either
    point = _resume_point(given, problems)
    resumes = point is not None or given.get("resume") == "always" or not is_known
    base = point.config.dump() if point else {}
    recipe_base = base.pop("recipe", None)
    recipe_given = {key: given.pop(key) for key in list(given) if key in RECIPE_KEYS}
    named = set(recipe_given)
    # A run may have been moved: its folder is the one where it was found.
    kept = {key: value for key, value in base.items() if key not in FOLDER_KEYS}
    wandb = wandb_options(problems)
    if point:  # its W&B run goes on where it is; whether this machine reaches W&B is another matter
        wandb = {key: value for key, value in wandb.items() if key == "wandb"}
    values = {**kept, **wandb, **given}
    if recipe_base is None or "hyp" in given:
        hyp = str(values.get("hyp", "low"))
        recipe_base = _read_recipe(hyp, problems)
        named |= set() if hyp in PRESETS else _changed(recipe_base)
    recipe = validate(Recipe, {**recipe_base, **recipe_given}, "--", unknown_option, problems)
    if recipe:  # its `model_fields_set` are the fields that the user named, not those of a preset
        recipe.model_fields_set.intersection_update(named)
    if "data" not in values and not resumes:
        problems.append("--data: missing. Name the data set's YAML file, as in --data data.yaml.")
    if is_known or "deepspeed_config" in given:
        problems += _missing_files(values, resumes)
    if is_reference(str(base.get("model", ""))) and "model" not in given:
        # A run's folder may be somebody else's: what it names is not run unless the command line names it.
        rule = f"missing, and only the command line may name code, as the resumed run's {base['model']}"
        problems.append(f"--model: {rule}. Add --model {base['model']}.")
    values = {"data": "", **values, "recipe": recipe or Recipe()}  # whole, so that the rest is checked too
    run = validate(RunConfig, values, "--", unknown_option, problems)
    if problems or run is None:
        raise UserError("The command line cannot be used", problems)
    return run, point


def _resume_point(given: Mapping[str, Any], problems: list[str]) -> ResumePoint | None:
    fields = RunConfig.model_fields
    folder = Path(*(given.get(key, fields[key].default) for key in FOLDER_KEYS))
    resume = given.get("resume", fields["resume"].default)
    if resume == "always" and not config_path(folder).is_file():
        rule = f"{config_path(folder)} does not exist, so there is no run to resume"
        problems.append(f"--resume: {rule}. Check --project and --name, or leave --resume out.")
        return None
    return resume_point(resume, folder)


def _missing_files(values: Mapping[str, Any], resumes: bool) -> list[str]:
    """Return a problem for each file that a run reads and that does not exist. A resumed run needs no weights."""
    problems = []
    for key in ("deepspeed_config", "data") if resumes else ("deepspeed_config", "data", "weights"):
        field = RunConfig.model_fields[key]
        value = values.get(key, field.default)
        is_planned = (key, value) == ("deepspeed_config", AUTO)
        if not isinstance(value, str) or is_planned or Path(value).is_file():
            continue
        what, hint = _missing_file(Path(value), key)
        seen = "" if Path(value).is_absolute() or Path(value).exists() else f", seen from {Path.cwd()}"
        hint = hint or f"Give the path of a file{seen}: {field.description}."
        problems.append(f"--{key}: {value} {what}. {hint}")
    return problems


def _missing_file(path: Path, key: str) -> tuple[str, str]:
    """Return what is wrong with the path given for `key`, and a question for the file that was likely meant."""
    suffixes = {"deepspeed_config": (".json",), "weights": (".safetensors",)}.get(key, (".yaml", ".yml"))
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if one.suffix in suffixes)
        return "is a folder, but it must be a file", f"Did you mean {inside[0]}?" if inside else ""
    if path.exists():
        return "is a device or pipe, but it must be a file", ""
    beside = [one.name for one in path.parent.iterdir() if one.is_file()] if path.parent.is_dir() else []
    return "does not exist", did_you_mean(path.name, beside)


def _read_recipe(hyp: str, problems: list[str]) -> dict[str, Any]:
    """Return the values of a preset, or of a YAML file on top of preset low. An unknown key is a problem."""
    if hyp in PRESETS:
        return preset(hyp).model_dump()
    path = Path(hyp)
    if not path.is_file():
        what, near = _missing_file(path, "hyp")
        hint = did_you_mean(hyp, PRESETS) or near or "Name one of them, or a YAML file that is there."
        problems.append(f"--hyp: {hyp} {what}, and the presets are {', '.join(PRESETS)}. {hint}")
        return {}
    faults: list[str] = []
    values = read_yaml(path, faults)
    validate(Recipe, values, "", unknown_in_recipe, faults)
    problems += [f"--hyp: {path}: {fault}" for fault in faults]
    return {} if faults else values


def _changed(recipe: Mapping[str, Any]) -> set[str]:
    """Return the keys of a recipe file whose values no preset has: a file is often an edited copy of one."""
    presets = [preset(name) for name in PRESETS]
    return {key for key, value in recipe.items() if all(getattr(one, key) != value for one in presets)}


# ---- options


def read_options(
    fields: Mapping[str, FieldInfo], argv: Sequence[str] | None, problems: list[str], program: str
) -> dict[str, Any]:
    """Return the options given, by field; `none` and `auto` are None where a field may be None.

    An argument that is not an option is a problem. An option without its value raises UserError, `--help` exits with 0.
    """
    flags = {key for key, field in fields.items() if field.annotation is bool}
    argv = [_canonical(one, flags) for one in (sys.argv[1:] if argv is None else argv)]
    known, unknown = _build_parser(fields, program).parse_known_args(argv)
    was_option = False
    for one in unknown:
        if one.startswith("--"):
            problems.append(unknown_option(one[2:].partition("=")[0]))
        elif not was_option:  # else it is the value of the unknown option before it
            problems.append(
                f"{one}: not an option. Options start with --, and flags take no value: --ema, --no-ema."
            )
        was_option = one.startswith("--") and "=" not in one
    given = {key: value for key, value in vars(known).items() if key in fields}
    for key, value in given.items():
        if type(None) in get_args(fields[key].annotation) and value.lower() in ("none", "auto"):
            given[key] = None
    return given


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(
            "The command line cannot be used", [f"{message.removeprefix('argument ')}. See --help."]
        )


def _build_parser(fields: Mapping[str, FieldInfo], program: str) -> argparse.ArgumentParser:
    parser = _Parser(
        usage=f"{program} --data FILE [options]",
        description="Train a YOLOv5 detector under DeepSpeed.",
        epilog="The DeepSpeed JSON sets how the training runs: batch sizes, precision, ZeRO, optimizer, lr.",
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
    # Launchers pass the first, many users the second out of habit. The rank comes from the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser


def _option(field: FieldInfo) -> dict[str, Any]:
    if field.annotation is bool:
        default = "yes" if field.default else "no"
        return {"action": argparse.BooleanOptionalAction, "help": f"{field.description} (default: {default})"}
    if field.is_required():
        return {"metavar": "FILE", "help": f"{field.description} (required)"}
    default = extra_of(field, "unset") if field.default is None else field.default
    text, choices = str(field.description), choices_of(field)
    if not all(choice in text for choice in choices):
        text += f": {', '.join(choices)}"
    if alone := extra_of(field, "alone"):
        text += f". Without a value: {alone} (default: {default})"
        return {"nargs": "?", "const": alone, "metavar": "TEXT", "help": text}
    text += f" (default: {default})"
    return {"metavar": {int: "N", float: "X"}.get(plain_type(field), "TEXT"), "help": text}


def _canonical(argument: str, flags: Iterable[str]) -> str:
    """Return an argument with the option's name as argparse knows it: --save-every is --save_every, --no_ema --no-ema."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and name[3:] in flags:
        name = "no-" + name[3:]
    return f"--{name}{equals}{value}"
