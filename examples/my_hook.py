"""A hook: ends the training once mAP50 reaches a target, and adds the distance to it to every epoch's row.

python dsyolo/train.py --data data.yaml --hook examples/my_hook.py:StopAtTarget
"""

import logging

from dsyolo.trainer.hooks.base import Hook, Validation

TARGET_MAP50 = 0.5
log = logging.getLogger(f"dsyolo.{__name__}")


class StopAtTarget(Hook):
    """All ranks get the same validation, so all of them stop at the same epoch."""

    def after_validation(self, validation: Validation) -> None:
        self.missing = TARGET_MAP50 - validation.metrics.map50
        if self.missing <= 0:
            self.trainer.state.stopped_early = True  # this epoch is saved, and is the last one
            if self.trainer.world.is_main_process:
                log.info("mAP50 reached %.2f", TARGET_MAP50)

    def after_epoch(self) -> None:
        if self.trainer.validation:
            self.trainer.figures["missing_map50"] = self.missing
