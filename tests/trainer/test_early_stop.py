"""A run that stops early says so, why, and which epoch was best."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.world import World
from dsyolo.trainer.trainer import Trainer

BEST = {"best_epoch": 4, "best_fitness": 0.25}


@pytest.mark.parametrize(
    ("state", "rank", "line"),
    [
        (
            {"epoch": 7, "stopped_early": True, **BEST},
            0,
            "Stopped early after epoch 7 of 30: no better fitness for 2 epochs (--patience 2). "
            "The best is epoch 5, with fitness 0.2500.",
        ),
        (
            {"epoch": 6, "stopped_early": True, **BEST},
            0,
            "Stopped early after epoch 6 of 30: a hook asked for it. The best is epoch 5, with fitness 0.2500.",
        ),
        ({"epoch": 6, "stopped_early": True}, 0, "Stopped early after epoch 6 of 30: a hook asked for it."),
        ({"epoch": 7, "stopped_early": True, **BEST}, 1, None),
        ({"epoch": 30, "stopped_early": True, **BEST}, 0, None),  # it was the last one anyway
        ({"epoch": 30, **BEST}, 0, None),
    ],
)
def test_the_reason_and_the_best_epoch_are_logged(caplog, state, rank, line):
    caplog.set_level(logging.INFO)
    trainer = object.__new__(Trainer)
    trainer.state = TrainState(total_steps=90, epochs=30, num_images=24, global_batch=8, seed=0, **state)
    trainer.world = World(rank, 2, rank, 2)
    trainer.spec = SimpleNamespace(config=SimpleNamespace(patience=2))
    trainer._log_early_stop()
    assert [record.getMessage() for record in caplog.records] == ([line] if line else [])
