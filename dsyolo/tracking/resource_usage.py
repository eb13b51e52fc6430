"""CPU, memory, network and GPU use of a rank and its machine, read at the ends of steps: there is no thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import psutil

from dsyolo.tracking.nvml import GpuUse

GAUGE_INTERVAL_S = 0.5  # at least, between two readings of what is not a counter


class ResourceUsage:
    """The use of one rank; the first rank of a machine also reads the machine's.

    Args:
        of_machine: whether to read it.
        gpu: returns the use of the rank's GPU, or None.
    """

    def __init__(self, *, of_machine: bool, gpu: Callable[[], GpuUse | None] = lambda: None) -> None:
        self._of_machine, self._gpu = of_machine, gpu
        self._own = psutil.Process()
        self._processes: dict[int, psutil.Process] = {}
        self._next_gauges = 0.0

    def look(self) -> dict[str, Any]:
        """Return counters since the machine or the process started, and what is in use now."""
        seen: dict[str, Any] = {"cpu_s": self._own_cpu_s()}
        if self._of_machine:
            times = psutil.cpu_times()
            net = psutil.net_io_counters(pernic=True)
            inside = net.pop("lo", None)
            seen |= {
                "machine_cpu_s": sum(times) - times.idle - getattr(times, "iowait", 0.0) - _guest_s(times),
                "sent": sum(nic.bytes_sent for nic in net.values()),
                "received": sum(nic.bytes_recv for nic in net.values()),
                "inside": inside.bytes_sent if inside else 0,
            }
        if time.monotonic() >= self._next_gauges:
            self._next_gauges = time.monotonic() + GAUGE_INTERVAL_S
            if self._of_machine:
                seen["memory_bytes"] = psutil.virtual_memory().used
            if use := self._gpu():
                seen["gpu"] = use._asdict()
        return seen

    def _own_cpu_s(self) -> float:
        """Return the CPU seconds of this process and its loader workers."""
        total = 0.0
        workers = [child.pid for child in multiprocessing.active_children() if child.pid]
        for pid in (self._own.pid, *workers):
            with contextlib.suppress(psutil.Error):  # a worker may have ended meanwhile
                process = self._processes.setdefault(pid, psutil.Process(pid))
                times = process.cpu_times()
                total += times.user + times.system
        return total


def _guest_s(times: Any) -> float:
    """Return guests' time, which Linux counts in user and nice as well."""
    return getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
