"""Fits a rank's threads on a CPU to the load of other programs, which would make all of them wait for the slowest one."""

import logging
import time

import torch

from dsyolo.cluster.world import set_threads
from dsyolo.config.messages import counted
from dsyolo.tracking.other_load import OtherLoad, threads_beside
from dsyolo.trainer.hooks.base import Hook, StepResult

EVERY_S = 2.0
SHARE = 0.005  # of the time, at most, for measuring: it looks at every process of the machine
LESS_AFTER, MORE_AFTER = (
    2,
    4,
)  # measurements in a row: going down is urgent, and up would be undone by short pauses
log = logging.getLogger(__name__)


class OtherLoadHook(Hook):
    """Chooses the threads again when others' load changes; where the user chose them, warns once.

    Args:
        chosen: the option --threads; None: chosen here.
    """

    def __init__(self, load: OtherLoad, chosen: int | None) -> None:
        self._load, self._chosen = load, chosen
        self._next = 0.0
        self._in_a_row, self._wanted = 0, 0
        self._has_warned = False

    def open(self) -> None:
        self._load.take()  # what came before is not training
        self._next = time.monotonic() + EVERY_S

    def after_step(self, result: StepResult) -> None:
        if time.monotonic() < self._next:
            return
        load = self._load.take()
        self._next = time.monotonic() + max(EVERY_S, self._load.cost_s / SHARE)
        if load is not None:
            self.judge(load)

    def judge(self, load: float) -> None:
        """Take a measurement of others' load, in cores, and act when several agree."""
        now, wanted = torch.get_num_threads(), threads_beside(load, self.trainer.world)
        self._in_a_row = self._in_a_row + 1 if wanted == self._wanted else 1
        self._wanted = wanted
        if wanted == now or self._in_a_row < (LESS_AFTER if wanted < now else MORE_AFTER):
            return
        busy = f"other programs keep {load:.1f} of {self._load.num_cores} cores busy"
        if self._chosen is None:
            set_threads(self.trainer.world, wanted)
            threads = f"{counted(wanted, 'thread')} a rank from now on, {now} before"
            log.info("%s: %s (--threads N fixes them)", busy, threads)
        elif wanted < now and not self._has_warned:
            self._has_warned = True
            log.warning("%s, and all %d threads wait for the slowest: try --threads %d.", busy, now, wanted)
