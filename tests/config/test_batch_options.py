"""`--batch` and `--global_batch`: what they make of the JSON's own batch sizes, on any ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dsyolo.base.errors import UserError
from dsyolo.config.batch_options import with_batch_options
from dsyolo.config.cli_args import read_command_line
from dsyolo.config.deepspeed.config import check
from dsyolo.config.deepspeed.json_reader import JsonSource, read_source
from dsyolo.config.run_config import RunConfig

TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def given(content: Mapping[str, Any], ranks: int, saved: int | None = None, **options: Any) -> JsonSource:
    run = RunConfig(data="x", **options)
    return with_batch_options(JsonSource("ds.json", content), run, ranks, saved)[0]


def sizes(
    content: Mapping[str, Any], ranks: int, saved: int | None = None, **options: Any
) -> tuple[int, int, int]:
    """Return (micro-batch, accumulation, global batch) of the run."""
    source = given(content, ranks, saved, **options)
    batch = check(source, world_size=ranks, accelerator="cpu", saved_batch=saved).batch
    return batch.micro, batch.accumulation, batch.global_batch


@pytest.mark.parametrize(
    ("content", "ranks", "options", "expected"),
    [
        # a silent JSON: the recipe's 64 images, or the next multiple
        ({}, 1, {"batch": 16}, (16, 4, 64)),
        ({}, 2, {"batch": 16}, (16, 2, 64)),
        ({}, 1, {"batch": 24}, (24, 3, 72)),
        ({}, 1, {"batch": 100}, (100, 1, 100)),
        ({}, 2, {"batch": 8, "global_batch": 128}, (8, 8, 128)),
        # the JSON's global batch stays, and the accumulation follows
        ({TOTAL: 64, MICRO: 8, STEPS: 4}, 2, {"batch": 16}, (16, 2, 64)),
        ({TOTAL: 64, MICRO: 16}, 1, {"batch": 4}, (4, 16, 64)),
        ({TOTAL: 64}, 2, {"batch": 12}, (12, 3, 72)),  # no multiple: the next one
        # without a global batch the JSON's accumulation stays
        ({MICRO: 16}, 2, {"batch": 4}, (4, 1, 8)),
        ({MICRO: 16, STEPS: 3}, 2, {"batch": 4}, (4, 3, 24)),
        ({STEPS: 3}, 1, {"batch": 4}, (4, 3, 12)),
        # of a step
        ({TOTAL: 64, MICRO: 8, STEPS: 4}, 2, {"global_batch": 128}, (8, 8, 128)),
        ({MICRO: 8}, 2, {"global_batch": 128}, (8, 8, 128)),
        ({STEPS: 4}, 2, {"global_batch": 128}, (16, 4, 128)),
        ({TOTAL: 64, MICRO: 8, STEPS: 4}, 2, {"batch": 4, "global_batch": 32}, (4, 4, 32)),
        # a pipeline has fewer data-parallel ranks
        ({TOTAL: 64, "pipeline": {"stages": 2}}, 4, {"batch": 8}, (8, 4, 64)),
    ],
)
def test_what_the_options_make_of_a_json(
    content: dict[str, Any], ranks: int, options: dict[str, int], expected: tuple[int, int, int]
) -> None:
    assert sizes(content, ranks, **options) == expected


@pytest.mark.parametrize(
    ("content", "options", "total"),
    [
        ({TOTAL: 64, MICRO: 24}, {"global_batch": 96}, 96),  # 24 x 2 divides 96: stays
        ({TOTAL: 64, MICRO: 24}, {"global_batch": 64}, 64),
        ({}, {"global_batch": 64}, 64),
        ({TOTAL: 96, MICRO: 24, STEPS: 2}, {"batch": -1}, 96),
        ({}, {"batch": -1}, 64),
        ({}, {"batch": -1, "global_batch": 32}, 32),
        ({STEPS: 5}, {"global_batch": 64}, 64),
    ],
)
def test_what_would_contradict_is_left_to_the_plan(
    content: dict[str, Any], options: dict[str, int], total: int
) -> None:
    source = given(content, 2, **options)
    assert source.content is not None
    assert source.content[TOTAL] == total
    if content.get(MICRO) == 24 and total == 96 and "batch" not in options:
        assert source.content[MICRO] == 24
    else:
        assert source.left_open == ((MICRO,),)
        assert not {MICRO, STEPS} & source.content.keys()


def test_values_that_are_auto_are_no_longer_open(tmp_path: Path) -> None:
    path = tmp_path / "auto.json"
    path.write_text(json.dumps(dict.fromkeys((TOTAL, MICRO, STEPS), "auto")), encoding="utf-8")
    run = RunConfig(data="x", batch=8)
    source, lines = with_batch_options(read_source(path), run, 2)
    assert (source.content, source.left_open) == ({TOTAL: 64, MICRO: 8}, ())
    assert lines == ("--batch 8: train_batch_size 64, train_micro_batch_size_per_gpu 8",)


def test_what_was_replaced_is_named() -> None:
    run = RunConfig(data="x", batch=16)
    _, lines = with_batch_options(JsonSource("ds.json", {TOTAL: 64, MICRO: 8, STEPS: 4}), run, 2)
    assert lines == (
        "--batch 16: train_batch_size 64, train_micro_batch_size_per_gpu 16 instead of "
        "train_micro_batch_size_per_gpu 8, gradient_accumulation_steps 4",
    )


@pytest.mark.parametrize(
    ("ranks", "saved", "options", "problem"),
    [
        (
            2,
            None,
            {"batch": 12, "global_batch": 64},
            "multiple of --batch 12 x 2 ranks = 24. Set it to 48 or 72.",
        ),
        (2, None, {"global_batch": 65}, "multiple of 2 ranks = 2. Set it to 64 or 66."),
        (2, 64, {"global_batch": 32}, "the run has 64 images in a step, which stay. Leave it out"),
    ],
)
def test_options_that_contradict_are_refused(
    ranks: int, saved: int | None, options: dict[str, int], problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        sizes({MICRO: 8}, ranks, saved, **options)
    assert problem in str(caught.value)


def test_a_resumed_run_keeps_its_global_batch() -> None:
    assert sizes({}, 2, 72, batch=12) == (12, 3, 72)
    assert sizes({TOTAL: 64, MICRO: 8}, 4, 64, batch=16) == (16, 1, 64)
    assert sizes({MICRO: 8}, 2, 64, batch=12) == (8, 4, 64)  # the largest that divides a share of 32
    assert sizes({MICRO: 8}, 2, 64, batch=4, global_batch=64) == (4, 8, 64)


@pytest.mark.parametrize(
    ("argv", "ranks", "expected"),
    [
        (["--batch", "16"], 2, (16, None)),
        (["--batch", "auto"], 2, (-1, None)),
        (["--batch-size", "16"], 1, (16, None)),
        (["--batch-size", "16"], 2, (8, None)),  # of all GPUs, as in YOLOv5
        (["batch=16"], 2, (8, None)),
        (["--batch-size", "-1"], 2, (-1, None)),
        (["--batch", "64", "--global_batch"], 2, (None, 64)),
        (["--batch-size", "64", "--global-batch"], 2, (None, 64)),
        (["--batch", "8", "--global_batch", "64"], 2, (8, 64)),
        (["--global_batch", "64"], 2, (None, 64)),
        ([], 2, (None, None)),
    ],
)
def test_forms_of_the_options(
    argv: list[str], ranks: int, expected: tuple[int | None, int | None], tmp_path: Path
) -> None:
    (tmp_path / "data.yaml").write_text("names: [a]\n", encoding="utf-8")
    run, _ = read_command_line(["--data", str(tmp_path / "data.yaml"), *argv], ranks=ranks)
    assert (run.batch, run.global_batch) == expected


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--batch", "0"], "--batch: 0 given, but a micro-batch has images. Set it to 1, or to -1"),
        (["--batch", "-2"], "--batch: -2 given, but it must be a whole number, at least -1"),
        (["--batch", "x"], "--batch: x given, but it must be a whole number"),
        (["--batch-size", "x"], "--batch-size: x given, but it must be a whole number"),
        (
            ["--batch-size", "15"],
            "as in YOLOv5 it is shared by all GPUs, and 2 ranks cannot share it. Set it to 14 or 16",
        ),
        (["--batch-size", "16", "--batch", "8"], "--batch-size: given, and so is --batch. Leave one out."),
        (["--global_batch"], "--global_batch: no number given, and no --batch."),
        (["batch=0.7"], "batch=0.7: 0.7 given, but a share of the memory cannot be chosen. Give --batch -1"),
    ],
)
def test_mistakes_in_the_options(argv: list[str], problem: str, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("names: [a]\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_command_line(["--data", str(tmp_path / "data.yaml"), *argv], ranks=2)
    (line,) = caught.value.problems
    assert problem in line
