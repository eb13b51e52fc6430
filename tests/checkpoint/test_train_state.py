"""The progress of a run: when it runs out of patience."""

from __future__ import annotations

import pytest

from dsyolo.checkpoint.train_state import TrainState


def stops_after(fitness: list[float], patience: int) -> int | None:
    """The epoch, from 1, after which a run with these fitnesses stops."""
    state = TrainState(total_steps=100, epochs=100, num_images=8, global_batch=8, seed=0)
    for epoch, value in enumerate(fitness):
        state.epoch = epoch
        state.judge(value, patience)
        if state.stopped_early:
            return epoch + 1
    return None


@pytest.mark.parametrize(
    ("fitness", "patience", "stop"),
    [
        ([0.1, 0.2, 0.1, 0.1, 0.1], 2, 4),
        ([0.1, 0.2, 0.1, 0.3, 0.1, 0.3], 2, 6),  # equal is not better
        ([0.1] * 5, 0, None),
        ([0.0] * 9, 2, None),  # nothing is found yet
        ([0.0] * 5 + [0.1, 0.0], 2, None),
        ([0.0] * 5 + [0.1, 0.0, 0.0], 2, 8),  # it was found, and is lost
    ],
)
def test_patience_begins_with_the_first_object_that_is_found(
    fitness: list[float], patience: int, stop: int | None
) -> None:
    assert stops_after(fitness, patience) == stop


def test_the_first_epoch_is_the_best_although_nothing_is_found() -> None:
    state = TrainState(total_steps=100, epochs=100, num_images=8, global_batch=8, seed=0)
    assert state.judge(0.0, 5)
    state.epoch = 1
    assert not state.judge(0.0, 5)
    state.epoch = 2
    assert state.judge(0.1, 5)
    assert (state.best_epoch, state.best_fitness) == (2, 0.1)
