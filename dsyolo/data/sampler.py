"""The order of images, and the rank that gets each.

The samples of a run are one endless sequence: the shuffled images of epoch 0, then those of epoch 1, and so on.
Step k takes positions k * G .. (k + 1) * G - 1 of it, where G is the global batch. So batches are always full and
of one shape, every image comes exactly once per epoch on any number of ranks, and a run's position is one number:
the images seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class SampleKey(NamedTuple):
    """Everything that a training sample depends on, besides the run's seed."""

    epoch: int
    image_index: int
    size_px: int


@dataclass(frozen=True)
class StepSampler:
    """The order of a run's samples, and this rank's share of them."""

    num_images: int  # images of the data set, at least 1
    seed: int
    global_batch: int  # images per optimizer step over all ranks: micro_batch x accumulation x dp_size
    micro_batch: int
    dp_rank: int
    dp_size: int

    def __post_init__(self) -> None:
        assert self.global_batch % (self.micro_batch * self.dp_size) == 0

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.dp_size)

    def epoch_start_step(self, epoch: int) -> int:
        """Return the first step whose images all belong to `epoch` or later; the steps before it train earlier epochs."""
        return -(-epoch * self.num_images // self.global_batch)

    def at(self, position: int) -> tuple[int, int]:
        """Return (epoch, image index) of a position in the sequence."""
        epoch, place = divmod(position, self.num_images)
        return epoch, int(_shuffled(self.seed, epoch, self.num_images)[place])

    def micro_batches(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """Yield this rank's micro-batches of a step, as (epoch, index).

        Groups of `micro_batch` consecutive samples are dealt to the ranks in turn. So the groups, and with them the
        statistics of BatchNorm, are the same on any number of ranks.
        """
        for turn in range(self.accumulation):
            group = turn * self.dp_size + self.dp_rank
            start = step * self.global_batch + group * self.micro_batch
            yield [self.at(position) for position in range(start, start + self.micro_batch)]


@lru_cache(maxsize=4)  # a step spans at most two epochs, unless the data set is tiny
def _shuffled(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_images)
