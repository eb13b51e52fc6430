"""How far a run is: what a checkpoint's JSON says of it, and trackers read."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from dsyolo.base.batch import StepStats


class TrainState(BaseModel):
    """How far a run is. Its attributes change; the trackers read them."""

    model_config = ConfigDict(extra="forbid")

    total_steps: int
    epochs: int
    num_images: int  # of the training split
    global_batch: int
    seed: int
    step: int = 0  # optimizer steps done
    epoch: int = 0  # 0-based, the one that is being trained
    images_seen: int = 0  # position in the stream of samples
    best_fitness: float = -1.0
    best_epoch: int = -1
    stopped_early: bool = False
    skipped_in_a_row: int = 0  # steps, up to now
    tracking: dict[str, Any] = {}  # what the tracker wants back
    settings: dict[str, Any] = {}  # what must be the same when the run goes on, by the name that users know

    def advance(self, stats: StepStats) -> TrainState:
        """One more optimizer step."""
        self.step += 1
        self.images_seen += stats.num_images
        self.skipped_in_a_row = 0 if stats.was_applied else self.skipped_in_a_row + 1
        return self

    def judge(self, fitness: float, patience: int) -> bool:
        """Notes an epoch's fitness and tells whether it is the best; sets `stopped_early` after `patience` epochs without."""
        is_best = fitness > self.best_fitness
        if is_best:
            self.best_fitness, self.best_epoch = fitness, self.epoch
        self.stopped_early = patience > 0 and self.epoch - self.best_epoch >= patience
        return is_best
