"""The JSON's scheduler beside the recipe's, and the optimizer that stands in a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from runs import alone, make_place

from dsyolo import train
from dsyolo.base.errors import UserError
from dsyolo.cluster.world import World
from dsyolo.config.run_config import RunConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("settings"))


def write(place: Path, **blocks: object) -> Path:
    path = place / "settings.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, **blocks}), encoding="utf-8")
    return path


SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}}


def test_a_scheduler_and_options_of_the_schedule_are_one_too_many(place: Path) -> None:
    base = ["--data", str(place / "sample/data.yaml"), "--project", str(place / "runs")]
    base += ["--deepspeed_config", str(write(place, scheduler=SCHEDULER)), "--imgsz", "64"]
    assert train.read(base, World(0, 1, 0, 1)).ds.scheduler is not None
    assert train.read([*base, "--hyp", "med", "--mosaic", "0"], World(0, 1, 0, 1)).ds.scheduler is not None
    with pytest.raises(UserError) as caught:
        train.read([*base, "--schedule", "linear", "--warmup_epochs", "1"], World(0, 1, 0, 1))
    rule = f"scheduler in {place / 'settings.json'}, a WarmupDecayLR, sets the learning rate"
    assert caught.value.problems == (
        f"--schedule: linear given, but {rule}. Leave one of them out.",
        f"--warmup_epochs: 1.0 given, but {rule}. Leave one of them out.",
    )


def test_the_optimizer_that_runs_stands_in_the_runs_folder(place: Path) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 0.002, "weight_decay": 0.05}}
    path = write(place, optimizer=optimizer, scheduler=SCHEDULER, zero_optimization={"stage": 1})
    done = alone(place, "adamw", epochs=3, deepspeed_config=path, save_every=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weight decay: 0.05, on the weights of convolutions" in done.stdout
    assert "lr by the JSON's WarmupDecayLR: logarithmic warm-up from 0 to 0.001 in 2 steps" in done.stdout
    folder = place / "runs/adamw"
    recorded = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["optimizer"]
    as_json = json.loads((folder / "deepspeed.json").read_text(encoding="utf-8"))
    assert as_json["optimizer"]["_as_it_runs"] == recorded
    assert as_json["scheduler"]["type"] == "WarmupDecayLR"
    assert as_json["optimizer"]["params"]["weight_decay"] == recorded["weight_decay"] == 0.05
    decays = {kind: group["weight_decay"] for kind, group in recorded["groups"].items()}
    assert decays == {"weights": 0.05, "norms": 0.0, "biases": 0.0}
    assert (recorded["type"], recorded["lr"], recorded["betas"], recorded["eps"]) == (
        "AdamW",
        0.001,
        [0.9, 0.999],
        1e-8,
    )
    RunConfig.load(folder / "config.yaml")  # the record is no option
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [row["lr"] for row in rows if row["kind"] == "step"]
    # 24 images in steps of 8, three epochs: 9 steps; as DeepSpeed, the first two are at the least rate
    assert rates == pytest.approx([0, 0, 0.001, *(0.001 * (10 - k) / 7 for k in range(3, 9))])
