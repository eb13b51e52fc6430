"""The parts of a resolved run: their arithmetic, and that a DeepSpeed JSON comes to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsyolo.config.deepspeed.batch_sizes import batch_json, divisors, fitted, halved
from dsyolo.config.deepspeed.config import check
from dsyolo.config.deepspeed.json_reader import read_source
from dsyolo.config.deepspeed.optimizer_table import OPTIMIZERS, optimizer_spec, recipe_params
from dsyolo.config.spec import BYTES, PRECISIONS, BatchPlan, Precision, SchedulerSpec


def test_a_batch_carries_its_arithmetic() -> None:
    batch = BatchPlan(micro=8, accumulation=3, dp_size=2)
    assert (batch.share, batch.global_batch) == (24, 48)
    assert batch.with_micro(12) == BatchPlan(12, 2, 2)
    assert check(batch_json(batch), world_size=2, accelerator="cpu").batch == batch
    assert fitted(48, 16, None, 2) == BatchPlan(12, 2, 2)
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(12, 4) == [1, 2, 3, 4]
    problems: list[str] = []
    assert halved(batch, problems) == BatchPlan(4, 6, 2)
    assert not problems
    assert halved(BatchPlan(3, 1, 1), problems) is None
    assert "3 given with --halve_micro_batch, but it is odd" in problems[0]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("fp32", (4, 4, 4, 4)),
        ("autocast_bf16", (2, 4, 4, 4)),
        ("autocast_fp16", (2, 4, 4, 4)),
        ("bf16", (2, 2, 2, 4)),
        ("fp16", (2, 2, 2, 4)),
    ],
)
def test_a_precision_knows_its_bytes_and_its_json(name: str, sizes: tuple[int, ...]) -> None:
    given = PRECISIONS[name]
    assert given.name == name
    assert (given.compute_bytes, given.params_bytes, given.grads_bytes, BYTES[given.master]) == sizes
    stage = int(given.params != "fp32")
    source = {"train_batch_size": 8, "zero_optimization": {"stage": stage}, **given.deepspeed_json()}
    assert check(source, world_size=1, accelerator="cuda").precision == given


def test_gradients_have_the_type_that_the_json_sums_them_in() -> None:
    source = {"train_batch_size": 8, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    source["data_types"] = {"grad_accum_dtype": "fp32"}
    found = check(source, world_size=1, accelerator="cpu").precision
    assert found == Precision("bf16", "bf16", grads="fp32")
    assert found.name == "bf16"


def test_one_table_has_defaults_and_states_of_each_optimizer() -> None:
    assert {name: optimizer_spec(name, {}).states_per_param for name in OPTIMIZERS} == {
        "SGD": 1,
        "Adam": 2,
        "AdamW": 2,
    }
    assert optimizer_spec("SGD", {"momentum": 0, "nesterov": False}).states_per_param == 0
    assert optimizer_spec("AdamW", {"lr": 0.1}).lr == 0.1
    assert optimizer_spec("AdamW", {}).weight_decay == optimizer_spec("Adam", {}).weight_decay == 0.0
    assert recipe_params("AdamW")["weight_decay"] == recipe_params("SGD")["weight_decay"] == 0.0005


def test_a_batch_that_is_left_open_is_the_recipes(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(dict.fromkeys(batch_json(BatchPlan(1, 1, 1)), "auto")))
    source = read_source(path)
    assert len(source.left_open) == 3
    assert check(source, world_size=2, accelerator="cpu").global_batch == 64
    assert check(source, world_size=3, accelerator="cpu").global_batch == 66
    # What is "auto" elsewhere leaves a batch as it is.
    path.write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": "auto"}), encoding="utf-8"
    )
    assert check(read_source(path), world_size=2, accelerator="cpu").global_batch == 8


@pytest.mark.parametrize(
    ("kind", "params", "ends_at_zero"),
    [
        ("WarmupLR", {"warmup_min_lr": 0.0}, False),
        ("WarmupDecayLR", {"warmup_min_lr": 0.0}, True),
        ("WarmupDecayLR", {"warmup_min_lr": 1e-5}, False),
        ("WarmupCosineLR", {"cos_min_ratio": 0.0, "warmup_min_ratio": 0.1}, True),
        ("WarmupCosineLR", {"cos_min_ratio": 1e-4}, False),
    ],
)
def test_a_schedule_ends_at_zero_or_not(kind: str, params: dict[str, float], ends_at_zero: bool) -> None:
    assert SchedulerSpec(kind, params).ends_at_zero is ends_at_zero
    assert SchedulerSpec(kind, params).is_constant is (kind == "WarmupLR")
