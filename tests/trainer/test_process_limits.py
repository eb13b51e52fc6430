"""Shared memory for the batches that wait."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from dsyolo.base.errors import UserError
from dsyolo.base.limits import shared_memory_fault
from dsyolo.cluster.world import World
from dsyolo.data.prefetch import train_ahead, waiting_images
from dsyolo.trainer import process_limits

WORLD = World(0, 2, 0, 2)


def spec(*, multi_scale: bool = False, workers: int = 2) -> Any:
    recipe = SimpleNamespace(multi_scale=multi_scale)
    return SimpleNamespace(
        config=SimpleNamespace(imgsz=64, model="yolov5n", workers=workers, val_batch_size=8, recipe=recipe),
        ds=SimpleNamespace(micro_batch=4, accumulation=3),
        data=SimpleNamespace(names=("a",)),
    )


def test_the_images_that_wait_are_those_of_the_workers_and_of_a_step():
    assert [train_ahead(workers, 3) for workers in (0, 1, 2, 4)] == [4, 4, 3, 2]
    assert waiting_images(2, 4, 3, 8) == ((2 * 3 + 3) * 4, 2 * 2 * 8)
    assert waiting_images(0, 4, 3, 8) == (0, 0)  # this process makes them itself


@pytest.mark.parametrize(("multi_scale", "side_px"), [(False, 64), (True, 96)])
def test_batches_of_training_must_fit_and_those_of_a_validation_should(
    monkeypatch, caplog, multi_scale, side_px
):
    train, val = 2 * 36 * 3 * side_px**2, 2 * 32 * 3 * 64**2  # two ranks, three bytes a pixel
    space = {"free": train - 1}

    def fault(needed: int) -> str | None:
        return f"needs {needed}" if needed > space["free"] else None

    def check(needed: int) -> None:
        if found := fault(needed):
            raise UserError("too little", [found])

    monkeypatch.setattr(process_limits, "shared_memory_fault", fault)
    monkeypatch.setattr(process_limits, "check_shared_memory", check)
    with pytest.raises(UserError, match=f"needs {train}"):
        process_limits.check_process_limits(spec(multi_scale=multi_scale), WORLD)
    for room, lines in ((train, [f"In validations: needs {train + val}"]), (train + val, [])):
        caplog.clear()
        space["free"] = room
        with caplog.at_level(logging.WARNING):
            process_limits.check_process_limits(spec(multi_scale=multi_scale), WORLD)
        assert [record.getMessage() for record in caplog.records] == lines
    process_limits.check_process_limits(spec(workers=0), WORLD)


def test_a_folder_that_is_not_there_is_no_fault(tmp_path):
    assert shared_memory_fault(1 << 60, tmp_path / "none") is None
    assert "docker run --shm-size" in (shared_memory_fault(1 << 60, tmp_path) or "")
