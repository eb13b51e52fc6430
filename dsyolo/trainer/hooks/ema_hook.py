"""Averages the weights after each step, and validates with the average."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dsyolo.engine.ema import Ema
from dsyolo.trainer.hooks.base import Hook, Part, StepResult


class EmaHook(Hook):
    """Updates `ema` after each step that was applied."""

    def __init__(self, ema: Ema) -> None:
        self._ema = ema

    def after_step(self, result: StepResult) -> None:
        if result.stats.was_applied:
            self._ema.update()

    def around(self, part: Part) -> AbstractContextManager[Any]:
        return self._ema.swapped() if part == "validation" else nullcontext()
