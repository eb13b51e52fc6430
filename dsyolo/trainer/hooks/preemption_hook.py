"""Stops the training on all ranks at the same step once one of them was asked to."""

from dsyolo.cluster.preemption import PreemptionHandler
from dsyolo.trainer.hooks.base import Hook, StepResult


class PreemptionHook(Hook):
    """Raises Preempted after a step, or between two batches of a validation."""

    def __init__(self, handler: PreemptionHandler) -> None:
        self._handler = handler

    def after_step(self, result: StepResult) -> None:
        self._handler.raise_if_requested()

    def before_validation_batch(self) -> None:
        self._handler.raise_if_requested()
