"""Counts the images that a data set was asked for, and those that could no longer be read, over its loader workers."""

import mmap
from typing import NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

MAX_WORKERS = 1023


class Reads(NamedTuple):
    """Reads of images so far, by this process and its workers."""

    num_reads: int
    num_failed: int
    a_failed: int | None  # index of one of these images


class ReadCounts:
    """Counters in memory that forked workers share with their parent. Each process writes to its own row.

    A copy that was pickled counts for itself.
    """

    def __init__(self) -> None:
        # Anonymous, so it needs no room in /dev/shm. Rows: reads, failed ones, 1 + index of one of these.
        self._rows = np.frombuffer(mmap.mmap(-1, (MAX_WORKERS + 1) * 3 * 8), np.int64).reshape(-1, 3)

    def add(self, index: int, is_read: bool) -> None:
        """Count one read of image `index`."""
        worker = get_worker_info()
        row = self._rows[0 if worker is None else 1 + worker.id % MAX_WORKERS]
        row[0] += 1
        if not is_read:
            row[1] += 1
            row[2] = index + 1

    def total(self) -> Reads:
        """Return the counts of all processes."""
        num_reads, num_failed = self._rows[:, :2].sum(0).tolist()
        failed = int(self._rows[:, 2].max())
        return Reads(num_reads, num_failed, failed - 1 if failed else None)

    def __reduce__(self) -> tuple[type["ReadCounts"], tuple[()]]:
        return ReadCounts, ()
