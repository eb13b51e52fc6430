"""DeepSpeed's schedules as functions of the step: number for number what its own classes set."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsyolo.config.deepspeed.scheduler_table import SCHEDULERS, scheduler_spec
from dsyolo.config.spec import OptimizerSpec
from dsyolo.engine.optimizer import GROUPS, build_optimizer
from dsyolo.engine.warmup_schedule import WarmupSchedule
from dsyolo.trainer.engine_parts import warmup_schedule

LR, STEPS = 0.02, 40
SGD = OptimizerSpec("SGD", {"lr": LR, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005}, 1, True)
CASES = [
    ("WarmupLR", {}),
    ("WarmupLR", {"warmup_num_steps": 10}),
    ("WarmupLR", {"warmup_num_steps": 1}),
    ("WarmupLR", {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 10, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_min_lr": 0.05, "warmup_max_lr": 0.01, "warmup_num_steps": 7}),
    ("WarmupDecayLR", {"total_num_steps": 40, "warmup_num_steps": 10}),
    ("WarmupDecayLR", {"total_num_steps": 40, "warmup_num_steps": 10, "warmup_type": "linear", "warmup_max_lr": 0.3}),
    ("WarmupDecayLR", {"total_num_steps": 25, "warmup_num_steps": 4, "warmup_min_lr": 0.0001}),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 10}),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 10}),
    ("WarmupCosineLR", {"total_num_steps": 30, "warmup_num_steps": 3, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 8, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.2}),
    ("WarmupCosineLR", {"total_num_steps": 5, "warmup_num_steps": 10, "cos_min_ratio": 0}),
]  # fmt: skip


def own(kind: str, params: dict[str, object], *, left_open: frozenset = frozenset()) -> WarmupSchedule:
    problems: list[str] = []
    spec = scheduler_spec({"scheduler": {"type": kind, "params": params}}, left_open, problems)
    assert spec is not None, problems
    assert not problems
    return warmup_schedule(spec, SGD, STEPS, 12, 16)


@pytest.mark.parametrize(("kind", "params"), CASES)
def test_every_step_has_the_rate_that_deepspeed_sets(kind, params):
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = getattr(lr_schedules, kind)(optimizer, **params)
    expected = []
    for _ in range(STEPS):  # as its engine: the optimizer's step, then the scheduler's
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step()
    ours = own(kind, params)
    assert [ours.lr_at(step) for step in range(STEPS)] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert len(set(expected)) > 1  # it moves


def test_the_table_has_every_key_and_default_of_the_classes():
    import inspect

    from deepspeed.runtime import lr_schedules

    for kind, facts in SCHEDULERS.items():
        signature = inspect.signature(getattr(lr_schedules, kind)).parameters
        theirs = {
            key: None if one.default is inspect.Parameter.empty else one.default
            for key, one in signature.items()
            if key not in ("optimizer", "last_batch_iteration")
        }
        assert dict(facts.defaults) == theirs
        required = [key for key, one in signature.items() if one.default is inspect.Parameter.empty]
        assert list(facts.required) == [key for key in required if key != "optimizer"]


def test_all_groups_have_one_rate_and_momentum_no_warm_up():
    little = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)}))
    built = build_optimizer(little, "SGD", SGD.params)
    ours = own("WarmupLR", {"warmup_num_steps": 10})
    for step in (0, 5, 3):  # a pure function of the step, so a resumed run needs no state
        lr = ours.apply(built, step)
        groups = {group["name"]: group for group in built.param_groups}
        assert [groups[kind]["lr"] for kind in GROUPS] == [lr] * 3 == [ours.lr_at(step)] * 3
        assert [groups[kind]["momentum"] for kind in GROUPS] == [0.9] * 3
        assert [groups[kind]["weight_decay"] for kind in GROUPS] == [0.0005 * 16 / 64, 0, 0]


def test_what_is_auto_follows_from_optimizer_recipe_and_run():
    keys = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    every = frozenset(("scheduler", "params", key) for key in keys)
    for left_open in (every, frozenset({("scheduler", "params")})):
        ours = own("WarmupDecayLR", {}, left_open=left_open)
        assert (ours.min_lr, ours.lr, ours.warmup_steps, ours.decay_steps) == (0.0, LR, 12, STEPS)
    problems: list[str] = []
    assert scheduler_spec({"scheduler": {"type": "WarmupDecayLR"}}, frozenset(), problems)
    assert problems == [
        "scheduler.params.total_num_steps: missing, and WarmupDecayLR needs it. "
        'Write "auto" for the steps of the run.'
    ]


@pytest.mark.parametrize(("kind", "last"), [("WarmupDecayLR", "0"), ("WarmupCosineLR", "2e-06")])
def test_a_total_within_the_warm_up_is_warned_of(kind, last):
    short = own(kind, {"total_num_steps": 10, "warmup_num_steps": 20})
    assert (
        f"10 given, within the 20 of the warm-up, after which the learning rate is {last} at once"
        in short.warning()
    )
    assert f"then at once to {last}." in short.explain()
    assert short.lr_at(STEPS - 1) == pytest.approx(float(last), abs=1e-15)


def test_a_run_that_outlives_its_schedule_is_warned_of():
    assert own("WarmupDecayLR", {"total_num_steps": 40, "warmup_num_steps": 9}).warning() == ""
    short = own("WarmupDecayLR", {"total_num_steps": 25, "warmup_num_steps": 9})
    assert "the last 14 have a learning rate of 0" in short.warning()
    assert [short.lr_at(step) > 0 for step in (25, 26, 39)] == [True, False, False]
    assert "ends during the warm-up, after 40 of 1000 steps" in own("WarmupLR", {}).warning()
    assert (
        "lr by the JSON's WarmupLR: logarithmic warm-up from 0 to 0.02 in 1000"
        in own("WarmupLR", {}).explain()
    )
