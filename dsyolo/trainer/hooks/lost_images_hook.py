"""Ends a training whose images vanish while it runs, instead of learning the grey that takes their place."""

import logging
from typing import NamedTuple

from dsyolo.base.resume_words import same_command
from dsyolo.cluster.delayed_sum import DelayedSum
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.read_counts import Reads
from dsyolo.trainer.hooks.base import Hook, StepResult, StopTraining, Validation

log = logging.getLogger(__name__)
LOST = 66  # exit status: EX_NOINPUT of sysexits.h
MAX_SHARE = 0.01
# A rank alone may have few samples, of which a single one is a large share: only more failures than chance brings count.
MIN_OF_ONE_RANK = 10


class _Counts(NamedTuple):
    """Reads of images on all ranks since the epoch or the validation began."""

    num_failed: int
    num_reads: int
    num_expected: int  # at least so many in an epoch
    num_ranks_above: int  # ranks above the share of their own reads

    @property
    def is_too_much(self) -> bool:
        return self.num_ranks_above > 0 or _is_above(self.num_failed, self.num_reads, self.num_expected)


def _is_above(num_failed: int, num_reads: int, num_expected: int) -> bool:
    return num_failed > MAX_SHARE * max(num_reads, num_expected)


def _own(start: Reads, now: Reads, num_expected: int) -> _Counts:
    num_failed, num_reads = now.num_failed - start.num_failed, now.num_reads - start.num_reads
    is_above = num_failed >= MIN_OF_ONE_RANK and _is_above(num_failed, num_reads, num_expected)
    return _Counts(num_failed, num_reads, num_expected, int(is_above))


class LostImagesHook(Hook):
    """Counts images that could not be read any more, and ends all ranks after the same step above a share of 1 %.

    It is the share of all ranks' reads in an epoch (of a validation: its reads), or of one rank's own, so that a host
    that alone has lost its disk is noticed among any number of others.
    """

    _sum: DelayedSum
    _start: Reads  # when the epoch began
    _seen: Reads  # at the last exchange
    _val_start: Reads
    _counts: _Counts | None = None

    def open(self) -> None:
        self._sum = DelayedSum(self.trainer.world)
        self._start = self._seen = self._train_set.counts.total()
        self._val_start = self._val_set.counts.total()

    @property
    def _train_set(self) -> DetectionDataset:
        return self.trainer.data.train_set

    @property
    def _val_set(self) -> DetectionDataset:
        return self.trainer.data.val_set

    def before_epoch(self) -> None:
        self._start = self._seen  # workers run ahead: what they read since belongs to this epoch

    def after_step(self, result: StepResult) -> None:
        self._end_if_too_many(self._sum.take(), self._train_set)
        sampler = self.trainer.data.sampler
        self._seen = self._train_set.counts.total()
        self._sum.start(_own(self._start, self._seen, -(-sampler.num_images // sampler.dp_size)))

    def after_validation(self, validation: Validation) -> None:
        self._end_if_too_many(self._sum.take(), self._train_set)
        now = self._val_set.counts.total()
        self._sum.start(_own(self._val_start, now, 0))
        self._val_start = now
        in_epoch = self._counts
        self._end_if_too_many(self._sum.take(), self._val_set)
        self._counts = in_epoch

    def after_epoch(self) -> None:
        self._end_if_too_many(self._sum.take(), self._train_set)
        counts = self._counts
        if counts and counts.num_failed and self.trainer.world.is_main_process:
            what = f"{counts.num_failed:,} of {counts.num_reads:,} reads of images failed"
            log.warning("Epoch %d: %s; grey images took their place.", self.trainer.epoch + 1, what)
        self._counts = None

    def finish(self) -> None:
        self._sum.take()

    def _end_if_too_many(self, numbers: list[int] | None, dataset: DetectionDataset) -> None:
        if numbers is None:
            return
        self._counts = counts = _Counts(*numbers)
        if not counts.is_too_much:
            return
        failed = dataset.counts.total().a_failed
        example = f", as of {dataset.index.path(failed)}" if failed is not None else ""
        raise StopTraining(
            LOST,
            f"The training stops at step {self.trainer.state.step}: {counts.num_failed:,} of {counts.num_reads:,} reads "
            f"of images failed{example}, and more than {MAX_SHARE:.0%} is not to be learned as grey. Restore the images, "
            f"then run {same_command()}, which continues from the last checkpoint.",
        )
