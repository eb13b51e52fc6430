"""Commands of YOLOv5's and Ultralytics' programs that are none of dsyolo's, or have another name here."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import shortened
from dsyolo.config.command_parser import canonical
from dsyolo.config.foreign_tables import foreign_option, training_option
from dsyolo.config.foreign_values import NO_EXPORT, PAGE
from dsyolo.config.messages import did_you_mean

TASKS = ("detect", "segment", "classify", "pose", "obb")
_KEY_VALUE = re.compile(r"[A-Za-z]\w*=.*", re.DOTALL)
_OF_A_MODE = re.compile(
    r"(--)?(data|epochs)\b|model="
)  # no options of `dsyolo detect`, so what stands before is a mode
MODES = {"predict": "detect"}  # Ultralytics' names of commands
_ANSWERS = {
    "export": NO_EXPORT,
    "predict": "the command is dsyolo detect: dsyolo detect --weights FILE IMAGE.",
    "track": f"there is no tracking: dsyolo detect finds the objects of single images. {PAGE}",
    "benchmark": "dsyolo scale measures trainings, and dsyolo plan predicts them.",
    "tune": f"recipes are not searched: --hyp FILE.yaml of dsyolo train, and any value as an option. {PAGE}",
    "checks": "the command is dsyolo doctor.",
    "settings": "there are no settings beside the options: dsyolo train --help.",
    "segment": f"only detectors are trained here: dsyolo train. {PAGE}",
    "classify": f"only detectors are trained here: dsyolo train. {PAGE}",
    "hubconf": f"there is no hub: dsyolo detect --weights FILE. {PAGE}",
}


def without_task(argv: Sequence[str], commands: Iterable[str]) -> list[str]:
    """Return the words of dsyolo's command line: the command first, without the task and mode of Ultralytics' ones.

    `detect train data=a.yaml` and `mode=train data=a.yaml` are `train data=a.yaml`, `train.py` is `train`, and the mode
    `predict` is `detect`. After `detect`, a file called `train` is a source, unless another word is a training's.
    """
    arguments = list(argv)
    if arguments[:1] and arguments[0].startswith("--local_rank="):  # where `deepspeed --no_python` puts it
        arguments = arguments[1:]
    if not arguments:
        return arguments
    if arguments[0] == "help":
        return [*arguments[1:2], "--help"]
    script = Path(arguments[0])
    if script.suffix == ".py" and script.stem in commands and script.parent.name not in TASKS:
        return [script.stem, *arguments[1:]]
    if arguments[0] == "detect" or _KEY_VALUE.fullmatch(arguments[0]):
        mode = next((word.partition("=")[2] for word in arguments if word.startswith("mode=")), None)
        if mode and (mode in MODES or mode in commands or mode in _ANSWERS):
            rest = arguments[1:] if arguments[0] == "detect" else arguments
            return [MODES.get(mode, mode), *(word for word in rest if not word.startswith("mode="))]
    if arguments[0] == "detect" and len(arguments) > 1 and _is_mode(arguments):
        return [MODES.get(arguments[1], arguments[1]), *arguments[2:]]
    return arguments


def _is_mode(arguments: Sequence[str]) -> bool:
    """Return whether the word after the task `detect` is a mode, and no file."""
    if arguments[1] not in ("train", "val", "export", "track", "benchmark", "tune", *MODES):
        return False
    has_key = any(_OF_A_MODE.match(word) for word in arguments[2:])
    return has_key or not Path(arguments[1]).exists()


def answer_command(argv: Sequence[str], commands: Iterable[str]) -> None:
    """Raise UserError with the answer for a command that is not ours, and for each of its options."""
    if not argv or argv[0] in commands or argv[0].startswith("-"):
        return
    name = Path(argv[0]).name.removesuffix(".py")
    if name not in _ANSWERS:
        raise UserError("The command line cannot be used", [_unknown_command(argv[0], tuple(commands))])
    problems = [f"{argv[0]}: {_ANSWERS[name]}"]
    for word in argv[1:]:
        key, is_key = canonical(word.partition("=")[0]), "=" in word and not word.startswith("--")
        is_option = word.startswith("--") or is_key
        found = foreign_option("export", key, is_key=is_key) or training_option("export", key)
        found = found if is_option else None
        outcome = found.outcome(word.partition("=")[2] or None) if found else None
        if isinstance(outcome, str) and outcome != _ANSWERS["export"]:
            problems.append(f"{word}: {outcome}")
    raise UserError("The command line cannot be used", problems)


def _unknown_command(word: str, commands: Sequence[str]) -> str:
    word = shortened(word).removeprefix("mode=")
    if _KEY_VALUE.fullmatch(word):
        return f"{word}: given without a command. Name it first: dsyolo train {word}, or another of {', '.join(commands)}."
    hint = did_you_mean(Path(word).name.removesuffix(".py"), commands)
    return f"{word}: no such command. {hint} The commands are {', '.join(commands)}.".replace("  ", " ")
