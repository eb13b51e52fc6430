"""Ends a training that diverges: too many steps in a row whose loss or gradients are not finite."""

from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.trainer.hooks.base import Hook, StepResult, StopTraining

DIVERGED = 65  # exit status: EX_DATAERR of sysexits.h


class DivergenceHook(Hook):
    """Counts skipped steps; `artifacts` (None off the main process) gets the names of their images."""

    def __init__(self, max_skipped_steps: int, artifacts: RunArtifacts | None) -> None:
        self._max, self._artifacts = max_skipped_steps, artifacts

    def after_step(self, result: StepResult) -> None:
        state = self.trainer.state
        if state.skipped_in_a_row < self._max:
            return
        if self._artifacts:
            names = self.trainer.data.image_names(state.step - state.skipped_in_a_row, state.step)
            self._artifacts.write_json("skipped_steps.json", names)
        folder = self.trainer.spec.folder
        raise StopTraining(
            DIVERGED,
            f"The training stops at step {state.step}: loss or gradients of the last {state.skipped_in_a_row} steps "
            f"were not finite, so none changed the weights; {folder / 'skipped_steps.json'} names their images. "
            "Lower optimizer.params.lr, or check their labels; --max_skipped_steps allows more.",
        )
