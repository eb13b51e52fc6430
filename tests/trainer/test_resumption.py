"""Going on with a saved run: what is finished, what is extended, and what has to be the same."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.world import World
from dsyolo.config.recipe import Recipe
from dsyolo.config.resolve import RunSpec
from dsyolo.config.resume import LrEnd, ResumePoint
from dsyolo.config.run_config import RunConfig
from dsyolo.config.spec import SchedulerSpec
from dsyolo.engine.optimizer import Schedule
from dsyolo.trainer import resumption
from dsyolo.trainer.engine_parts import extension, idle_gpus, schedule_warning, warmup_schedule
from dsyolo.trainer.hooks.base import StopTraining
from dsyolo.trainer.run_folder import check_folder

WORLD = World(0, 1, 0, 1)
SGD = SimpleNamespace(type="SGD", params={"lr": 0.01}, is_adam=False)


def spec(
    epochs: int = 10,
    *,
    patience: int = 5,
    patience_before: int = 5,
    ends_at_zero: bool = False,
    optimizer: Any = SGD,
    scheduler: Any = None,
    **other: Any,
) -> Any:
    return SimpleNamespace(
        folder=Path("runs/a"),
        schedule_epochs=10,
        config=SimpleNamespace(epochs=epochs, patience=patience, seed=0, recipe=SimpleNamespace()),
        ends_at_zero=ends_at_zero,
        resume=SimpleNamespace(config=SimpleNamespace(patience=patience_before)),
        ds=SimpleNamespace(optimizer=optimizer, scheduler=scheduler, gradient_clipping=10.0, global_batch=8),
        data=SimpleNamespace(names=("a",)),
        **other,
    )


def state(epoch: int, **other: Any) -> TrainState:
    values = {"total_steps": 30, "epochs": 10, "num_images": 24, "global_batch": 8, "seed": 0, **other}
    settings = resumption.settings_of(spec())
    return TrainState(**values, epoch=epoch, step=3 * epoch, settings=settings)


SHORT = state(10, num_images=2).model_copy(update={"step": 3})  # 20 images are 3 steps of 8, and so are 24


@pytest.mark.parametrize(
    ("options", "saved", "line"),
    [
        (
            {},
            state(10),
            "all of its 10 epochs are trained. To train more, give --epochs 20, which goes on at the ",
        ),
        (
            {"ends_at_zero": True},
            state(10),
            "all of its 10 epochs are trained. To train more, start another run with --name",
        ),
        (
            {"epochs": 12},
            SHORT,
            "12 epochs of 2 images are 3 steps of 8, and all of them are trained. Raise --epochs further, or",
        ),
        ({"epochs": 13}, SHORT, None),
        ({}, state(9), None),
        ({"epochs": 12}, state(10), None),
        (
            {},
            state(7, stopped_early=True, best_epoch=1, best_fitness=0.5),
            "it stopped early after epoch 7 of 10. Raise --patience (now 5)",
        ),
        ({"patience": 50}, state(7, stopped_early=True, best_epoch=1, best_fitness=0.5), None),
        (
            {"patience": 4},
            state(7, stopped_early=True, best_epoch=1, best_fitness=0.5),
            "it stopped early after ",
        ),
        ({"patience": 0}, state(7, stopped_early=True, best_epoch=1, best_fitness=0.5), None),
    ],
)
def test_a_finished_run_says_so_in_one_line(caplog, options, saved, line):
    caplog.set_level(logging.INFO)
    if line is None:
        resumption.raise_if_finished(spec(**options), saved, WORLD)
        assert not caplog.records
        return
    with pytest.raises(StopTraining) as caught:
        resumption.raise_if_finished(spec(**options), saved, WORLD)
    assert caught.value.end == (0, "")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"runs/a is finished: {line}")
    assert "--weights runs/a/weights/last.safetensors" in record.getMessage()


def test_an_extended_run_keeps_its_schedule():
    new = state(0, stopped_early=False).model_copy(update={"epochs": 15, "total_steps": 45})
    found = resumption.resumed_state(spec(15), state(10), new)
    assert (found.epochs, found.total_steps, found.schedule_epochs, found.epoch) == (15, 45, 10, 10)
    assert (
        resumption.resumes_at(found, Path("step_30"))
        == "resumes at epoch 11 of 15, step 31 of 45, from step_30"
    )
    plain = resumption.resumed_state(spec(10), state(4), state(0))
    assert (plain.epochs, plain.schedule_epochs) == (10, 0)


SCHEDULE = {"warmup_num_steps": 50, "warmup_type": "log", "cos_min_ratio": 0.1}


@pytest.mark.parametrize(
    ("scheduler", "lrf", "epochs"),
    [
        (SchedulerSpec("WarmupLR", {}), 0.01, 15),
        (SchedulerSpec("WarmupCosineLR", {}), 1.0, 10),
        (None, 1.0, 15),
        (None, 0.01, 10),
    ],
)
def test_a_constant_rate_has_no_schedule_that_could_end(scheduler, lrf, epochs):
    config = RunConfig(data="d.yaml", epochs=15, recipe=Recipe(lrf=lrf))
    ds: Any = SimpleNamespace(scheduler=scheduler)
    point = ResumePoint(Path("runs/a"), config, (0, 0, 0), schedule_epochs=10)
    nothing: Any = None
    run = RunSpec(config, ds, nothing, Path("runs/a"), nothing, point)
    assert run.schedule_epochs == epochs
    assert run.lr_is_constant == (epochs == 15)


def test_an_extension_that_ends_during_the_warmup_is_warned_of():
    sampler: Any = SimpleNamespace(epoch_start_step=lambda epoch: 3 * epoch, global_batch=8)
    optimizer: Any = SimpleNamespace(lr=0.01, momentum=0.9, weight_decay_at=lambda _: 0.0, is_adam=False)
    schedule = warmup_schedule(SchedulerSpec("WarmupCosineLR", SCHEDULE), optimizer, 30, 0, 8)
    assert "after 45 of 50 steps" in schedule_warning(spec(15), schedule, sampler)
    assert "within the 50 of the warm-up" in schedule_warning(spec(17), schedule, sampler)


@pytest.mark.parametrize(
    ("warmup_steps", "rate"),
    [(10, "lr 0.0001, the end"), (200, "lr 1.5e-05 to 2.2e-05, as the warm-up goes on, the end")],
)
def test_an_extension_names_the_rates_that_it_trains_at(warmup_steps, rate):
    schedule = Schedule(30, warmup_steps, 0.01, 0.01, "linear", 0.9, 0.0, 0.1, 0.8, False)
    (line,) = extension(spec(15), schedule, 45)
    assert line == f"extended to 15 epochs: {rate} of its schedule over 10 epochs"
    assert not extension(spec(10), schedule, 30)


def test_a_run_without_a_checkpoint_is_started_afresh_by_its_folder(tmp_path, monkeypatch):
    """`--resume auto` would be in another folder where a path named this one."""
    monkeypatch.chdir(tmp_path)
    run = RunConfig(data="d.yaml", project="kept", name="a", resume="always")
    with pytest.raises(UserError) as caught:
        check_folder(run, ResumePoint(Path("kept/a"), run, (0, 0, 0)), LrEnd())
    (problem,) = caught.value.problems
    assert "it has no checkpoint yet. Start it afresh, without --resume: --project kept --name a " in problem


@pytest.mark.parametrize(
    ("ranks", "num_gpus", "start"), [(1, 4, "1 of 4 GPUs is used"), (1, 1, ""), (1, 0, ""), (2, 4, "")]
)
def test_idle_gpus_are_named(ranks, num_gpus, start):
    lines = idle_gpus(World(0, ranks, 0, ranks), num_gpus)
    assert len(lines) == bool(start)
    assert all(line.startswith(start) and "deepspeed --num_gpus 4 " in line for line in lines)


def test_what_must_be_the_same_is_named():
    resumption.check_settings(spec(15), state(10), Path("step_30"), 24)
    saved = state(10).model_copy(update={"seed": 3, "epochs": 20})
    with pytest.raises(UserError) as caught:
        resumption.check_settings(spec(15), saved, Path("step_30"), 23)
    assert [problem.partition(",")[0] for problem in caught.value.problems] == [
        "seed: 0 now",
        "epochs: 15 now",
        "num_images: 23 now",
    ]


def test_a_run_of_adam_whose_weight_decay_was_scaled_goes_on_only_with_what_ran():
    def adamw(weight_decay: float) -> Any:
        params = {"weight_decay": weight_decay}
        return spec(optimizer=SimpleNamespace(type="AdamW", params=params, is_adam=True))

    saved = state(10).model_copy(update={"settings": resumption.settings_of(adamw(0.0005))})
    resumption.check_settings(adamw(0.0005), saved, Path("c"))
    del saved.settings[resumption.UNSCALED]  # as older versions wrote it: scaled by global batch / 64
    with pytest.raises(UserError, match=r"Set optimizer\.params\.weight_decay to 6\.25e-05 in the JSON"):
        resumption.check_settings(adamw(0.0005), saved, Path("c"))
    resumption.check_settings(adamw(0.0000625), saved, Path("c"))


def test_another_schedule_is_another_run():
    warmup = SimpleNamespace(type="WarmupLR", params={})
    with pytest.raises(UserError, match=r"scheduler\.type: WarmupLR now, but None when it was saved"):
        resumption.check_settings(spec(scheduler=warmup), state(10), Path("c"))
