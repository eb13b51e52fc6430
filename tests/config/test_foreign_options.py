"""Options of YOLOv5's and Ultralytics' commands: every name is taken, or answered with something that exists."""

from __future__ import annotations

import argparse
import contextlib
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

from dsyolo import cli
from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import read_command_line
from dsyolo.config.command_parser import canonical
from dsyolo.config.deepspeed.schema import TOP_LEVEL
from dsyolo.config.recipe import RECIPE_KEYS
from dsyolo.config.run_config import RUN_KEYS

ROWS = [
    tuple(line.split("\t"))
    for line in Path(__file__).with_name("foreign_flags.tsv").read_text(encoding="utf-8").splitlines()[1:]
]
OPTION = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
OURS = ("train", "val", "detect")
# Values that people give, where "7" is not one.
VALUES = {
    **{"data": "data.yaml", "weights": "yolov5s.pt", "cfg": "yolov5s.yaml", "hyp": "hyp.scratch-med.yaml"},
    **{
        "device": "0",
        "model": "yolov5s.pt",
        "source": "photos",
        "project": "p",
        "name": "n",
        "task": "segment",
    },
    **{
        "optimizer": "AdamW",
        "cache": "disk",
        "mode": "export",
        "imgsz": "640",
        "img": "640",
        "img_size": "640",
    },
    **{
        "seed": "1",
        "workers": "2",
        "lrf": "0.1",
        "label_smoothing": "0.1",
        "warmup_momentum": "0.8",
        "iou": "0.5",
    },
    **{"conf": "0.3", "conf_thres": "0.3", "iou_thres": "0.5", "pretrained": "True", "split": "test"},
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("data.yaml").write_text("names: [a]\n", encoding="utf-8")
    return ["--data", "data.yaml"]


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=command)
    import_module(cli.COMMANDS[command][0]).add_options(parser)
    return parser


def own_keys(command: str) -> set[str]:
    if command == "train":
        return set(RUN_KEYS | RECIPE_KEYS) | {"local_rank", "batch_size"}
    return {canonical(name) for action in parser_of(command)._actions for name in action.option_strings}


def json_keys(block: Any = None) -> set[str]:
    keys = TOP_LEVEL if block is None else getattr(block, "keys", {})
    return {name for key, part in keys.items() for name in (key, *json_keys(part))}


def names_something(answer: str) -> bool:
    """Return whether an answer names an option, a file, a key of the JSON or a command, and all of these exist."""
    known = set().union(*map(own_keys, OURS)) | {"include"}  # --include is the deepspeed launcher's
    answer = answer.partition(": ")[2]  # after the option that was given
    options = {canonical(name) for name in OPTION.findall(answer)}
    files = re.findall(r"\b(?:docs|ds_configs|dsyolo)/[\w.]+\.\w+", answer)
    keys = {key.split(".")[0] for key in re.findall(r"Set ([a-z][\w.]+)", answer)}
    commands = set(re.findall(r"dsyolo (\w+)", answer)) - {"train"}
    assert options <= known, answer
    assert keys <= {*TOP_LEVEL, "optimizer"}, answer
    assert commands <= cli.COMMANDS.keys(), answer
    assert all((ROOT / name).exists() for name in files), answer
    return bool(options or files or keys or commands or "dsyolo train" in answer)


def read(command: str, words: list[str]) -> list[str]:
    """Return the problems of a command line that has all that the command needs, and these words."""
    if command == "train":
        given = [] if any(word.startswith(("data=", "--data")) for word in words) else ["--data", "data.yaml"]
        with contextlib.suppress(UserError):
            read_command_line([*given, *words])
            return []
        with pytest.raises(UserError) as caught:
            read_command_line([*given, *words])
        return list(caught.value.problems)
    if command == "export":
        with pytest.raises(UserError) as caught:
            cli.parse(["export", *words])
        return list(caught.value.problems)
    needed = (
        {"--weights": "w.safetensors", "--data": "data.yaml"}
        if command == "val"
        else {"--weights": "w.safetensors"}
    )
    start = [part for option, value in needed.items() if option not in words for part in (option, value)]
    try:
        cli.parse([command, *(["image.jpg"] if command == "detect" else []), *start, *words])
    except UserError as error:
        return list(error.problems)
    return []


def test_the_list_is_whole() -> None:
    assert len(ROWS) == len(set(ROWS)) == 240
    assert {where for _, where, _ in ROWS} == {*OURS, "export", "any"}


@pytest.mark.parametrize("command", [*OURS, "export"])
def test_every_name_is_taken_or_answered_by_what_exists(command: str, base: list[str]) -> None:
    """Each name is brought to each command, with values that people give: no guess, and no unknown option."""
    faults = []
    for program, _, name in ROWS:
        key = canonical(name)
        value = VALUES.get(key, "7")
        forms = [[f"{name}={value}"], [f"{name}=True"]]
        if program == "yolov5":
            forms = [[name], [name, value], [f"{name}={value}"]]
        for words in forms:
            problems = read(command, words)
            faults += [
                f"{command} {' '.join(words)}: {problem}"
                for problem in problems
                if "Did you mean" in problem
                or "unknown option" in problem
                or not (is_plain(problem) or names_something(problem))
            ]
    assert not faults, "\n".join(faults)


def is_plain(problem: str) -> bool:
    """Return whether a line is about a value of an option of ours, or about a value that a form lacks or has too much."""
    return bool(
        re.search(
            r"expected one argument|: not an option|given, but it must be|does not exist|is a flag", problem
        )
    )
