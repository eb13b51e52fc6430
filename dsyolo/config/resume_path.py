"""`--resume PATH`, as YOLOv5 has it: finds the run that a path belongs to."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsyolo.base.safe_io import shortened
from dsyolo.config.messages import choices_of, did_you_mean
from dsyolo.config.resume import config_path
from dsyolo.config.run_config import RunConfig

WORDS = {"true": "always", "yes": "always", "1": "always", "false": "never", "no": "never", "0": "never"}
MOST_RUNS = 5  # that a message lists
LEVELS = 3  # from RUN/checkpoints/step_00000009/progress.json up to RUN
_STEP = re.compile(r"step_\d+(\.\d+)?")


def settle_resume(given: dict[str, Any], problems: list[str]) -> bool:
    """Replace a path in `given["resume"]` by `always` and the run's `project` and `name`; return whether that is possible."""
    text = given.get("resume")
    if text is None or text in choices_of(RunConfig.model_fields["resume"]):
        return True
    if text.lower() in WORDS and not Path(text).exists():
        given["resume"] = WORDS[text.lower()]
        return True
    found = _find_run(text)
    if isinstance(found, str):
        problems.append(f"--resume: {shortened(text)} {found}")
        given["resume"] = "never"
        return False
    problems += _other_folder(text, found, given)
    given |= {"resume": "always", "project": str(found.parent), "name": found.name}
    return True


def _find_run(text: str) -> Path | str:
    """Return the folder of the run that a path names, or the rest of a problem's line."""
    if not text.strip():
        return "is empty. Give the path of a run, as runs/train, or leave --resume out to start a new one."
    path = Path(text)
    try:
        if path.suffix == ".pt" and not path.exists():  # YOLOv5's name for the same file
            path = path.with_suffix(".safetensors")
        if not path.exists():
            rule = "never, always, auto, or the path of a run, as runs/train"
            hint = did_you_mean(text, choices_of(RunConfig.model_fields["resume"]))
            return f"does not exist, and it must be {rule}. {hint or 'Give a path that is there.'}"
    except (OSError, ValueError) as error:  # a name longer than the system takes, or with a zero byte
        return f"cannot be looked up ({getattr(error, 'strerror', None) or error}). Give the path of a run's folder."
    if path.suffix == ".pt":
        rule = "is a file of PyTorch, and dsyolo resumes only its own runs"
        return f"{rule}. Convert its weights to safetensors, and start from them: --weights FILE.safetensors."
    folder = path
    for _ in range(LEVELS + 1):
        if config_path(folder).is_file() and _is_part(path, folder):
            folder = folder if folder.name not in ("", "..") else folder.resolve()
            return _newest_only(path, folder) or folder
        folder = folder.parent if folder.name else folder.resolve().parent
    if inside := _runs_in(path):
        return f"is no run, but holds {', '.join(inside)}. Give one of them, the newest first: --resume {inside[0]}."
    rule = "belongs to no run: there is no config.yaml in it or in the folders above"
    return f"{rule}. Give the folder that --project and --name made, as runs/train."


def _is_part(path: Path, folder: Path) -> bool:
    """Return whether a path is a run's folder or one of its files: else the config.yaml is somebody else's."""
    parts = Path(os.path.relpath(path, folder)).parts
    return not parts or parts[0] in ("weights", "checkpoints", "logs") or (len(parts) == 1 and path.is_file())


def _runs_in(folder: Path) -> list[str]:
    """Return the newest runs in a folder of runs, the newest first."""
    if not folder.is_dir():
        return []
    try:
        configs = sorted(folder.glob("*/config.yaml"), key=lambda one: one.stat().st_mtime, reverse=True)
    except OSError:
        return []
    return [str(one.parent) for one in configs[:MOST_RUNS]]


def _newest_only(path: Path, folder: Path) -> str:
    """Return a problem where a path names what a run does not go on from; empty for all else."""
    start_anew = f"start a new run from it: --weights {path}"
    if path.suffix == ".safetensors" and path.parent.name == "weights" and path.stem != "last":
        rule = f"holds weights alone, and a run goes on from its newest checkpoint: --resume {folder}"
        return f"{rule}. Or {start_anew}."
    step = next((part for part in (path, *path.parents) if _STEP.fullmatch(part.name)), None)
    newer = [] if step is None else [one.name for one in step.parent.glob("step_*") if one.name > step.name]
    if step is None or not newer:
        return ""
    rule = f"is not the newest checkpoint, which is {max(newer)}, and a run goes on from that"
    return f"{rule}. Give --resume {folder}, or move the newer ones out of {step.parent} first."


def _other_folder(text: str, found: Path, given: Mapping[str, Any]) -> list[str]:
    """Return a problem where --project or --name contradict the path."""
    own = {"project": str(found.parent), "name": found.name}
    return [
        f"--{key}: {given[key]} given, but --resume {text} is the run {found}. Leave --{key} out."
        for key, value in own.items()
        if key in given and Path(given[key]).resolve() != Path(value).resolve()
    ]
