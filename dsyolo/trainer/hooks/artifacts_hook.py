"""Keeps the run's folder: pictures of predictions, and the summary at the end. On the main process alone."""

from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.trainer.hooks.base import Hook, Validation


class ArtifactsHook(Hook):
    """Draws each validation's predictions, and reports the best one after a training that ended well."""

    def __init__(self, artifacts: RunArtifacts) -> None:
        self._artifacts = artifacts

    def after_validation(self, validation: Validation) -> None:
        self._artifacts.validated(validation.metrics, validation.detections, validation.is_best)

    def close(self) -> None:
        if self.trainer.end and not self.trainer.end.status:
            self._artifacts.report()
