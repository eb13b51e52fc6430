"""Commands of YOLOv5's and Ultralytics' programs that are none of dsyolo's, or have another name here."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.config.command_parser import canonical
from dsyolo.config.foreign_tables import foreign_option, training_option
from dsyolo.config.foreign_values import NO_EXPORT, PAGE

TASKS = ("detect", "segment", "classify", "pose", "obb")
_OF_A_MODE = re.compile(r"(--)?(data|epochs)(=.*)?|model=.*", re.DOTALL)  # dsyolo detect has --model too
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
    """Return the words without the task of Ultralytics' command line: `detect train data=a.yaml` is `train data=a.yaml`.

    Its mode `predict` is `detect`. A file of that name is a source, and stays, unless options of that mode follow: the
    current folder of a data set has a `train` of its own.
    """
    arguments = list(argv)
    if arguments[:1] and arguments[0].startswith("--local_rank="):  # where `deepspeed --no_python` puts it
        arguments = arguments[1:]
    is_mode = any(_OF_A_MODE.fullmatch(word) for word in arguments[2:])
    if arguments[:1] == ["detect"] and len(arguments) > 1 and (is_mode or not Path(arguments[1]).exists()):
        mode = MODES.get(arguments[1], arguments[1])
        if arguments[1] in MODES or (mode in commands and mode in ("train", "val")):
            return [mode, *arguments[2:]]
        if mode == "export":
            return arguments[1:]
    return arguments


def answer_command(argv: Sequence[str], commands: Iterable[str]) -> None:
    """Raise UserError with the answer for a command of other programs, and for each of its options."""
    if not argv or argv[0] in commands or argv[0].removesuffix(".py") not in _ANSWERS:
        return
    name = argv[0].removesuffix(".py")
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
