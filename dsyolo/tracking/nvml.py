"""Utilization, memory and power of a GPU from NVIDIA's driver, through nvidia-ml-py. Both may be missing."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple


class GpuUse(NamedTuple):
    """The driver's last sample, which spans 1/6 to 1 s."""

    busy: float  # share of the time in which some kernel ran
    memory_busy: float  # share of the time in which memory was read or written
    memory_bytes: int  # of all processes
    power_w: float


class Gpu:
    """One GPU.

    Args:
        nvml: as `load_nvml` returns it.
        uuid: as torch has it. An index will not do: CUDA_VISIBLE_DEVICES and the driver count differently.
    """

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml, self._handle = nvml, None
        with contextlib.suppress(nvml.NVMLError):
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

    def use(self) -> GpuUse | None:
        """Return what the GPU does now; None where the driver does not report it, as on some virtual GPUs."""
        if self._handle is None:
            return None
        try:
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            milliwatts = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
        except self._nvml.NVMLError:
            return None
        return GpuUse(rates.gpu / 100, rates.memory / 100, memory.used, milliwatts / 1000)


def load_nvml() -> Any | None:
    """Return the module `pynvml`, initialized; None without a driver or without the package."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
