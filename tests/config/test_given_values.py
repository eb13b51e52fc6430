"""Two options for one thing: another value is a problem that names both, and a restart's own options replace the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsyolo import cli
from dsyolo.base.environment import RESTARTED
from dsyolo.base.errors import UserError
from dsyolo.config.cli_args import parse


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
        ("max_det=100 --max-det 30", "--max-det 30", "max_det=100"),
        ("--data other.yaml", "--data other.yaml", "--data data.yaml"),
        ("--weights none --weights yolov5s.safetensors", "--weights yolov5s.safetensors", "--weights none"),
        ("--ema --no-ema", "--no-ema", "--ema"),
        ("--noval --val_every 2", "--val_every 2", "--noval"),
        ("cache=True cache=False", "cache=False", "cache=True"),
        ("amp=True amp=False", "amp=False", "amp=True"),
        ("--batch-size 8 batch=16", "batch=16", "--batch-size 8"),
        ("--cfg yolov5s.yaml --model yolov5m", "--model yolov5m", "--cfg yolov5s.yaml"),
        ("--hyp hyp.scratch-high.yaml --hyp low", "--hyp low", "--hyp hyp.scratch-high.yaml"),
        ("epochs=3 --epochs 4", "--epochs 4", "epochs=3"),
        ("--mosaic .5 --mosaic 0.25", "--mosaic 0.25", "--mosaic .5"),
        ("--device cpu device=auto", "device=auto", "--device cpu"),
    ],
)
def test_another_value_is_a_problem(base: list[str], argv: str, later: str, earlier: str) -> None:
    assert f"{later}: given, and so is {earlier}. Leave one out." in problems_of([*base, *argv.split()])


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
    # What the user wrote twice before it is still a mistake.
    assert problems_of([*argv, "--val_batch_size", "32", *again]) == [
        "--val_batch_size 32: given, and so is --val_batch_size 16. Leave one out."
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
        "--weights b: given, and so is --weights a. Leave one out.",
        "--score_threshold 0.2: given, and so is --conf 0.1. Leave one out.",
    ]
