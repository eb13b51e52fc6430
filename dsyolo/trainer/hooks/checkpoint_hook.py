"""Saves checkpoints and weights: after epochs, and when the run is preempted."""

import logging

from dsyolo.base.resume_words import way_on
from dsyolo.checkpoint.checkpointer import Checkpointer
from dsyolo.cluster import collectives, preemption
from dsyolo.engine.ema import Ema
from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.trainer.hooks.base import ExitStatus, Hook, StopTraining

NOT_SAVED = 74  # exit status: EX_IOERR of sysexits.h
log = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every `save_every` epochs, after the best and the last one.

    Args:
        artifacts: writes the weights files; None off the main process.
    """

    def __init__(
        self, checkpointer: Checkpointer, ema: Ema, artifacts: RunArtifacts | None, save_every: int
    ) -> None:
        self._checkpointer, self._ema = checkpointer, ema
        self._artifacts, self._save_every = artifacts, save_every

    def between_epochs(self) -> None:
        trainer = self.trainer
        is_best = trainer.validation is not None and trainer.validation.is_best
        if not (is_best or trainer.is_last_epoch or trainer.state.epoch % self._save_every == 0):
            return
        problem = self._save(is_best)
        if problem and trainer.is_last_epoch:
            raise StopTraining(NOT_SAVED, f"{problem} Make room, and go on by {way_on()}.")
        if problem and trainer.world.is_main_process:
            log.warning("%s The run goes on and tries again at the next save: make room until then.", problem)

    def _save(self, is_best: bool) -> str | None:
        """Save weights and checkpoint; return the problem of any rank, the same on all."""
        trainer = self.trainer
        trainer.state.tracking = trainer.hooks.state_dict()
        with trainer.hooks.around("checkpoint"):
            weights = self._ema.state_dict(keep=self._artifacts is not None)
            own = self._artifacts.save_weights(weights, is_best) if self._artifacts else None
            problem = collectives.first_problem_of_any_rank(own)
            return self._checkpointer.save(trainer.state, is_best=is_best) or problem

    def preempted(self) -> ExitStatus:
        """Save after a step, or in the midst of a validation, which is done again after the resume."""
        state = self.trainer.state
        state.tracking = self.trainer.hooks.state_dict()
        problem = self._checkpointer.save(state)
        if problem:
            message = (
                f"{problem} {way_on().capitalize()} resumes from the previous checkpoint, if there is one."
            )
            return ExitStatus(NOT_SAVED, message)
        status = self.trainer.stop_status
        if status == preemption.INTERRUPTED:
            folder = self.trainer.spec.folder
            return ExitStatus(
                status, f"Interrupted: saved after step {state.step}. To go on: --resume {folder}"
            )
        return ExitStatus(
            status, f"Preempted: saved after step {state.step}. {way_on().capitalize()} resumes the run."
        )
