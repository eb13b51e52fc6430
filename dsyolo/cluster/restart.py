"""Restarts this rank's program in its own process, as all ranks do after one of them ran out of memory.

The launcher does not notice: process id, rank and terminal stay, and all memory is freed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dsyolo.base.environment import count_restart


def start_again(arguments: Sequence[str]) -> NoReturn:
    """Run the same command line with `arguments` appended; of an option that is given twice the last value counts."""
    for worker in multiprocessing.active_children():  # they would not notice, since their parent's id stays
        worker.kill()
    for handle in map(int, os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")):
        if handle > 2:  # listening ports, files of the device
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(handle, False)
    count_restart()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*sys.orig_argv, *arguments])
