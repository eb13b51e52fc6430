"""The load that other programs put on this rank's cores, and the threads that are worth while beside it."""

import contextlib
import math
import os
import time
from collections.abc import Sequence

import psutil

from dsyolo.base.launcher import parent_of_all_ranks
from dsyolo.cluster.world import World, cores_of_rank

LEAST_S = 0.2  # a shorter time has too few ticks of the kernel's clock, 0.01 s each
WORTH = 0.55  # share of a core that must be free for a thread: all threads wait for the slowest one


class OtherLoad:
    """Counts the cores that programs other than this machine's ranks and their workers keep busy.

    Where the system has no counters for each core, it finds none.
    """

    def __init__(self, world: World) -> None:
        own = os.getpid() if world.local_size == 1 else os.getppid()  # the launcher of all ranks here
        self._roots = [psutil.Process(own)]
        affinity = getattr(os, "sched_getaffinity", lambda _: range(psutil.cpu_count() or 1))
        self._cores = sorted(affinity(0))
        self.cost_s = 0.0  # of the last look
        self._since, self._busy_s, self._own_s = self._look()

    def count_ranks(self, pids: Sequence[int]) -> None:
        """Count these processes of this machine's ranks as this run's, where no launcher has started them all.

        Begin to measure again then: so far ranks from several shells were others to each other.
        """
        if len(pids) == 1 or parent_of_all_ranks():
            return
        self._roots = []
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                self._roots.append(psutil.Process(pid))
        self._since, self._busy_s, self._own_s = self._look()

    @property
    def num_cores(self) -> int:
        """Return the cores of this machine that this process may use."""
        return len(self._cores)

    def take(self) -> float | None:
        """Return the cores that others kept busy since the last call; None, and count on, if that is too short a time."""
        if time.monotonic() - self._since < LEAST_S:
            return None
        now, busy_s, own_s = self._look()
        # A worker that has ended may not be counted yet.
        others_s = busy_s - self._busy_s - max(own_s - self._own_s, 0.0)
        load = others_s / (now - self._since)
        self._since, self._busy_s, self._own_s = now, busy_s, own_s
        return min(max(load, 0.0), float(self.num_cores))

    def _look(self) -> tuple[float, float, float]:
        """Return now, the busy seconds of all cores, and those of this run."""
        begin = time.monotonic()
        busy_s = 0.0
        with contextlib.suppress(OSError, RuntimeError):
            times = psutil.cpu_times(percpu=True)
            busy_s = sum(_busy_s(times[core]._asdict()) for core in self._cores if core < len(times))
        own_s = 0.0
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                for process in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                        own_s += sum(process.cpu_times()[:4])  # with the children that it has waited for
        self.cost_s = time.monotonic() - begin
        return (begin + time.monotonic()) / 2, busy_s, own_s


def _busy_s(times: dict[str, float]) -> float:
    """Return a core's busy seconds: with those that a hypervisor gave to other machines, without guests' (in user)."""
    return sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def threads_beside(load: float, world: World) -> int:
    """Return the threads of a rank that are worth while beside others' load, in cores of this machine."""
    share = cores_of_rank(world)
    return max(1, min(share, math.floor(share - load / world.local_size + 1 - WORTH)))
