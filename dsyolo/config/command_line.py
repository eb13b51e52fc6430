"""The command line of a run: its options, the recipe's file, and the files that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.base.user_code import is_reference
from dsyolo.config.cli_args import read_options
from dsyolo.config.messages import did_you_mean, validate
from dsyolo.config.run_config import (
    AUTO,
    PRESETS,
    RECIPE_KEYS,
    RUN_KEYS,
    Recipe,
    RunConfig,
    has_checkpoint,
    preset,
    read_yaml,
    unknown_in_recipe,
    unknown_option,
)


def parse(argv: Sequence[str] | None = None) -> RunConfig:
    """The run configuration of a command line (None: of this process).

    Order of precedence: an option, then the recipe file or preset of `--hyp`, then, under `--resume`, the
    `config.yaml` of the run that goes on, then the defaults.

    Raises:
        UserError: unknown options, values out of range, missing files: all of them at once.
    """
    problems: list[str] = []
    fields = {key: RunConfig.model_fields[key] for key in RunConfig.model_fields if key in RUN_KEYS}
    given = read_options({**fields, **Recipe.model_fields}, argv, unknown_option, problems)
    resumes = _resumes(given)
    base = _resumed(given, problems) if resumes else {}
    recipe_base = base.pop("recipe", None)
    recipe_given = {key: given.pop(key) for key in list(given) if key in RECIPE_KEYS}
    values = {**base, **given}
    if recipe_base is None or "hyp" in given:
        recipe_base = _read_recipe(str(values.get("hyp", "low")), problems)
    recipe = validate(Recipe, {**recipe_base, **recipe_given}, "--", unknown_option, problems)
    if "data" not in values and not resumes:
        problems.append("--data: missing. Name the data set's YAML file, as in --data data.yaml.")
    problems += _missing_files(values, resumes)
    if is_reference(str(base.get("model", ""))) and "model" not in given:
        # A run's folder may be somebody else's: what it names is not run unless the command line names it.
        rule = f"missing, and the run to go on with trains {base['model']}, whose code only the command line may name"
        problems.append(f"--model: {rule}. Add --model {base['model']}.")
    values = {"data": "", **values, "recipe": recipe or Recipe()}  # whole, so that the rest is checked too
    run = validate(RunConfig, values, "--", unknown_option, problems)
    if problems or run is None:
        raise UserError("The command line cannot be used", problems)
    return run


def _folder(given: Mapping[str, Any]) -> Path:
    fields = RunConfig.model_fields
    return Path(*(given.get(key, fields[key].default) for key in ("project", "name")))


def _resumes(given: Mapping[str, Any]) -> bool:
    resume = given.get("resume")
    return resume == "always" or (resume == "auto" and has_checkpoint(_folder(given)))


def _resumed(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    path = _folder(given) / "config.yaml"
    if not path.is_file():
        rule = f"{path} does not exist, so there is no run to go on with"
        problems.append(f"--resume: {rule}. Check --project and --name, or leave --resume out.")
        return {}
    return RunConfig.load(path).dump()


def _missing_files(values: Mapping[str, Any], resumes: bool) -> list[str]:
    """Of the three files that a run reads, those that are not there. A resumed run needs no weights."""
    fields = RunConfig.model_fields
    problems = []
    for key in ("deepspeed_config", "data", "weights"):
        value = values.get(key, fields[key].default)
        needed = isinstance(value, str) and not (key == "weights" and resumes)
        needed = needed and (key, value) != ("deepspeed_config", AUTO)
        if not needed or Path(value).is_file():
            continue
        what, hint = _missing_file(Path(value), key)
        seen = "" if Path(value).is_absolute() or Path(value).exists() else f", seen from {Path.cwd()}"
        hint = hint or f"Give the path of a file{seen}: {fields[key].description}."
        problems.append(f"--{key}: {value} {what}. {hint}")
    return problems


def _missing_file(path: Path, key: str) -> tuple[str, str]:
    """What is wrong with the path given for `key`, and the question for the file that was likely meant."""
    suffixes = {"deepspeed_config": (".json",), "weights": (".safetensors",)}.get(key, (".yaml", ".yml"))
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if one.suffix in suffixes)
        return "is a folder, but it must be a file", f"Did you mean {inside[0]}?" if inside else ""
    if path.exists():
        return "is a device or pipe, but it must be a file", ""
    beside = [one.name for one in path.parent.iterdir() if one.is_file()] if path.parent.is_dir() else []
    return "does not exist", did_you_mean(path.name, beside)


def _read_recipe(hyp: str, problems: list[str]) -> dict[str, Any]:
    """Values of a preset, or of a YAML file on top of preset low. A key that it may not have is a problem."""
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
