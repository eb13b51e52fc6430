"""Reads the command line of a run, whose options are the fields of `RunConfig` and `Recipe`.

Values stay text until pydantic checks them. Dashes and underscores are the same in an option's name.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic.fields import FieldInfo

from dsyolo.base.environment import wandb_options
from dsyolo.base.errors import UserError
from dsyolo.base.text import escaped
from dsyolo.base.user_code import is_reference
from dsyolo.config.batch_options import PLANNED, per_rank
from dsyolo.config.command_parser import CommandLine
from dsyolo.config.exported_folder import missing_data_yaml
from dsyolo.config.foreign_values import missing_release, release_name
from dsyolo.config.json_remedy import without_change, without_json
from dsyolo.config.messages import choices_of, did_you_mean, plain_type, validate
from dsyolo.config.ready_configs import READY_FOLDER, locate, ready_names
from dsyolo.config.recipe import PRESETS, RECIPE_KEYS, Recipe, extra_of, preset
from dsyolo.config.resume import ResumePoint, config_path, resume_point
from dsyolo.config.resume_path import settle_resume
from dsyolo.config.run_config import AUTO, RUN_KEYS, RunConfig, read_yaml, unknown_in_recipe, unknown_option

FOLDER_KEYS = ("project", "name")
BATCH_OF_ALL = "batch_size"  # YOLOv5's option: images of all GPUs in a forward pass


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that raises UserError instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError("The command line cannot be used", [f"{message}. See --help."])


def parse(argv: Sequence[str] | None = None) -> RunConfig:
    """Return the run configuration of a command line, as `read_command_line` does."""
    return read_command_line(argv)[0]


def read_command_line(
    argv: Sequence[str] | None = None,
    program: str = "train.py",
    *,
    ranks: int = 1,
    notes: list[str] | None = None,
) -> tuple[RunConfig, ResumePoint | None]:
    """Read a command line (None: of this process); return the run and where it resumes. The help names `program`.

    `ranks` share YOLOv5's --batch-size; `notes` gets the lines on options of other programs that were taken.

    Order of precedence: an option, then the recipe file or preset of `--hyp`, then, under `--resume`, the
    `config.yaml` of the resumed run, then W&B's own variables (WANDB_MODE even before that file), then the defaults.

    Raises:
        UserError: unknown options, values out of range, missing files: all of them at once.
    """
    problems: list[str] = []
    fields = {key: RunConfig.model_fields[key] for key in RunConfig.model_fields if key in RUN_KEYS}
    notes = [] if notes is None else notes
    given = read_options({**fields, **Recipe.model_fields}, argv, problems, program, notes)
    is_known = settle_resume(given, problems)  # else the run's own settings are not either
    is_batch_of_all = BATCH_OF_ALL in given
    _read_batch(given, ranks, problems, notes)
    point = _resume_point(given, problems)
    resumes = point is not None or given.get("resume") == "always" or not is_known
    base = point.config.dump() if point else {}
    if "deepspeed_config" in given:
        base.pop("batch", None)  # it was for the JSON so far; the global batch stays
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
    if not point:
        problems += _folder_faults(given)
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
        if point:
            problems = [without_change(line) for line in problems]
        if values.get("deepspeed_config", AUTO) == AUTO:
            problems = [without_json(line) for line in problems]
        if is_batch_of_all:
            problems = [re.sub("^--batch:", "--batch-size:", line) for line in problems]
        raise UserError("The command line cannot be used", problems)
    return run, point


def wants_cpu(argv: Sequence[str] | None = None) -> bool:
    """Return whether a command line (None: of this process) asks for the CPU, before it is read as a whole."""
    arguments = sys.argv[1:] if argv is None else argv
    given = [word.removeprefix("--") for word in arguments if word.startswith(("--device=", "device="))]
    given += [f"device={after}" for word, after in pairwise(arguments) if word == "--device"]
    return given[-1:] == ["device=cpu"]


def _resume_point(given: Mapping[str, Any], problems: list[str]) -> ResumePoint | None:
    fields = RunConfig.model_fields
    folder = Path(*(given.get(key, fields[key].default) for key in FOLDER_KEYS))
    resume = given.get("resume", fields["resume"].default)
    if resume == "always" and not config_path(folder).is_file():
        rule = f"{config_path(folder)} does not exist, so there is no run to resume"
        problems.append(f"--resume: {rule}. Check --project and --name, or leave --resume out.")
        return None
    return resume_point(resume, folder)


def _folder_faults(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a new run cannot have the folder that the command line gives it."""
    for key in FOLDER_KEYS:
        value = str(given.get(key, ""))
        if (shown := escaped(value, lines=False)) != value:
            yield f"--{key}: {shown} given, but it has characters that cannot be shown. Leave them out."
    name = Path(str(given.get("name", "")))
    if name.is_absolute() or ".." in name.parts:
        target = Path(
            os.path.normpath(Path(str(given.get("project", RunConfig.model_fields["project"].default)), name))
        )
        where = f"--project {shlex.quote(str(target.parent))} --name {shlex.quote(target.name)}"
        yield escaped(
            f"--name: {name} given, but it must be a folder inside of --project. Give {where}.", lines=False
        )


def _missing_files(values: Mapping[str, Any], resumes: bool) -> list[str]:
    """Return a problem for each file that a run reads and that does not exist. A resumed run needs no weights."""
    problems = []
    for key in ("deepspeed_config", "data") if resumes else ("deepspeed_config", "data", "weights"):
        field = RunConfig.model_fields[key]
        value = values.get(key, field.default)
        is_planned = (key, value) == ("deepspeed_config", AUTO)
        if not isinstance(value, str) or is_planned:
            continue
        path = locate(value) if key == "deepspeed_config" else Path(value)
        if path.is_file():
            continue
        what, hint = _missing_file(path, key)
        seen = "" if path.is_absolute() or path.exists() else f", seen from {Path.cwd()}"
        hint = hint or f"Give the path of a file{seen}: {field.description}."
        problems.append(f"--{key}: {value} {what}. {hint}")
    return problems


def _missing_file(path: Path, key: str) -> tuple[str, str]:
    """Return what is wrong with the path given for `key`, and a question for the file that was likely meant."""
    suffixes = {"deepspeed_config": (".json",), "weights": (".safetensors",)}.get(key, (".yaml", ".yml"))
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if one.suffix in suffixes)
        what = "is a folder, but it must be a file"
        if inside:
            return what, f"Did you mean {inside[0]}?"
        return what, missing_data_yaml(path) if key == "data" else ""
    if path.exists():
        return "is a device or pipe, but it must be a file", ""
    if key == "weights" and (path.suffix in (".pt", ".pth") or release_name(str(path))):
        return "does not exist", missing_release(str(path))
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    beside = [one.name for one in there if one.suffix.lower() in suffixes and one.is_file()]
    hint = did_you_mean(path.name, beside)
    if key == "deepspeed_config" and not hint and str(path.parent) in (".", READY_FOLDER):
        near = did_you_mean(path.stem, ready_names())
        hint = f"{near} The ready ones are {', '.join(ready_names())}, and auto plans.".lstrip()
    return "does not exist", hint


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
    fields: Mapping[str, FieldInfo],
    argv: Sequence[str] | None,
    problems: list[str],
    program: str,
    notes: list[str],
) -> dict[str, Any]:
    """Return the options given, by field; `none` and `auto` are None where a field may be None.

    An argument that is not an option is a problem, and so is an option without its value. `--help` exits with 0.
    """
    line = CommandLine(_build_parser(fields, program), "train", unknown_option)
    line.read(sys.argv[1:] if argv is None else argv)
    problems += line.problems
    notes += line.notes
    given = {key: value for key, value in line.given.items() if key in fields or key == BATCH_OF_ALL}
    for key in ("batch", BATCH_OF_ALL):
        if str(given.get(key)).lower() == AUTO:
            given[key] = str(PLANNED)
    for key, value in given.items():
        optional = key in fields and type(None) in get_args(fields[key].annotation)
        if optional and value.lower() in ("none", "auto"):
            given[key] = None
    return given


def _read_batch(given: dict[str, Any], ranks: int, problems: list[str], notes: list[str]) -> None:
    """Turn YOLOv5's --batch-size and a --global_batch without a number into `batch` and `global_batch`."""
    of_all = given.pop(BATCH_OF_ALL, None)
    if of_all is not None and "batch" in given:
        problems.append("--batch-size: given, and so is --batch. Leave one out.")
    elif of_all is not None:
        given["batch"] = of_all
        if of_all.lstrip("-").isdecimal() and given.get("global_batch") != "batch":
            try:
                given["batch"] = per_rank(int(of_all), ranks)
            except ValueError as error:
                problems.append(f"--batch-size: {error}")
                del given["batch"]
            else:
                if ranks > 1 and int(of_all) > 0:
                    notes.append(
                        f"--batch-size {of_all}: of all GPUs, as in YOLOv5: --batch {given['batch']} on each of {ranks}"
                    )
    if given.get("global_batch") == "batch":
        del given["global_batch"]
        if "batch" in given:
            given["global_batch"] = given.pop("batch")
        else:
            problems.append("--global_batch: no number given, and no --batch. Give one: --global_batch 64.")


def _build_parser(fields: Mapping[str, FieldInfo], program: str) -> argparse.ArgumentParser:
    parser = CommandParser(
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
    parser.add_argument(f"--{BATCH_OF_ALL}", help=argparse.SUPPRESS)
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
