"""Loader worker processes: forked safely in a process with threads, checked to be alive, and ended with their parent."""

import ctypes
import os
import signal
import sys
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import cv2

WORKER_GRACE_S = 25  # launchers kill what has not ended 30 s after SIGTERM
ALIVE_S, TRIES = 20, 3  # a fork takes milliseconds, but may wait for a core on a busy machine
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def worker_options(num_workers: int) -> dict[str, Any]:
    """Return the arguments that give a DataLoader these workers."""
    _limit_opencv()
    if not num_workers:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "worker_init_fn": _settle,
        # Elsewhere the platform's default: forking is not safe with the system libraries of macOS.
        "multiprocessing_context": _Forks() if sys.platform.startswith("linux") else None,
    }


def _limit_opencv() -> None:
    """Limit OpenCV to one thread in this process, and end its others.

    It comes before every fork: threads are not forked, and a worker would wait forever for those of its parent. In a
    worker they would compete with the other workers for the cores.
    """
    cv2.setNumThreads(1)


def _settle(_worker: int) -> None:
    # Launchers send SIGTERM to workers too. The training stops between two steps, so workers must outlive it.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them too; they end with their rank
    _limit_opencv()


class Worker(ForkProcess):
    """A worker that signals that it is alive; one that does not is killed and forked again.

    A gloo thread that returns a tensor holds the interpreter's list of threads for some microseconds. A worker forked
    in that moment waits for it forever, before its first line runs: seen once in some thousand forks under ZeRO 3 with
    CPython 3.11.

    The kernel kills it when its parent is killed. Torch's own check asks who the parent is when the worker is ready, and
    one that was orphaned before stays forever: seen once when a rank was killed at the start of a validation.
    """

    signal_fd: int
    libc: ctypes.CDLL
    _parent_pid: int  # by multiprocessing

    @staticmethod
    def _Popen(process: Any) -> Any:
        _limit_opencv()
        process.libc = ctypes.CDLL(None)  # here, since a forked process may find the dynamic loader locked
        for _ in range(TRIES):
            alive_fd, process.signal_fd = os.pipe()
            popen = ForkProcess._Popen(process)
            os.close(process.signal_fd)
            is_alive = wait([alive_fd], ALIVE_S)  # returns too if it has died
            os.close(alive_fd)
            if is_alive:
                return popen
            popen.kill()
            popen.wait()
        what = f"{TRIES} loader workers in a row failed to start within {ALIVE_S} s"
        raise RuntimeError(f"{what}. Lower --workers or check memory.")

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        self.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent_pid:  # died before
            os._exit(1)
        os.write(self.signal_fd, b"lives")
        os.close(self.signal_fd)
        return super()._bootstrap(*args, **options)  # type: ignore[misc]  # missing in typeshed


class _Forks(ForkContext):
    """Forked workers share the index of the data set with their parent."""

    Process = Worker
