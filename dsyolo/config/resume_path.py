"""`--resume PATH`, as YOLOv5 has it: finds the run that a path belongs to."""

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dsyolo.base.resume_words import WORDS
from dsyolo.base.safe_io import shortened
from dsyolo.config.messages import choices_of, did_you_mean
from dsyolo.config.resume import config_path
from dsyolo.config.run_config import RunConfig

LEVELS = 3  # from RUN/checkpoints/step_00000009/progress.json up to RUN
PARTS = ("weights", "checkpoints", "logs")  # folders of a run
MOST_NAMED = 5
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
        shown = shortened(text) or "''"
        problems.append(f"--resume: {shown} {found}")
        given["resume"] = "never"
        return False
    problems += _other_folder(text, found, given)
    given |= {"resume": "always", "project": str(found.parent), "name": found.name}
    return True


def _find_run(text: str) -> Path | str:
    """Return the folder of the run that a path names, or the rest of a problem's line."""
    if not text.strip():
        rule = "given, but it must be never, always, auto, or the path of a run, as runs/train"
        return f"{rule}. Leave it out, or check the shell's variable that is empty."
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
        return f"{rule}. Start another one from its weights: --weights {text}."
    if folder := _run_of(path):
        return _newest_only(path, folder) or folder
    rule = "belongs to no run: there is no config.yaml in it, and it is no part of a folder that has one"
    runs = (one.parent for one in sorted(path.glob("*/config.yaml")) if _has_parts(one.parent))
    inside = list(islice(runs, MOST_NAMED))
    named = f"Give one of the runs in it: --resume {', or '.join(map(str, inside))}."
    return f"{rule}. {named if inside else 'Give the folder that --project and --name made, as runs/train.'}"


def _has_parts(folder: Path) -> bool:
    """Return whether a folder with a config.yaml looks like a run's, and not like another program's."""
    return any((folder / part).is_dir() for part in PARTS)


def _run_of(path: Path) -> Path | None:
    """Return the folder of the run that a path is, or is a part of: its weights, checkpoints, logs, or a file of these."""
    folder = path
    for _ in range(LEVELS + 1):
        if config_path(folder).is_file() and (
            not path.is_file() or path.name == "config.yaml" or _has_parts(folder)
        ):
            return folder if folder.name not in ("", "..") else folder.resolve()
        name = folder.resolve().name  # of the current folder too
        if not (folder.is_file() or name in PARTS or _STEP.fullmatch(name)):
            break
        folder = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    return None


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
