"""The processes that make batches: forked safely beside threads, quiet, and heard to be alive."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import cv2

WORKER_GRACE_S = 25  # launchers kill what has not ended 30 s after SIGTERM
ALIVE_S, TRIES = 20, 3  # a fork takes milliseconds; on a busy machine it may wait for a core


def of_loader(num_workers: int) -> dict[str, Any]:
    """What a DataLoader needs to be told for workers of ours."""
    if not num_workers:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "worker_init_fn": _settle,
        # elsewhere as Python does: beside the system libraries of macOS a fork is not safe
        "multiprocessing_context": _Forks() if sys.platform.startswith("linux") else None,
    }


def limit_opencv() -> None:
    """Keeps OpenCV to one thread in this process, and ends the others that it has.

    Before every fork: a worker whose parent had OpenCV's threads running waits for them for ever, since they are
    not in it. And in a worker they would fight over the cores with the other workers.
    """
    cv2.setNumThreads(1)


def _settle(_worker: int) -> None:
    # SIGTERM asks the training to stop between two steps, and launchers send it to workers too: they end later.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
    limit_opencv()


class Worker(ForkProcess):
    """Says that it lives; one that says nothing is ended and forked again.

    A thread of gloo that hands back a tensor takes the interpreter's list of threads for some microseconds. A worker
    that is forked just then waits for it for ever, before its first line runs: seen once in some thousand forks under
    ZeRO 3 with CPython 3.11.
    """

    @staticmethod
    def _Popen(process: Worker) -> Any:
        for _ in range(TRIES):
            hears, process.tells = os.pipe()
            popen = ForkProcess._Popen(process)
            os.close(process.tells)
            lives = wait([hears], ALIVE_S)  # also where it has died
            os.close(hears)
            if lives:
                return popen
            popen.kill()
            popen.wait()
        raise RuntimeError(f"{TRIES} workers of the loader in turn gave no sign of life")

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        os.write(self.tells, b"lives")
        os.close(self.tells)
        return super()._bootstrap(*args, **options)


class _Forks(ForkContext):
    """Forked workers share the lists of the data set with their parent."""

    Process = Worker
