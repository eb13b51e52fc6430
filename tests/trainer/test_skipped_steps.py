"""A step whose loss or gradients are not finite leaves no trace, under every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from ranks import asked, long_but, run_ranks
from runs import CONFIG, alone, losses, make_place, rows

from dsyolo.trainer.hooks.divergence_hook import DIVERGED

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
TWO = {"pipeline": {"stages": 2}}
# (ZeRO stage, JSON, optimizer) by name, for two ranks
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "ZeRO 0": (0, {}, "SGD"),
    "ZeRO 0, not clipped": (0, {"gradient_clipping": 0.0}, "AdamW"),
    "ZeRO 1": (1, {}, "SGD"),
    "ZeRO 1, bf16": (1, {"bf16": {"enabled": True}}, "AdamW"),
    "ZeRO 2": (2, {}, "AdamW"),
    "ZeRO 2, offload": (
        2,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "SGD",
    ),
    "ZeRO 3": (3, {}, "SGD"),
    "pipeline, ZeRO 0": (0, TWO, "SGD"),
    "pipeline, ZeRO 1": (1, TWO, "AdamW"),
    "ZeRO 2, autocast": (2, AUTOCAST, "SGD"),  # the last: DeepSpeed keeps in a global that it was on
}


def bad_step(engine) -> Any:
    """A step in which one micro-batch, of the last rank, has a label that is not a number."""
    turns = range(engine.dp_rank, training.GROUPS, engine.dp_size)
    batches = [training.batch(50, turn) for turn in turns]
    if engine.world.rank == engine.world.size - 1:
        boxes = batches[-1].targets.boxes.clone()
        boxes[:, 0] = torch.nan
        batches[-1] = batches[-1]._replace(targets=batches[-1].targets._replace(boxes=boxes))
    return engine.train_step(batches, 1)[0]


QUICK = ("ZeRO 1, bf16", "ZeRO 3")


def with_and_without(folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        stage, json_blocks, optimizer = CASES[name]
        runs = []
        for spoil in (False, True):
            engine, partitions, ema, _ = training.build(
                stage, Path(folder), optimizer=optimizer, **json_blocks
            )
            before = training.train(engine, ema, 0, 1)
            stats = bad_step(engine) if spoil else None
            after = training.train(engine, ema, 1, 3)
            runs.append((training.result(engine, partitions, ema, before + after), stats))
        (plain, _), (spoilt, stats) = runs
        found[name] = {
            "applied": stats.was_applied,
            "finite": bool(stats.losses.isfinite().all()),
            "losses": (plain["losses"], spoilt["losses"]),
            "differ": [
                f"{kind} {key}"
                for kind in ("weights", "ema", "buffers")
                for key, tensor in plain[kind].items()
                if not torch.equal(tensor, spoilt[kind][key])
            ],
        }
    return found


@pytest.fixture(scope="module")
def on_two_ranks(request, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("skipped"))
    return run_ranks(2, with_and_without, folder, asked(request, "name"))


@pytest.mark.parametrize("name", long_but(QUICK, CASES))
def test_the_training_goes_on_as_if_the_step_had_not_been(on_two_ranks, name):
    for rank in on_two_ranks:
        got = rank[name]
        assert not got["applied"]
        assert not got["finite"]
        assert got["losses"][0] == got["losses"][1]
        assert got["differ"] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("diverged"))


def test_after_too_many_in_a_row_the_run_stops_and_names_the_images(place):
    params = {**CONFIG["optimizer"]["params"], "lr": 1e30}
    config = place / "diverges.json"
    config.write_text(json.dumps({**CONFIG, "optimizer": {"type": "SGD", "params": params}}))
    options = {"deepspeed_config": config, "max_skipped_steps": 2, "warmup_epochs": 0, "warmup_min_images": 0}
    done = alone(place, "diverged", **options, epochs=4)
    assert done.returncode == DIVERGED, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "the last 2 steps were not finite" in done.stderr
    assert "Lower optimizer.params.lr" in done.stderr
    named = json.loads((place / "runs/diverged/skipped_steps.json").read_text())
    last = losses(place, "diverged")[-1][0]
    assert list(named) == [str(last - 1), str(last)]
    for images in named.values():
        assert len(images) == CONFIG["train_batch_size"]
        assert all(Path(image).is_file() for image in images)
    assert [row.get("skipped_steps") for row in rows(place, "diverged", "step")][-2:] == [1, 1]
