"""Reports figures of steps and epochs: progress bar, log lines, writers, curves. On the main process alone."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dsyolo.tracking.tracker import RunTracker
from dsyolo.trainer.hooks.base import Hook, Part, StepResult


class MetricsHook(Hook):
    """Passes what happens to `tracker`."""

    def __init__(self, tracker: RunTracker) -> None:
        self._tracker = tracker

    def before_epoch(self) -> None:
        self._tracker.begin(self.trainer.state)

    def after_step(self, result: StepResult) -> None:
        self._tracker.step(self.trainer.state, result.stats, result.lr, result.data_wait_s)

    def after_epoch(self) -> None:
        validation = self.trainer.validation
        metrics = validation.metrics if validation else None
        self._tracker.epoch(self.trainer.state, metrics, self.trainer.figures)

    def around(self, part: Part) -> AbstractContextManager[Any]:
        if part == "validation":
            return self._tracker.display.part("validation", len(self.trainer.data.val))
        return self._tracker.display.part("checkpoint") if part == "checkpoint" else nullcontext()

    def before_validation_batch(self) -> None:
        self._tracker.display.advance()

    def state_dict(self) -> dict[str, Any]:
        return self._tracker.state()

    def close(self) -> None:
        self._tracker.close()
