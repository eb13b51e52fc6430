"""The training loop: epochs, steps and validations; everything else is a hook."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsyolo.base.batch import EvalBatch
from dsyolo.cluster.preemption import Preempted
from dsyolo.detection.evaluator import validate
from dsyolo.detection.postprocess import PostProcessor
from dsyolo.detection.validation_loss import PredictBatch, Prediction
from dsyolo.trainer.hooks.base import ExitStatus, RunningTrainer, StepResult, StopTraining, Validation

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Trainer(RunningTrainer):
    """Trains a run from where it is to its end.

    Args:
        predict: decoded boxes and losses of a batch, by the engine.
    """

    predict: PredictBatch = field(kw_only=True)

    def fit(self) -> ExitStatus:
        """Train to the end of the last epoch, or until a hook or a signal stops the run."""
        with self.hooks.running(self):
            end = ExitStatus()
            try:
                for epoch in self.epochs():
                    self._train_epoch(epoch)
                self._log_early_stop()
            except StopTraining as stop:
                end = stop.end
            except Preempted as request:  # with the weights of the last step in place
                self.stop_status = request.status
                ends = (end for end in self.hooks.call("preempted") if isinstance(end, ExitStatus))
                end = next(ends, ExitStatus(request.status, "Preempted."))
            self.hooks.call("finish")
            self.end = end
        return end

    def evaluate(self) -> Validation:
        """Validate on all ranks together, and judge the result."""
        config = self.spec.config
        post_process = PostProcessor(config.score_threshold, config.iou_threshold, config.max_detections)
        with self.hooks.around("validation"):
            metrics, found = validate(
                self._predict_batch,
                self.data.val,
                post_process,
                self.spec.data.names,
                self.engine.all_gather,
                self.engine.loss,
            )
        return Validation(metrics, found, self.state.judge(metrics.fitness, config.patience))

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, without those of a data set smaller than a batch that an earlier step trained."""
        epochs, sampler = self.spec.config.epochs, self.data.sampler
        for epoch in range(self.state.epoch, epochs):
            if self.state.stopped_early:
                return
            is_empty = sampler.epoch_start_step(epoch) == sampler.epoch_start_step(epoch + 1)
            self.state.epoch = self.epoch = epoch
            if not is_empty or epoch + 1 == epochs:
                yield epoch

    def _log_early_stop(self) -> None:
        state, patience = self.state, self.spec.config.patience
        if not (state.stopped_early and state.epoch < state.epochs and self.world.is_main_process):
            return
        reason = f"no better fitness for {state.epoch - 1 - state.best_epoch} epochs (--patience {patience})"
        if not state.is_out_of_patience(patience, state.epoch - 1):
            reason = "a hook asked for it"
        text = f"Stopped early after epoch {state.epoch} of {state.epochs}: {reason}."
        if state.best_epoch >= 0:
            text += f" The best is epoch {state.best_epoch + 1}, with fitness {state.best_fitness:.4f}."
        log.info("%s", text)

    def _train_epoch(self, epoch: int) -> None:
        self.hooks.call("before_epoch")
        for batches in self.hooks.steps(self.data.train.steps(epoch, self.state.step)):
            self.hooks.call("before_step")
            with self.hooks.around("step"):
                stats, lr = self.engine.train_step(batches, self.state.step)
            self.state.advance(stats)
            self.hooks.call("after_step", StepResult(stats, lr, self.data.train.take_wait_s()))
        self.validation, self.figures = None, {}
        if (epoch + 1) % self.spec.config.val_every == 0 or epoch + 1 == self.spec.config.epochs:
            self.validation = self.evaluate()
            self.hooks.call("after_validation", self.validation)
        self.hooks.call("after_epoch")
        self.state.epoch = epoch + 1
        self.hooks.call("between_epochs")

    def _predict_batch(self, batch: EvalBatch) -> Prediction:
        self.hooks.call("before_validation_batch")
        return self.predict(batch)
