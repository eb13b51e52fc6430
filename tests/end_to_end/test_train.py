"""The entry, as users start it: through the launcher, alone, killed and resumed, and with every kind of mistake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks import long_but
from runs import CONFIG, TRAIN, alone, arguments, environment, launch, losses, make_place, rows, together
from safetensors.torch import load_file, save_file

from dsyolo import train
from dsyolo.cluster.world import World
from dsyolo.config.deepspeed.config import check
from dsyolo.config.resolve import RunSpec, plan_activations
from dsyolo.config.run_config import RunConfig
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.synthetic import draw_sample
from dsyolo.trainer.data_parts import build_data, index_splits
from dsyolo.trainer.engine_parts import build_network


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def two_ranks(place):
    """A whole run through the launcher on two ranks."""
    command = launch(place, "whole")
    done = subprocess.run(
        command, env=environment(place), capture_output=True, text=True, timeout=300, cwd=place
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_run_leaves_what_the_readme_says(place, two_ranks):
    folder = place / "runs/whole"
    for name in ("config.yaml", "deepspeed.json", "metrics.jsonl", "results.png", "predictions.jpg"):
        assert (folder / name).stat().st_size > 0, name
    assert yaml.safe_load((folder / "config.yaml").read_text())["recipe"]["mosaic"] == 1.0
    assert json.loads((folder / "deepspeed.json").read_text())["gradient_accumulation_steps"] == 2
    assert [row["step"] for row in rows(place, "whole", "step")] == list(range(1, 10))
    epochs = rows(place, "whole", "epoch")
    assert all("map50_95" in row and row["val_box"] > 0 for row in epochs)
    best = max(epochs, key=lambda row: row["fitness"])["epoch"] + 1
    assert f"; the best was epoch {best}: mAP50 " in two_ranks.stdout
    assert f"validation of the best weights (weights/best.safetensors, of epoch {best}):" in two_ranks.stdout
    assert "[#" not in two_ranks.stdout + two_ranks.stderr  # the bar is for terminals
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    progress = json.loads((folder / "checkpoints/step_00000009/progress.json").read_text())["progress"]
    best = f"step_{3 * (progress['best_epoch'] + 1):08d}"
    assert checkpoints == sorted({best, "step_00000006", "step_00000009"})
    assert "mAP50-95" in two_ranks.stdout
    assert "best.safetensors" in two_ranks.stdout


def test_what_deepspeed_logs_is_in_the_files_of_the_ranks_alone(place, two_ranks):
    for rank in (0, 1):
        log = (place / f"runs/whole/logs/rank_{rank:04d}.log").read_text(encoding="utf-8")
        theirs = re.findall(rf"^.* INFO rank {rank}: DeepSpeed: .*$", log, re.MULTILINE)
        assert theirs, log
    assert "DeepSpeed: " not in two_ranks.stdout + two_ranks.stderr
    # As DeepSpeed's own console has it; its launcher, which is not ours, prints such lines too.
    printed = [line for line in (two_ranks.stdout + two_ranks.stderr).splitlines() if "[INFO]" in line]
    assert [line for line in printed if not re.search(r"\[(runner|launch)\.py:", line)] == []


def test_a_run_reports_what_memory_it_was_expected_to_need_and_needed(place, two_ranks):
    assert re.search(
        r"memory: \d+ MiB on a rank, \d+ without all this: ZeRO 2 \w+ \d+, recompute would save \d+\n",
        two_ranks.stdout,
    )
    ranks = json.loads((place / "runs/whole/memory.json").read_text())
    assert [one["rank"] for one in ranks] == [0, 1]
    for one in ranks:
        expected, found = one["predicted"]["device"], one["measured"]["device"]
        for term in ("parameters", "gradients", "optimizer", "ema", "buckets"):
            assert found[term] == pytest.approx(expected[term], rel=0.02), term
        # beside what autograd keeps there are maps, loss, and gradients on their way: most of it, with so few pixels
        assert 0 < found["activations"] - expected["activations"] < expected["parameters"]
        assert found["activations"] < one["peak"] < 1.1 * sum(found.values())
    assert two_ranks.stdout.count("memory, MiB ") == 1  # one table, of both
    for kind in ("predicted", "measured"):
        assert two_ranks.stdout.count(f"\n{kind} ") == 1
    table = re.search(r"\nmemory, MiB .*\npredicted .*\nmeasured .*\n", two_ranks.stdout)
    assert table
    assert (
        len(set(map(len, table.group().split("\n")[1:-1]))) == 1
    )  # in line, also below the time and the rank
    assert max(map(len, table.group().split("\n"))) <= 80


def test_validating_the_weights_gives_the_figures_of_the_run(place, two_ranks):
    out = place / "val.json"
    weights = place / "runs/whole/weights/last.safetensors"
    words = ["val", "--weights", str(weights), "--data", str(place / "sample/data.yaml"), "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "dsyolo.cli", *words], env=environment(place), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert {"map50_95", "map50", "precision", "recall", "per_class"} <= figures.keys()
    last = rows(place, "whole", "epoch")[-1]
    for name in ("map50_95", "val_box", "val_obj", "val_cls"):  # measured by two ranks, with other batches
        assert figures[name] == pytest.approx(last[name], abs=1e-6), name
        assert name == "map50_95" or figures[name] > 0


@pytest.fixture(scope="module")
def one_rank(place):
    """The same run on one."""
    done = alone(place, "one")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_one_rank_trains_the_same_and_validates_the_same(place, two_ranks, one_rank):
    first, second = losses(place, "whole"), losses(place, "one")
    # the groups of BatchNorm are the same, so only rounding differs
    np.testing.assert_allclose(first[:4], second[:4], rtol=1e-3)


@pytest.mark.soak
def test_recomputed_activations_change_nothing_but_memory(place, one_rank):
    assert re.search(r"activations: 0\.0\d GiB a micro-batch\n", one_rank.stdout)
    block = {"recompute": "blocks", "cpu_checkpointing": True}
    config = place / "recompute.json"
    config.write_text(json.dumps({**CONFIG, "activation_checkpointing": block}))
    done = alone(place, "recomputed", deepspeed_config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recompute: all blocks, their inputs in host memory" in done.stdout
    assert "recomputing 18 of 18 blocks" in done.stdout
    (plain,), (recomputed,) = (
        json.loads((place / f"runs/{name}/memory.json").read_text()) for name in ("one", "recomputed")
    )
    expected, found = (
        plain[what]["device"]["activations"] - recomputed[what]["device"]["activations"]
        for what in ("predicted", "measured")
    )
    assert found == pytest.approx(expected, rel=0.4)  # gradients that were small beside them are not any more
    assert losses(place, "recomputed") == losses(place, "one")


def test_killed_in_an_epoch_and_resumed_it_ends_bit_for_bit_the_same(place, two_ranks):
    log = (place / "killed.log").open("w")
    command = launch(place, "killed")
    process = subprocess.Popen(
        command, env=environment(place), stdout=log, stderr=log, cwd=place, start_new_session=True
    )
    metrics = place / "runs/killed/metrics.jsonl"
    end = time.monotonic() + 120
    # a checkpoint of epoch 1 is there, and epoch 2 has made a step
    while time.monotonic() < end and '"step": 4' not in (metrics.read_text() if metrics.exists() else ""):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in map(int, re.findall(r"process (\d+) spawned", (place / "killed.log").read_text())):
        with contextlib.suppress(ProcessLookupError):  # the launcher's ranks have sessions of their own
            os.kill(pid, signal.SIGKILL)
    assert len(losses(place, "killed")) < 9
    done = together(place, "killed", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(place, "killed") == losses(place, "whole")
    for name in ("last", "best"):
        expected = load_file(place / f"runs/whole/weights/{name}.safetensors")
        got = load_file(place / f"runs/killed/weights/{name}.safetensors")
        assert all((expected[key] == got[key]).all() for key in expected | got), name


def _broken_json(place: Path, **changes: object) -> Path:
    path = place / "broken.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


def _data_without_a_class(place: Path) -> Path:
    text = yaml.safe_load((place / "sample/data.yaml").read_text())
    text["path"] = str(place / "sample")
    text["names"] = dict(list(text["names"].items())[:2])
    path = place / "two_classes.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def _damaged_weights(place: Path) -> Path:
    path = place / "damaged.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all")
    return path


MISTAKES = {
    "wrong key": (
        lambda p: {"deepspeed_config": _broken_json(p, grandient_clipping=1)},
        "Did you mean gradient_clipping",
    ),
    "wrong arithmetic": (
        lambda p: {"deepspeed_config": _broken_json(p, gradient_accumulation_steps=3)},
        "train_batch_size: 8",
    ),
    "stages with ZeRO 2": (
        lambda p: {"deepspeed_config": _broken_json(p, pipeline={"stages": 2})},
        "pipeline.stages",
    ),
    "missing data.yaml": (lambda p: {"data": p / "sample/dta.yaml"}, "Did you mean data.yaml"),
    "missing class": (
        lambda p: {"data": _data_without_a_class(p)},
        "Add these classes to names (circle, square",
    ),
    "weights is a device": (lambda p: {"weights": "/dev/zero"}, "/dev/zero is a device or pipe"),
    "project is a file": (lambda p: {"project": p / "ds.json"}, "ds.json is a file, and a folder is needed"),
    "unreadable weights": (lambda p: {"weights": _damaged_weights(p)}, "not a complete safetensors file"),
    "unknown option": (lambda p: {"mosiac": 1}, "Did you mean --mosaic"),
    "a budget too small": (lambda p: {"recompute": "0.0001GiB"}, "lower train_micro_batch_size_per_gpu"),
    "wrong size": (lambda p: {"imgsz": 100}, "96 or 128"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_reported_in_words_with_status_2(place, mistake):
    options, told = MISTAKES[mistake]
    done = alone(place, "mistake", **options(place))
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "runs/mistake").exists()


def test_ctrl_c_is_reported_in_one_line_with_status_130(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "read", interrupt)
    assert train.main([]) == 130
    assert (
        capsys.readouterr().err.strip()
        == "Interrupted. --resume auto continues from the last checkpoint, if there is one."
    )


def test_through_the_launcher_a_mistake_is_reported_once_with_status_2(place):
    options = {"deepspeed_config": _broken_json(place, grandient_clipping=1)}
    command = launch(place, "mistake", **options)
    done = subprocess.run(
        command, env=environment(place), capture_output=True, text=True, timeout=120, cwd=place
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Did you mean gradient_clipping") == 1


@pytest.mark.parametrize("name", ["checkpoints", "weights", "metrics.jsonl"])
def test_what_is_in_the_way_of_a_run_is_named(place, name):
    there = place / "runs/blocked" / name
    there.parent.mkdir(parents=True)
    there.mkdir() if name == "metrics.jsonl" else there.touch()
    done = alone(place, "blocked")
    shutil.rmtree(there.parent)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"blocked/{name}" in done.stderr
    assert "Make room" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.soak
def test_a_port_that_is_taken_does_not_matter_to_one_rank(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        told |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        done = subprocess.run(
            [sys.executable, str(TRAIN), *arguments(place, "port", epochs=1)],
            env={**environment(place), **told},
            cwd=place,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_finished_run_is_not_overwritten(place, two_ranks):
    done = alone(place, "whole")
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert len(losses(place, "whole")) == 9


def test_a_damaged_checkpoint_is_refused_and_kept(place, two_ranks):
    file = sorted((place / "runs/whole/checkpoints").glob("step_00000009/*.safetensors"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        done = alone(place, "whole", "--resume")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "checksum" in done.stderr
        assert file.exists()
    finally:
        file.write_bytes(whole)


def test_weights_start_a_run_with_other_classes(place, two_ranks):
    weights = load_file(place / "runs/whole/weights/last.safetensors")
    weights = {name: t[:24] if name.startswith("detect.m") else t for name, t in weights.items()}
    save_file({name: t.contiguous() for name, t in weights.items()}, place / "other.safetensors")
    done = alone(place, "tuned", weights=place / "other.safetensors", epochs=1)
    assert done.returncode == 0, done.stderr
    assert "tensors loaded" in done.stdout


CHANGES = {
    "another optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}},
        "optimizer.type: AdamW now",
    ),
    "another lr": (
        {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}},
        "optimizer.params.lr: 0.5 now, but 0.01 when",
    ),
    "another clipping": ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0 now, but 10.0 when"),
}


@pytest.mark.parametrize("change", long_but(["another clipping"], CHANGES))
def test_a_run_does_not_go_on_with_another_recipe_in_the_json(place, two_ranks, change):
    json_of_change, message = CHANGES[change]
    (place / "changed.json").write_text(json.dumps({**CONFIG, **json_of_change}))
    done = alone(place, "whole", "--resume", deepspeed_config=place / "changed.json")
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr


def test_a_run_does_not_go_on_with_another_class(place, two_ranks):
    shutil.copytree(place / "runs/whole", place / "runs/more", dirs_exist_ok=True)
    data = place / "sample/more.yaml"
    data.write_text((place / "sample/data.yaml").read_text().replace("names:", "names:\n  5: extra"))
    settings = place / "runs/more/config.yaml"
    settings.write_text(settings.read_text().replace("data.yaml", "more.yaml").replace("whole", "more"))
    before = sorted((place / "runs/more/checkpoints").rglob("*"))
    done = alone(place, "more", "--resume", data=data)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "names" in done.stderr
    assert sorted((place / "runs/more/checkpoints").rglob("*")) == before


def test_anchors_of_the_weights_are_those_of_targets_loss_and_network(place, two_ranks):
    weights = load_file(place / "runs/whole/weights/last.safetensors")
    weights["detect.anchors"] = weights["detect.anchors"] * 3
    save_file(weights, place / "anchors.safetensors")
    words = {
        "weights": str(place / "anchors.safetensors"),
        "imgsz": 64,
        "data": str(place / "sample/data.yaml"),
    }
    config = RunConfig(
        deepspeed_config=str(place / "ds.json"), project=str(place / "runs"), name="a", **words
    )
    world = World(0, 1, 0, 1)
    ds = check(CONFIG, world_size=1, accelerator="cpu")
    data = read_data_yaml(config.data)
    run = RunSpec(config, ds, data, place / "runs/a", plan_activations(config, ds, data.num_classes))
    network, taken = build_network(run)
    assert "tensors loaded" in taken
    torch.testing.assert_close(network.anchors, weights["detect.anchors"])
    data = build_data(run, world, index_splits(run, world), network)
    big = data.train.assign(
        np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([[32, 32, 60, 60]], np.float32), 1, (64, 64)
    )
    # 60 px fit anchors of 30 to 99 px within a factor of 4: now those of the first level too
    assert big.num_matches[0] > 0


def test_a_data_set_smaller_than_a_batch_warns_and_skips_epochs_without_a_step(place):
    draw_sample(place / "tiny", num_images=4, image_size=(64, 64))
    done = alone(place, "tiny", data=place / "tiny/data.yaml", epochs=9)
    assert done.returncode == 0, done.stderr
    assert "The run ends during the warm-up" in done.stdout
    told = rows(place, "tiny", "epoch")
    assert len(told) == len(rows(place, "tiny", "step"))
    assert told[-1]["epoch"] == 8
