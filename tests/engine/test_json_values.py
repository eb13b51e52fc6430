"""Every value that a DeepSpeed JSON gives reaches what trains: engine, optimizer, schedule and network on two ranks.

The table is tests/support/json_walk.py. A key that the schema honours and that has no entry there fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from json_walk import STARTS, WALK
from ranks import run_ranks

from dsyolo.config.deepspeed.optimizer_table import OPTIMIZERS
from dsyolo.config.deepspeed.scheduler_table import SCHEDULERS, scheduler_keys
from dsyolo.config.deepspeed.schema import TOP_LEVEL, JsonKey, JsonSection, Keys

SIZE_PX, NUM_IMAGES, EPOCHS = 64, 40, 3
# A run at the optimizer's own lr, where the JSON has no schedule.
FLAT = {"lrf": 1.0, "warmup_epochs": 0.0, "warmup_min_images": 0}


def honoured(keys: Keys, prefix: str = "") -> Iterator[str]:
    """The paths of all keys that are checked and handed on."""
    for name, key in keys.items():
        if isinstance(key, JsonKey):
            yield prefix + name
        elif isinstance(key, JsonSection):
            yield from honoured(key.keys, f"{prefix}{name}.")


def every_key() -> set[str]:
    found = set(honoured(TOP_LEVEL)) | {"optimizer.type"}
    for kind, facts in OPTIMIZERS.items():
        found |= set(honoured(facts.keys, f"optimizer[{kind}].params."))
    for kind in SCHEDULERS:
        found |= set(honoured(scheduler_keys({"scheduler": {"type": kind}}).keys, f"scheduler[{kind}]."))
    return found


def json_of(start: str) -> dict[str, Any]:
    """The JSON of a start: what it needs, and the values of its entries."""

    def merged(base: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
        name, *rest = path
        return {**base, name: merged(base.get(name, {}), rest, value) if rest else value}

    content = STARTS[start]
    for path, entry in WALK.items():
        if entry.start == start:
            plain = [name.partition("[")[0] for name in path.replace("].", "]|").replace("|", ".").split(".")]
            content = merged(content, plain, entry.value)
    return content


def values_held(folder: str) -> dict[str, Any]:
    """Start every JSON on this rank as a run does; return what holds each value."""
    os.chdir(folder)
    from deepspeed.utils import groups

    from dsyolo.engine import process_group

    process_group.init_process_group()
    held: dict[str, Any] = {}
    for start in STARTS:
        groups.mpu = (
            None  # a pipeline built before in this process would go on to define every engine's ranks
        )
        x = started(json_of(start), Path(folder))
        for path, entry in WALK.items():
            if entry.start == start:
                try:
                    held[path] = entry.held(x)
                except AttributeError as error:  # fails below, beside the others
                    held[path] = f"not found: {error}"
        x.deepspeed.destroy()
    return held


def started(content: dict[str, Any], folder: Path) -> SimpleNamespace:
    """Return what the trainer builds of a JSON, and the parts of it that hold values."""
    from dsyolo.cluster.world import world_from_environment
    from dsyolo.config.deepspeed.config import check
    from dsyolo.config.recipe import Recipe
    from dsyolo.config.resolve import RunSpec, plan_activations
    from dsyolo.config.run_config import RunConfig
    from dsyolo.config.spec import DataSpec
    from dsyolo.data.sampler import StepSampler
    from dsyolo.engine import deepspeed_internals as internals
    from dsyolo.tracking.other_load import OtherLoad
    from dsyolo.trainer.engine_parts import build_engine, build_network

    world = world_from_environment()
    ds = check(content, world_size=world.size, accelerator="cpu")
    config = RunConfig(data="", imgsz=SIZE_PX, epochs=EPOCHS, threads=1, recipe=Recipe(**FLAT))
    data = DataSpec(folder / "data.yaml", ("a", "b", "c"), None, None, None)
    spec = RunSpec(config, ds, data, folder, plan_activations(config, ds, 3))
    network, _ = build_network(spec)
    sampler = StepSampler(NUM_IMAGES, 0, ds.global_batch, ds.micro_batch, world.rank % ds.dp_size, ds.dp_size)
    engine = build_engine(spec, world, network, sampler, OtherLoad(world)).engine
    optimizer = internals.torch_optimizer(engine.ds_engine)
    engine.schedule.apply(engine.ds_engine.optimizer, 1)
    return SimpleNamespace(
        ds=ds,
        engine=engine,
        network=network,
        activations=spec.activations,
        deepspeed=engine.ds_engine,
        config=engine.ds_engine._config,
        zero=engine.ds_engine.optimizer,
        torch=optimizer,
        groups={group["name"]: dict(group) for group in optimizer.param_groups},
        lr_at=engine.schedule.lr_at,
        weight=next(engine.network.parameters()),
        statistics=next(b for name, b in engine.network.named_buffers() if name.endswith("running_mean")),
    )


def test_every_honoured_key_has_an_entry() -> None:
    assert set(WALK) == every_key()
    assert {entry.start for entry in WALK.values()} == set(STARTS)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, values_held, str(tmp_path_factory.mktemp("walk")))


@pytest.mark.parametrize("path", WALK)
def test_what_the_json_says_is_what_runs(two_ranks: list[dict[str, Any]], path: str) -> None:
    entry = WALK[path]
    expected = entry.value if entry.expected is None else entry.expected
    for held in two_ranks:
        found = held[path]
        if isinstance(expected, list) and isinstance(found, tuple):
            found = list(found)
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
