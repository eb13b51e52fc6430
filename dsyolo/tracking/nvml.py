"""What NVIDIA's driver tells of a GPU, asked by its C library: no package is needed."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple


class GpuUse(NamedTuple):
    """At a moment; of the driver's own last sample, which spans 1/6 to 1 s."""

    busy: float  # share of the time in which some kernel ran
    memory_busy: float  # share of the time in which memory was read or written
    memory_bytes: int  # taken, by all processes
    power_w: float


class _Utilisation(ctypes.Structure):
    """nvmlUtilization_t, in percent."""

    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Gpu:
    """One GPU.

    Args:
        library: as `load_nvml` gives it.
        uuid: as torch knows it. Numbers will not do: CUDA_VISIBLE_DEVICES and the driver count differently.
    """

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        self._handle = ctypes.c_void_p()
        self._ok = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle)) == 0

    def use(self) -> GpuUse | None:
        """None where the driver does not tell."""
        busy, memory, milliwatts = _Utilisation(), _Memory(), ctypes.c_uint()
        questions = (
            ("nvmlDeviceGetUtilizationRates", busy),
            ("nvmlDeviceGetMemoryInfo", memory),
            ("nvmlDeviceGetPowerUsage", milliwatts),
        )
        for name, answer in questions:
            if not self._ok or getattr(self._library, name)(self._handle, ctypes.byref(answer)):
                return None
        return GpuUse(busy.gpu / 100, busy.memory / 100, memory.used, milliwatts.value / 1000)


def load_nvml() -> Any | None:
    """The library, ready to be asked; None where there is no driver."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None
