"""Two options for one thing with two values are a problem; of one option given twice the last words hold, with a note."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsyolo import cli
from dsyolo.base.environment import RESTARTED
from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import parse, read_command_line


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name in ("data.yaml", "other.yaml"):
        Path(name).write_text("names: [a]\n", encoding="utf-8")
    return ["--data", "data.yaml"]


def problems_of(argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(argv)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("argv", "later", "earlier"),
    [
        ("--deepspeed_config zero2 amp=False", "amp=False", "--deepspeed_config zero2"),
        ("--save-period 5 --nosave", "--nosave", "--save-period 5"),
        ("--nosave --save-every=5", "--save-every=5", "--nosave"),
        ("--cos-lr --schedule linear", "--schedule linear", "--cos-lr"),
        ("--img 640 --imgsz 320", "--imgsz 320", "--img 640"),
        ("--img 640 imgsz=320", "imgsz=320", "--img 640"),
        ("--noval --val_every 2", "--val_every 2", "--noval"),
        ("--batch-size 8 batch=16", "batch=16", "--batch-size 8"),
        ("--cfg yolov5s.yaml --model yolov5m", "--model yolov5m", "--cfg yolov5s.yaml"),
    ],
)
def test_another_value_is_a_problem(base: list[str], argv: str, later: str, earlier: str) -> None:
    assert f"{later}: given, and so is {earlier}. Leave one out." in problems_of([*base, *argv.split()])


@pytest.mark.parametrize(
    ("argv", "name", "value", "note"),
    [
        ("--data other.yaml", "data", "other.yaml", "--data data.yaml: replaced by --data other.yaml"),
        ("--resume auto --resume never", "resume", "never", "--resume auto: replaced by --resume never"),
        ("--ema --no-ema", "ema", False, "--ema: replaced by --no-ema"),
        ("--no-ema --ema", "ema", True, "--no-ema: replaced by --ema"),
        ("--mosaic .5 --mosaic 0.25", "mosaic", 0.25, "--mosaic .5: replaced by --mosaic 0.25"),
        ("imgsz=320 imgsz=640", "imgsz", 640, "imgsz=320: replaced by imgsz=640"),
        ("--img 640 --img 320", "imgsz", 320, "--img 640: replaced by --img 320"),
        ("epochs=3 --epochs 4", "epochs", 4, "epochs=3: replaced by --epochs 4"),
        ("cache=True cache=False", "cache", "none", "cache=True: replaced by cache=False"),
        ("cache=False cache=True", "cache", "ram", "cache=False: replaced by cache=True"),
        ("cos_lr=True cos_lr=False", "schedule", "linear", "cos_lr=True: replaced by cos_lr=False"),
        ("cos_lr=False cos_lr=True", "schedule", "cosine", "cos_lr=False: replaced by cos_lr=True"),
        ("amp=False amp=True", "deepspeed_config", "auto", "amp=False: replaced by amp=True"),
        ("--noval --noval=false", "val_every", 1, "--noval: replaced by --noval=false"),
    ],
)
def test_the_last_words_of_one_option_hold(
    base: list[str], argv: str, name: str, value: object, note: str
) -> None:
    notes: list[str] = []
    run, _ = read_command_line([*base, *argv.split()], "train.py", ranks=1, notes=notes)
    assert {**dict(run), **dict(run.recipe)}[name] == value
    assert f"{note}, which comes later" in notes


def test_sources_that_are_given_by_name_are_replaced_too(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli.parse(["detect", "--weights", "w", "c", "source=a", "--source", "b"])
    assert [str(one) for one in args.sources] == ["c", "b"]
    assert "source=a: replaced by --source b" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        "--data data.yaml data=data.yaml",
        "--img 320 --imgsz 320 imgsz=320",
        "--cos-lr cos_lr=True --schedule cosine",
        "--mosaic .5 mosaic=0.50",
        "--noval --noval val=True",
        "--cache cache=True --cache ram",
        "--multi-scale multi_scale=True",
    ],
)
def test_the_same_value_twice_is_none(base: list[str], argv: str) -> None:
    parse([*base, *argv.split()])


def test_a_restart_replaces_what_was_given(base: list[str]) -> None:
    again = [RESTARTED, "--val_batch_size", "8", "--resume", "auto"]
    argv = [*base, "--val_batch_size", "16", "--resume", "never"]
    run = parse([*argv, *again, RESTARTED, "--val_batch_size", "4", "--resume", "auto"])
    assert (run.val_batch_size, run.resume, run.data) == (4, "auto", "data.yaml")
    # What the user contradicted before it is still a mistake.
    assert problems_of([*argv, "--img", "64", "--imgsz", "32", *again]) == [
        "--imgsz 32: given, and so is --img 64. Leave one out."
    ]


def test_other_commands_too() -> None:
    argv = [
        "val",
        "--weights",
        "a",
        "--weights",
        "b",
        "--data",
        "d",
        "--conf",
        "0.1",
        "--score_threshold",
        "0.2",
    ]
    with pytest.raises(UserError) as caught:
        cli.parse(argv)
    assert list(caught.value.problems) == [
        "--score_threshold 0.2: given, and so is --conf 0.1. Leave one out.",
    ]
