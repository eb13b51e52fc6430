"""CPU, memory, network and GPU use of a rank and its machine, read at the ends of steps: there is no thread."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import psutil

GAUGE_INTERVAL_S = 0.5  # at least, between two readings of what is not a counter


class Gpu:
    """One GPU, read from NVIDIA's driver.

    Args:
        nvml: as `load_nvml` returns it.
        uuid: as torch has it. An index will not do: CUDA_VISIBLE_DEVICES and the driver count differently.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml, self._handle = nvml, None
        with contextlib.suppress(nvml.NVMLError):
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

    def use(self) -> dict[str, float] | None:
        """Return the driver's last sample, of 1/6 to 1 s; None if it reports none, as on some virtual GPUs.

        `busy` is the share of the time in which some kernel ran, `memory_busy` that in which memory was accessed,
        `memory_bytes` those of all processes.
        """
        if self._handle is None:
            return None
        try:
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            milliwatts = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
        except self._nvml.NVMLError:
            return None
        shares = {"busy": rates.gpu / 100, "memory_busy": rates.memory / 100}
        return {**shares, "memory_bytes": memory.used, "power_w": milliwatts / 1000}


def load_nvml() -> Any | None:
    """Return the initialized module `pynvml`; None without nvidia-ml-py or a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


class ResourceUsage:
    """The use of one rank, of its GPU by `gpu`, and if `of_machine` of its machine."""

    def __init__(
        self, *, of_machine: bool, gpu: Callable[[], dict[str, float] | None] = lambda: None
    ) -> None:
        self._of_machine, self._gpu = of_machine, gpu
        self._own = psutil.Process()
        self._processes: dict[int, psutil.Process] = {}
        self._next_gauges = 0.0

    def look(self) -> dict[str, Any]:
        """Return counters since the machine or the process started, and what is in use now."""
        seen: dict[str, Any] = {"cpu_s": self._own_cpu_s()}
        if self._of_machine:
            times = psutil.cpu_times()._asdict()
            # Linux counts guests' time in user and nice as well.
            idle_s = sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
            net = psutil.net_io_counters(pernic=True)
            inside = net.pop("lo", None)
            seen |= {
                "machine_cpu_s": sum(times.values()) - idle_s,
                "sent": sum(nic.bytes_sent for nic in net.values()),
                "received": sum(nic.bytes_recv for nic in net.values()),
                "inside": inside.bytes_sent if inside else 0,
            }
        if time.monotonic() >= self._next_gauges:
            self._next_gauges = time.monotonic() + GAUGE_INTERVAL_S
            if self._of_machine:
                seen["memory_bytes"] = psutil.virtual_memory().used
            if use := self._gpu():
                seen["gpu"] = use
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
