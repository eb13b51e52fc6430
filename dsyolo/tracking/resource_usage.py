"""What a rank and its machine use: processors, memory, network, GPU. Counters are read at steps' ends; there is no thread."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import psutil

from dsyolo.tracking.nvml import GpuUse

LOOK_S = 0.5  # at least between two looks at what is not a counter


class ResourceUsage:
    """Of one rank; the first of a machine also looks at the machine.

    Args:
        of_machine: whether to.
        gpu: tells what the rank's GPU does; None where it has none or nobody tells.
    """

    def __init__(self, *, of_machine: bool, gpu: Callable[[], GpuUse | None] = lambda: None) -> None:
        self._of_machine, self._gpu = of_machine, gpu
        self._processes = {psutil.Process().pid: psutil.Process()}
        self._next_look = 0.0

    def look(self) -> dict[str, Any]:
        """Counters since the machine or the process started, and what is used now."""
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
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            if self._of_machine:
                seen["memory_bytes"] = psutil.virtual_memory().used
            if use := self._gpu():
                seen["gpu"] = use._asdict()
        return seen

    def _own_cpu_s(self) -> float:
        """Of this process and the workers of its loaders."""
        pids = [child.pid for child in multiprocessing.active_children()]
        total = 0.0
        for pid in [*pids, *self._processes]:
            try:
                process = (
                    self._processes.setdefault(pid, psutil.Process(pid))
                    if pid in pids
                    else self._processes[pid]
                )
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.Error:
                continue  # a worker that has ended meanwhile
        return total


def _guest_s(times: Any) -> float:
    """Linux counts it in user and nice as well."""
    return getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
