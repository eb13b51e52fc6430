"""The loss scale of fp16: saved, resumed, and what a step that overflows leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training
from ranks import run_ranks

from dsyolo.engine.engine import LossScale

OVERFLOWS = [True, True, False, True, *[False] * 7, True, *[False] * 14]


def deepspeeds_scaler():
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    settings = {
        "init_scale": 2.0**16,
        "scale_window": 3,
        "min_scale": 1,
        "delayed_shift": 2,
        "consecutive_hysteresis": False,
    }
    return CreateLossScaler(torch.half, 1.0, True, settings)


def loss_scale_of(scaler) -> LossScale:
    optimizer = SimpleNamespace(loss_scaler=scaler)
    return LossScale(SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: True))


def saved_and_resumed_anywhere() -> list[tuple[list[float], list[float]]]:
    from dsyolo.engine import process_group

    process_group.init_process_group()  # DeepSpeed's scaler asks for its rank
    results = []
    for stop in range(len(OVERFLOWS)):
        first = deepspeeds_scaler()
        for overflow in OVERFLOWS[:stop]:
            first.update_scale(overflow)
        state = json.loads(json.dumps(loss_scale_of(first).state()))
        second = deepspeeds_scaler()
        loss_scale_of(second).load(state)
        scales: tuple[list[float], list[float]] = ([first.cur_scale], [second.cur_scale])
        for overflow in OVERFLOWS[stop:]:
            for scaler, seen in zip((first, second), scales, strict=True):
                scaler.update_scale(overflow)
                seen.append(scaler.cur_scale)
        results.append(scales)
    return results


def test_deepspeeds_scaler_goes_on_as_if_never_stopped():
    (results,) = run_ranks(1, saved_and_resumed_anywhere)
    assert len({scale for first, _ in results for scale in first}) > 4  # it falls and rises
    for first, second in results:
        assert first == second


def test_where_nothing_moves_nothing_is_kept():
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    for optimizer in (SimpleNamespace(), SimpleNamespace(loss_scaler=LossScaler(128.0))):
        scale = LossScale(SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: False))
        assert scale.state() == {}
        assert not scale.can_skip
        scale.load({"scale": 4.0, "good_steps": 1})
    assert optimizer.loss_scaler.cur_scale == 128.0


def fp16_autocast(folder: str) -> dict[str, object]:
    """Real training in fp16 autocast. torch has it on a CPU, slowly: dsyolo's check is passed by."""
    from dsyolo.checkpoint.manifest import all_checkpoints
    from dsyolo.checkpoint.train_state import TrainState
    from dsyolo.cluster.collectives import barrier
    from dsyolo.config.deepspeed import rules
    from dsyolo.config.spec import PRECISIONS

    rules.precision = lambda *_: PRECISIONS["autocast_fp16"]
    json_block = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    engine, partitions, ema, checkpoints = training.build(0, Path(folder), **json_block)
    # the first scale, 2^16, is known to be fine or too large by a factor of 2; this one is surely too large
    engine.ds_engine.torch_autocast_z0_gradscaler.load_state_dict(
        {**engine.ds_engine.torch_autocast_z0_gradscaler.state_dict(), "scale": 2.0**40}
    )
    engine.loss_scale = LossScale(engine.ds_engine)
    weights, buffers = training.whole(partitions, partitions.masters()), engine.buffers.flat.clone()
    own = range(engine.world.rank, training.GROUPS, engine.world.size)
    stats, _ = engine.train_step([training.batch(0, group) for group in own], 0)
    skipped = {
        "applied": stats.was_applied,
        "same_weights": all(
            torch.equal(weights[n], w) for n, w in training.whole(partitions, partitions.masters()).items()
        ),
        "same_buffers": torch.equal(buffers, engine.buffers.flat),
        "scale": engine.loss_scale.state()["scale"],
    }
    engine.loss_scale.load({"scale": 2.0**12, "good_steps": 5})
    stats, _ = engine.train_step([training.batch(1, group) for group in own], 1)
    training.train(engine, ema, 2, 3)
    checkpoints.save(TrainState(total_steps=20, epochs=1, num_images=160, global_batch=8, seed=0, step=3))
    (path,) = all_checkpoints(Path(folder))
    other, _, _, of_other = training.build(0, Path(folder), **json_block)
    of_other.load(path)
    resumed = other.loss_scale.state()
    manifest = json.loads((path / "progress.json").read_text())
    saved = manifest.pop("loss_scale")
    barrier()
    if engine.world.is_main_process:
        manifest.pop("sha256", None)
        (path / "progress.json").write_text(json.dumps(manifest))  # as checkpoints were before
    barrier()
    old, _, _, of_old = training.build(0, Path(folder), **json_block)
    of_old.load(path)
    return {
        "skipped": skipped,
        "applied": stats.was_applied,
        "moved": not torch.equal(buffers, engine.buffers.flat),
        "live": engine.loss_scale.state(),
        "saved": saved,
        "resumed": resumed,
        "of_old": old.loss_scale.state()["scale"],
    }


@pytest.fixture(scope="module")
def in_fp16(tmp_path_factory):
    return run_ranks(2, fp16_autocast, str(tmp_path_factory.mktemp("fp16")))


def test_a_step_that_overflows_leaves_no_trace_and_says_so(in_fp16):
    for rank in in_fp16:
        assert rank["skipped"] == {
            "applied": False,
            "same_weights": True,
            "same_buffers": True,
            "scale": 2.0**39,
        }
        assert rank["applied"]
        assert rank["moved"]


def test_the_scale_is_saved_and_resumed(in_fp16):
    first = in_fp16[0]
    assert first["live"] == first["saved"] == first["resumed"] == {"scale": 2.0**12, "good_steps": 7}


def test_a_checkpoint_without_a_scale_is_resumed(in_fp16):
    assert in_fp16[0]["of_old"] == 2.0**16  # torch's first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="DeepSpeed has no fp16 on a CPU")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_trains_skips_and_resumes(tmp_path, stage):
    got = run_ranks(1, fp16_enabled, str(tmp_path), stage, accelerator="cuda")[0]
    assert not got["applied"][0]  # 2^40 is too large
    assert got["applied"][-1]
    assert all(torch.isfinite(torch.tensor(losses)).all() for losses in got["losses"][-2:])
    assert got["resumed"] == got["saved"]
    assert got["saved"]["scale"] < 2.0**40


def fp16_enabled(folder: str, stage: int) -> dict[str, object]:
    from dsyolo.checkpoint.manifest import all_checkpoints
    from dsyolo.checkpoint.train_state import TrainState

    block = {"fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    engine, _, _, checkpoints = training.build(stage, Path(folder), accelerator="cuda", **block)
    applied, losses = [], []
    for step in range(40):
        stats, _ = engine.train_step([training.batch(step, group) for group in range(training.GROUPS)], step)
        applied.append(stats.was_applied)
        losses.append(stats.losses.tolist())
    checkpoints.save(TrainState(total_steps=40, epochs=1, num_images=320, global_batch=8, seed=0, step=40))
    other, _, _, of_other = training.build(stage, Path(folder), accelerator="cuda", **block)
    of_other.load(all_checkpoints(Path(folder))[-1])
    return {
        "applied": applied,
        "losses": losses,
        "saved": engine.loss_scale.state(),
        "resumed": other.loss_scale.state(),
    }
