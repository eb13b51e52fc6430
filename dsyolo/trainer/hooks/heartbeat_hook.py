"""Tells the watchdog where this rank is, so that a late or lost rank can be named with what it was doing."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dsyolo.cluster.watchdog import Watchdog
from dsyolo.trainer.hooks.base import Hook, Part, StepResult

VALIDATING = "validating"


class HeartbeatHook(Hook):
    """Reports each step, validation batch and checkpoint as progress."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def before_step(self) -> None:
        self._watchdog.at(f"training step {self.trainer.state.step + 1}")

    def after_step(self, result: StepResult) -> None:
        self._watchdog.at(f"loading step {self.trainer.state.step + 1}")

    def before_validation_batch(self) -> None:
        self._watchdog.at(VALIDATING)

    def around(self, part: Part) -> AbstractContextManager[Any]:
        if part == "checkpoint":
            self._watchdog.at("saving")
        return nullcontext()
