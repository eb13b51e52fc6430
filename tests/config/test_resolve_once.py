"""Whole trainings of one rank: each given file is opened once, the rules are checked once, two networks are built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import CONFIG, arguments, environment, make_place

# Python audits every open of a file, whoever opens it; safetensors opens its files itself.
SCRIPT = """
import collections, json, os, sys
opened, counts, built = collections.Counter(), collections.Counter(), []

def hook(event, args):
    if event == "open" and isinstance(args[0], str):
        mode, flags = args[1:]
        if "r" in mode if mode else not flags & (os.O_WRONLY | os.O_RDWR):
            opened[os.path.realpath(args[0])] += 1

def counted(owner, name, note=lambda: None):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        counts[name] += 1
        note()
        return real(*args, **kwargs)
    setattr(owner, name, call)

sys.addaudithook(hook)
import torch
from dsyolo.models import yolov5
counted(yolov5, "build_yolov5", lambda: built.append(torch.get_default_device().type))
from dsyolo.base import tensor_file
counted(tensor_file, "safe_open")
from dsyolo.config.deepspeed import config
counted(config, "valid_part")
from dsyolo.planner.predict import Planner
counted(Planner, "predict")
from dsyolo import train
status = train.main(sys.argv[1:])
print("COUNTS", json.dumps([opened, counts, built]))
sys.exit(status)
"""


class Counts(NamedTuple):
    opened: dict[str, int]
    calls: dict[str, int]
    built: list[str]

    def of(self, *paths: Path) -> list[int]:
        return [self.opened.get(str(path.resolve()), 0) for path in paths]


def run(place: Path, name: str, *words: str, epochs: int = 1, **options: Any) -> Counts:
    argv = [*arguments(place, name, epochs=epochs, workers=0, **options), *words]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv],
        env=environment(place),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("COUNTS "))
    return Counts(*json.loads(line.removeprefix("COUNTS ")))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("once"))
    (folder / "mine.yaml").write_text("mosaic: 0.5\n")
    values = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    (folder / "auto.json").write_text(json.dumps({**CONFIG, **values}))
    return folder


@pytest.fixture(scope="module")
def first(place: Path) -> Counts:
    return run(place, "first", hyp=place / "mine.yaml")


def test_a_run_opens_each_file_once_and_builds_two_networks(place: Path, first: Counts) -> None:
    assert first.of(place / "ds.json", place / "sample/data.yaml", place / "mine.yaml") == [1, 1, 1]
    assert first.calls["valid_part"] == 1
    assert sorted(first.built) == ["cpu", "meta"]


@pytest.mark.soak
def test_a_users_own_network_is_built_twice(place: Path) -> None:
    own = (Path(__file__).parents[2] / "examples/my_net.py").read_text(encoding="utf-8")
    counting = "\n\n_plain = build\n\n\ndef build(k):\n    open('built', 'a').write('one\\n')\n    return _plain(k)\n"
    (place / "own.py").write_text(own + counting, encoding="utf-8")
    run(place, "own", model="own.py:build")
    assert (place / "built").read_text(encoding="utf-8") == "one\n" * 2


@pytest.mark.soak
def test_weights_are_read_once(place: Path, first: Counts) -> None:
    weights = place / "runs/first/weights/last.safetensors"
    found = run(place, "second", weights=weights)
    assert found.calls["safe_open"] == 1
    assert found.of(weights) == [1]  # before safetensors does: whether it is a pickled file
    assert sorted(found.built) == ["cpu", "meta"]


def test_a_resumed_run_reads_its_settings_once(place: Path, first: Counts) -> None:
    found = run(place, "first", "--resume", epochs=2)  # one alone is finished
    assert found.of(place / "ds.json", place / "sample/data.yaml") == [1, 1]
    assert found.of(place / "runs/first/config.yaml") == [1]
    assert found.of(place / "mine.yaml") == [0]  # its values are in config.yaml
    assert found.calls["valid_part"] == 1
    assert sorted(found.built) == ["cpu", "meta"]


def test_values_that_are_auto_are_filled_in_without_another_look(place: Path) -> None:
    found = run(place, "values", deepspeed_config=place / "auto.json")
    assert found.of(place / "auto.json", place / "sample/data.yaml") == [1, 1]
    assert found.calls["valid_part"] == 1  # candidates are other batches of the one that was checked
    assert found.calls["predict"] >= 1
    assert sorted(found.built) == ["cpu", "meta"]


@pytest.mark.soak
def test_a_plan_checks_each_candidate_once(place: Path) -> None:
    found = run(place, "all", deepspeed_config="auto")
    assert found.of(place / "sample/data.yaml") == [1]
    assert found.calls["valid_part"] == found.calls["predict"] > 1
    assert sorted(found.built) == ["cpu", "meta"]
