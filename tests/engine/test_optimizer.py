"""The optimizer's groups, and the schedule at steps that were worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from dsyolo.config.deepspeed.optimizer_table import optimizer_spec
from dsyolo.engine.optimizer import GROUPS, Schedule, build_optimizer, lr_factor, parameter_groups
from dsyolo.models.yolov5 import build_yolov5

LINEAR = Schedule(
    total_steps=100,
    warmup_steps=10,
    lr=0.01,
    lrf=0.1,
    shape="linear",
    momentum=0.937,
    weight_decay=0.0005,
    warmup_bias_lr=0.1,
    warmup_momentum=0.8,
    is_adam=False,
)
COSINE = replace(LINEAR, shape="cosine")
ADAM = replace(LINEAR, lr=0.001, is_adam=True)


@pytest.fixture(scope="module")
def network():
    return build_yolov5("yolov5n", 3)


def apply(schedule: Schedule, step: int, optimizer: str = "SGD") -> dict[str, dict]:
    """The optimizer's groups by name after `apply` at this step, in a little network."""
    little = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4)}))
    params = {"momentum": 0.937, "nesterov": True} if optimizer == "SGD" else {"betas": (0.9, 0.99)}
    built = build_optimizer(little, optimizer, {"lr": 9.0, "weight_decay": 9.0, **params})
    lr = schedule.apply(built, step)
    groups = {group["name"]: group for group in built.param_groups}
    assert groups["weights"]["lr"] == lr
    return groups


# ---- groups


def test_groups_hold_every_parameter_once_and_by_kind(network):
    kinds: dict[int, str] = {}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            kinds[id(module.weight)], kinds[id(module.bias)] = "norms", "biases"
        elif isinstance(module, nn.Conv2d):
            kinds[id(module.weight)] = "weights"
            if module.bias is not None:
                kinds[id(module.bias)] = "biases"
    groups = parameter_groups(network)
    assert tuple(groups) == GROUPS
    found = [(id(p), kind) for kind, parameters in groups.items() for p in parameters]
    assert len(found) == len(kinds) == len(list(network.parameters()))
    assert dict(found) == kinds
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    assert [len(groups[kind]) for kind in GROUPS] == [convolutions, convolutions - 3, convolutions]


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"nesterov": True}),
        (
            "Adam",
            {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1},
            {"betas": (0.8, 0.9)},
        ),
        ("AdamW", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-7}, {"eps": 1e-7}),
    ],
)
def test_the_optimizer_starts_with_rate_and_decay_zero(network, name, params, expected):
    built = build_optimizer(network, name, params)
    assert type(built) is getattr(torch.optim, name)
    assert [group["name"] for group in built.param_groups] == list(GROUPS)
    for group in built.param_groups:
        assert group["lr"] == group["weight_decay"] == 0
        assert all(group[key] == value for key, value in expected.items())


def test_a_stage_without_norms_has_no_group_of_them():
    built = build_optimizer(nn.Conv2d(3, 4, 1), "SGD", {})
    assert [group["name"] for group in built.param_groups] == ["weights", "biases"]
    LINEAR.apply(built, 5)


def test_a_step_before_the_schedule_changes_nothing(network):
    for name, params in (("SGD", {"momentum": 0.9}), ("AdamW", {})):
        built = build_optimizer(network, name, params)
        before = [p.detach().clone() for p in network.parameters()]
        for p in network.parameters():
            p.grad = torch.ones_like(p)
        built.step()
        assert all(p.equal(q) for p, q in zip(network.parameters(), before, strict=True))
        network.zero_grad()


# ---- the fall of the rate


def test_linear_by_hand():
    rates = [LINEAR.lr_at(step) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.01, 0.01 * 0.55, 0.001])


def test_cosine_by_hand():
    rates = [COSINE.lr_at(step) for step in (0, 25, 50, 100)]
    assert rates == pytest.approx([0.01, 0.01 * ((1 + math.sqrt(0.5)) / 2 * 0.9 + 0.1), 0.0055, 0.001])


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_after_the_end_the_rate_stays_for_a_run_that_is_extended(schedule):
    last = schedule.lr * schedule.lrf
    for step in (schedule.total_steps, schedule.total_steps + 1, 7 * schedule.total_steps):
        assert schedule.lr_at(step) == schedule.warmed_lr_at(step) == pytest.approx(last)
        assert apply(schedule, step)["weights"]["lr"] == pytest.approx(last)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_the_rate_falls_from_step_to_step_after_the_warm_up(schedule):
    rates = [apply(schedule, step)["weights"]["lr"] for step in range(10, 100)]
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[0] == pytest.approx(schedule.lr_at(10))
    assert rates[-1] > schedule.lr * schedule.lrf


# ---- the warm-up


def test_warm_up_by_hand():
    first, half, done = (apply(LINEAR, step) for step in (0, 5, 10))
    assert [first[kind]["lr"] for kind in GROUPS] == [0, 0, 0.1]
    goal = 0.01 * (0.95 * 0.9 + 0.1)  # of step 5
    assert [half[kind]["lr"] for kind in GROUPS] == pytest.approx([goal / 2, goal / 2, (0.1 + goal) / 2])
    assert LINEAR.warmed_lr_at(5) == pytest.approx(goal / 2)
    goal = 0.01 * (0.9 * 0.9 + 0.1)
    assert [done[kind]["lr"] for kind in GROUPS] == pytest.approx([goal] * 3)
    for groups, momentum in ((first, 0.8), (half, 0.8685), (done, 0.937), (apply(LINEAR, 60), 0.937)):
        assert [groups[kind]["momentum"] for kind in GROUPS] == pytest.approx([momentum] * 3)


def test_no_warm_up():
    groups = apply(replace(LINEAR, warmup_steps=0), 0)
    assert [groups[kind]["lr"] for kind in GROUPS] == pytest.approx([0.01] * 3)
    assert groups["weights"]["momentum"] == 0.937


def test_weight_decay_is_of_weights_alone():
    for schedule, optimizer in ((LINEAR, "SGD"), (ADAM, "AdamW")):
        for step in (0, 50):  # it takes no part in the warm-up
            groups = apply(schedule, step, optimizer)
            assert [groups[kind]["weight_decay"] for kind in GROUPS] == [0.0005, 0, 0]


@pytest.mark.parametrize(("global_batch", "decay"), [(64, 0.0005), (16, 0.000125), (256, 0.002)])
def test_weight_decay_is_scaled_by_the_batch_for_sgd_alone(global_batch, decay):
    assert optimizer_spec("SGD", {}).weight_decay_at(global_batch) == pytest.approx(decay)
    for name in ("Adam", "AdamW"):
        assert optimizer_spec(name, {"weight_decay": 0.05}).weight_decay_at(global_batch) == 0.05


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW"])
def test_adam_warms_all_up_from_zero_and_keeps_its_betas(optimizer):
    first, half = (apply(ADAM, step, optimizer) for step in (0, 5))
    assert [first[kind]["lr"] for kind in GROUPS] == [0, 0, 0]
    goal = 0.001 * (0.95 * 0.9 + 0.1)
    assert [half[kind]["lr"] for kind in GROUPS] == pytest.approx([goal / 2] * 3)
    for groups in (first, half):
        assert all(groups[kind]["betas"] == (0.9, 0.99) and "momentum" not in groups[kind] for kind in GROUPS)


def test_a_step_depends_on_nothing_before_it(network):
    """So a resumed run needs the number of the step and no state of a scheduler."""
    built = build_optimizer(network, "SGD", {"momentum": 0.937})
    for step in (3, 77, 3):
        LINEAR.apply(built, step)
    alone = apply(LINEAR, 3)
    for group in built.param_groups:
        expected = alone[group["name"]]
        assert [group[key] for key in ("lr", "momentum", "weight_decay")] == [
            expected[key] for key in ("lr", "momentum", "weight_decay")
        ]


def test_the_rate_grows_with_the_batch_as_asked():
    assert [lr_factor("none", n) for n in (32, 64, 4096)] == [1, 1, 1]
    assert [lr_factor("linear", n) for n in (32, 64, 4096)] == [0.5, 1, 64]
    assert [lr_factor("sqrt", n) for n in (16, 64, 4096)] == [0.5, 1, 8]
