"""The progress of a run: part of a checkpoint's manifest, and read by trackers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from dsyolo.base.batch import StepStats


class TrainState(BaseModel):
    """The progress of a run, which changes with every step."""

    model_config = ConfigDict(extra="forbid")

    total_steps: int
    epochs: int
    num_images: int  # images of the training split
    global_batch: int
    seed: int
    step: int = 0  # optimizer steps done
    epoch: int = 0  # 0-based, under way
    images_seen: int = 0  # position in the sampler's sequence
    best_fitness: float = -1.0
    best_epoch: int = -1
    stopped_early: bool = False
    skipped_in_a_row: int = 0  # the last steps, up to now
    tracking: dict[str, Any] = {}  # the states of all hooks; the key in checkpoints stays
    settings: dict[str, Any] = {}  # what a resumed run must repeat, by the names that users know
    schedule_epochs: int = (
        0  # over which the lr comes down; less than `epochs` in a run that was extended, 0: equal
    )

    def advance(self, stats: StepStats) -> TrainState:
        """Count one more optimizer step."""
        self.step += 1
        self.images_seen += stats.num_images
        self.skipped_in_a_row = 0 if stats.was_applied else self.skipped_in_a_row + 1
        return self

    def epoch_start_step(self, epoch: int) -> int:
        """Return the first step whose images all belong to `epoch` or later, as `StepSampler` does."""
        return -(-epoch * self.num_images // self.global_batch)

    def judge(self, fitness: float, patience: int) -> bool:
        """Record an epoch's fitness. Return whether it is the best; set `stopped_early` after `patience` epochs without one."""
        is_best = fitness > self.best_fitness
        if is_best:
            self.best_fitness, self.best_epoch = fitness, self.epoch
        self.stopped_early = self.is_out_of_patience(patience, self.epoch)
        return is_best

    def is_out_of_patience(self, patience: int, epoch: int) -> bool:
        """Return whether `patience` epochs up to `epoch` brought no better fitness; 0 is endless.

        Epochs before the first object is detected (fitness 0) do not count: a large or difficult data set has many.
        """
        return 0 < patience <= epoch - self.best_epoch and self.best_fitness > 0
