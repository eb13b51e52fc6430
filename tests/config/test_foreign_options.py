"""Options of YOLOv5's and Ultralytics' commands: every name is taken, or answered with something that exists."""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

from dsyolo import cli
from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import read_command_line, wants_cpu
from dsyolo.config.command_parser import canonical
from dsyolo.config.deepspeed.schema import TOP_LEVEL
from dsyolo.config.foreign_commands import without_task
from dsyolo.config.foreign_options import Taken
from dsyolo.config.foreign_tables import foreign_option
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
        try:
            read_command_line([*given, *words])
        except UserError as error:
            return list(error.problems)
        return []
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


def problems_of(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_command_line(argv)
    return list(caught.value.problems)


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


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--img", "320"], {"imgsz": 320}),
        (["--img-size", "320"], {"imgsz": 320}),
        (["imgsz=320", "epochs=50"], {"imgsz": 320, "epochs": 50}),
        (["--cfg", "models/yolov5s.yaml", "--weights", ""], {"model": "yolov5s", "weights": None}),
        (["model=yolov5m6.yaml"], {"model": "yolov5m6"}),
        (["--cos-lr"], {"schedule": "cosine"}),
        (["cos_lr=True"], {"schedule": "cosine"}),
        (["cos_lr=False"], {"schedule": "linear"}),
        (["--hyp", "data/hyps/hyp.scratch-high.yaml"], {"copy_paste": 0.1, "mixup": 0.1}),
        (["--cache"], {"cache": "ram"}),
        (["--cache", "--noval"], {"cache": "ram", "val_every": 1000000}),
        (["cache=True", "cache=False"], {"cache": "none"}),
        (["--nosave", "--sync-bn"], {"save_every": 1000000, "sync_batchnorm": True}),
        (["--save-period", "5"], {"save_every": 5}),
        (["--save-period", "-1"], {"save_every": 1}),
        (["--exist-ok", "--device", "cpu"], {"exist_ok": True, "device": "cpu"}),
        (["exist_ok=True", "multi_scale=True"], {"exist_ok": True, "multi_scale": True}),
        (["--multi-scale=false", "ema=False"], {"multi_scale": False, "ema": False}),
        (["--noautoanchor", "verbose=True", "task=detect", "mode=train", "--freeze", "0"], {"epochs": 300}),
        (["val=False", "conf=0.3", "iou=0.5", "max_det=100"], {"val_every": 1000000, "score_threshold": 0.3}),
        (["amp=False"], {"deepspeed_config": "fp32"}),
        (["--label-smoothing", "0.1", "--patience", "0"], {"label_smoothing": 0.1, "patience": 0}),
        (["pretrained=False"], {"weights": None}),
    ],
)
def test_what_an_alias_sets(base: list[str], argv: list[str], expected: dict[str, Any]) -> None:
    run, _ = read_command_line([*base, *argv])
    values = {**run.model_dump(), **run.recipe.model_dump()}
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (
            ["--rect"],
            "--rect: training images are square mosaics; validation is rectangular already: --rect_val.",
        ),
        (["--optimizer", "AdamW"], 'Set optimizer.type to "AdamW" there. Or give --deepspeed_config adamw.'),
        (["lr0=0.02"], "lr0=0.02: the DeepSpeed JSON owns it. Set optimizer.params.lr to 0.02 there."),
        (
            ["--device", "0,1"],
            "the launcher chooses GPUs: deepspeed --include localhost:0,1 dsyolo/train.py.",
        ),
        (["--device", "cuda:0"], "CUDA_VISIBLE_DEVICES=0 in front of the command"),
        (["box=7.5"], "Ultralytics' gains are for another loss. YOLOv5's is --box 0.05"),
        (["nbs=64"], "the images of a step are --global_batch 64"),
        (
            ["--weights", "yolov5s.pt"],
            "does not exist. Nothing is downloaded: get yolov5s.pt from github.com/ultralytics/",
        ),
        (
            ["model=yolov5s.pt"],
            "--model yolov5s trains from scratch, and --weights FILE.safetensors starts from weights.",
        ),
        (["model=yolov8n.pt"], "only YOLOv5's networks are here: --model yolov5n"),
        (
            ["--hyp", "hyp.VOC.yaml"],
            "hyp.VOC.yaml does not exist; the presets are --hyp low, --hyp med and --hyp high.",
        ),
        (["--cache", "disk"], "disk given, but it must be ram or none. On disk nothing is kept: --cache ram"),
        (["--entity", "us"], "set WANDB_ENTITY=us in the environment, and --wandb online."),
        (["--evolve", "300"], "recipes are not evolved: --hyp FILE.yaml"),
        (["--freeze", "0", "1", "2"], "no layer is frozen"),
        (["--source", "a.jpg"], "dsyolo detect --weights FILE a.jpg."),
    ],
)
def test_what_is_answered(base: list[str], argv: list[str], answer: str) -> None:
    (line,) = problems_of([*base, *argv])
    assert answer in line


def test_all_mistakes_are_reported_together(base: list[str]) -> None:
    argv = [
        *base,
        "--rect",
        "--epochs",
        "0",
        "--cache",
        "--quad",
        "--freeze",
        "10",
        "--mosaik",
        "1",
        "lr0=1",
        "--name",
    ]
    (line,) = problems_of([*base, "epoch=3"])
    assert line == "--epoch: unknown option. Did you mean --epochs?"
    assert [line.partition(":")[0] for line in problems_of(argv)] == [
        *("--rect", "--quad", "--freeze", "--mosaik", "lr0=1", "--name", "--epochs")
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--device", "cpu"], True),
        (["--device=cpu", "--data", "x"], True),
        (["device=cpu"], True),
        (["--device", "cpu", "--device", "auto"], False),
        (["--name", "cpu"], False),
        ([], False),
    ],
)
def test_the_cpu_is_chosen_before_anything_asks_for_a_device(argv: list[str], expected: bool) -> None:
    assert wants_cpu(argv) is expected


def test_options_of_val_and_detect() -> None:
    val = [
        "val",
        "--weights",
        "w",
        "--data",
        "d",
        "--conf-thres",
        "0.2",
        "--iou",
        "0.5",
        "--img",
        "320",
        "--batch-size",
        "4",
    ]
    args = cli.parse([*val, "--device", "cpu", "rect=False", "--verbose"])
    assert (args.score_threshold, args.iou_threshold, args.imgsz, args.batch_size) == (0.2, 0.5, 320, 4)
    assert (args.device, args.rect_val) == ("cpu", False)
    args = cli.parse(["detect", "model=w.safetensors", "--source", "a.jpg", "--max-det", "7", "--exist-ok"])
    assert (args.weights, args.sources, args.max_detections) == (Path("w.safetensors"), [Path("a.jpg")], 7)
    with pytest.raises(UserError) as caught:
        cli.parse(["detect", "--weights", "yolov5s.pt", "--save-txt", "--project", "runs/x", "--epochs", "3"])
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        *("--weights", "--save-txt", "--project", "--epochs", "SOURCE")
    ]


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["export", "--include", "onnx"], "export: there is no export"),
        (["predict", "model=x.pt"], "predict: the command is dsyolo detect"),
        (["detect", "export", "format=onnx"], "export: there is no export"),
    ],
)
def test_commands_of_other_programs(argv: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["detect", "train", "data=data.yaml", "epochs=3"], ["train", "data=data.yaml", "epochs=3"]),
        (["detect", "train", "--data", "data.yaml"], ["train", "--data", "data.yaml"]),
        (["detect", "train", "model=yolov8s.pt"], ["train", "model=yolov8s.pt"]),
        (["detect", "val", "--data=data.yaml"], ["val", "--data=data.yaml"]),
        (["detect", "train", "--weights", "x"], ["detect", "train", "--weights", "x"]),
        (["detect", "train", "--model", "a.py:f"], ["detect", "train", "--model", "a.py:f"]),
        (["detect", "train"], ["detect", "train"]),
    ],
)
def test_a_mode_is_known_by_its_options_in_a_folder_that_has_a_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], found: list[str]
) -> None:
    """As in an export of Roboflow."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "val"):
        Path(name).mkdir()
    assert without_task(arguments, cli.COMMANDS) == found


@pytest.mark.parametrize(
    ("command", "value", "problem"),
    [
        ("val", "val", ""),
        ("val", "detect", ""),
        ("train", "detect", ""),
        ("detect", "detect", ""),
        ("val", "train", "train given, but the `val:` of --data is validated: name those images there."),
        ("val", "test", "test given, but the `val:` of --data is validated: name those images there."),
        (
            "val",
            "segment",
            "segment given, but detection is the task of dsyolo train, dsyolo val and dsyolo detect. Leave it out.",
        ),
        (
            "train",
            "val",
            "val given, but detection is the task of dsyolo train, dsyolo val and dsyolo detect. Leave it out.",
        ),
        (
            "detect",
            "train",
            "train given, but detection is the task of dsyolo train, dsyolo val and dsyolo detect. Leave it out.",
        ),
    ],
)
def test_a_task_is_a_split_for_val_alone(command: str, value: str, problem: str) -> None:
    found = foreign_option(command, "task")
    assert found is not None
    outcome = found.outcome(value)
    assert outcome == (problem or Taken())


def test_a_task_in_front_of_the_command_is_dropped() -> None:
    assert without_task(["detect", "train", "data=x"], cli.COMMANDS) == ["train", "data=x"]
    assert without_task(["detect", "predict", "a.jpg"], cli.COMMANDS) == ["detect", "a.jpg"]
    assert without_task(["--local_rank=1", "train", "x"], cli.COMMANDS) == ["train", "x"]
    assert without_task(["detect", "--weights", "x"], cli.COMMANDS) == ["detect", "--weights", "x"]


def test_the_page_names_them_all() -> None:
    page = (ROOT / "docs/from_yolov5.md").read_text(encoding="utf-8")
    spans = {
        canonical(part.partition("=")[0])
        for span in re.findall(r"`([^`\n]+)`", page)
        for part in span.split()
    }
    assert not {canonical(name) for _, _, name in ROWS} - spans
