"""Keeps the run's folder: pictures of predictions, and the summary at the end. On the main process alone."""

import time
from typing import Any

from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.trainer.hooks.base import Hook, Validation


class ArtifactsHook(Hook):
    """Draws each validation's predictions, and reports the best one after a training that ended well."""

    def __init__(self, artifacts: RunArtifacts) -> None:
        self._artifacts = artifacts

    def open(self) -> None:
        tracking = self.trainer.state.tracking
        self._artifacts.load_state_dict(tracking)
        before_s = tracking.get("elapsed_s", 0.0)  # before the run was resumed
        self._start = time.perf_counter() - (before_s if isinstance(before_s, (int, float)) else 0.0)

    def after_validation(self, validation: Validation) -> None:
        trainer = self.trainer
        self._artifacts.validated(
            validation.metrics, validation.detections, validation.is_best, trainer.state.epoch
        )

    def state_dict(self) -> dict[str, Any]:
        return {"elapsed_s": time.perf_counter() - self._start, **self._artifacts.state_dict()}

    def close(self) -> None:
        if self.trainer.end and not self.trainer.end.status:
            self._artifacts.report(self.trainer.state.epoch, time.perf_counter() - self._start)
