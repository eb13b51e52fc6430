"""Ranks whose hosts have other copies of a file end with a message that names the setting, both values and the remedy."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import run_ranks

from dsyolo.base.errors import UserError
from dsyolo.config.recipe import Recipe
from dsyolo.config.resolve import RunSpec
from dsyolo.config.run_config import RunConfig
from dsyolo.engine import process_group
from dsyolo.trainer.same_settings import check_same_settings

JSON = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


def outcome(changed: dict[str, Any], is_planned: bool) -> str:
    """Return the message of this rank, where rank 1 has other settings."""
    world = process_group.init_process_group()
    mine = changed if world.rank else {}
    nothing: Any = None
    config = RunConfig(
        data="d.yaml",
        deepspeed_config="auto" if is_planned else "ds.json",
        epochs=mine.get("epochs", 3),
        wandb_name=f"rank {world.rank}",  # from the environment of a host; only rank 0 uses it
        recipe=Recipe(mosaic=mine.get("mosaic", 1.0)),
    )
    ds: Any = SimpleNamespace(source={**JSON, **mine.get("json", {})})
    data: Any = SimpleNamespace(names=mine.get("names", ("a", "b")))
    spec = RunSpec(config, ds, data, Path("runs/a"), nothing, is_planned=is_planned)
    try:
        check_same_settings(spec, world)
    except UserError as error:
        return str(error)
    return "same"


COPY = "Copy one file to all hosts, or keep it in a folder that they share."


@pytest.mark.parametrize(
    ("changed", "is_planned", "lines"),
    [
        ({}, False, None),
        ({}, True, None),
        (
            {"json": {"zero_optimization": {"stage": 1}}},
            False,
            [f"zero_optimization.stage of --deepspeed_config ds.json: 1 on rank 1, and 2 on rank 0. {COPY}"],
        ),
        (
            {"json": {"train_batch_size": 16}},
            True,
            [
                "train_batch_size of --deepspeed_config auto: 16 on rank 1, and 8 on rank 0. "
                "Their machines differ: write one plan for all by dsyolo plan."
            ],
        ),
        (
            {"json": {"bf16": {"enabled": True}}, "mosaic": 0.5, "names": ("b", "a"), "epochs": 4},
            False,
            [
                f"bf16.enabled of --deepspeed_config ds.json: True on rank 1, and None on rank 0. {COPY}",
                f"names of d.yaml: ('b', 'a') on rank 1, and ('a', 'b') on rank 0. {COPY}",
                f"mosaic of --hyp low: 0.5 on rank 1, and 1.0 on rank 0. {COPY}",
                f"--epochs: 4 on rank 1, and 3 on rank 0. {COPY}",
            ],
        ),
    ],
)
def test_ranks_with_other_settings_end_with_the_difference(changed, is_planned, lines):
    expected = "\n  ".join(["The ranks do not agree:", *lines]) if lines else "same"
    found = run_ranks(2, outcome, changed, is_planned)
    assert [set(one.splitlines()) for one in found] == [set(expected.splitlines())] * 2
