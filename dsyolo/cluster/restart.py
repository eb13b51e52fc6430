"""Starts this rank's program again in its own process, as all ranks do after one of them ran out of memory.

The launcher sees nothing of it: process, place among the ranks and terminal stay, and all memory is given back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsyolo.base.environment import count_restart


def start_again(words: Sequence[str]) -> NoReturn:
    """The same command line with `words` behind it; an option that stands in it twice counts as the last one says."""
    for worker in multiprocessing.active_children():  # they would not notice: their parent's id stays
        worker.kill()
    for handle in map(int, os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")):
        if handle > 2:  # ports that this process listens at, files of the device
            with contextlib.suppress(OSError):  # that of the listing itself
                os.set_inheritable(handle, False)
    count_restart()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*sys.orig_argv, *words])
