"""The most floating-point operations that a device does in a second: what a run's own are measured by."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from dsyolo.config.spec import Precision
from dsyolo.planner.hardware import device_named

SIDE, TRIES = 1024, 10  # of a product of square matrices: 2 SIDE^3 operations, some 20 ms of a core


class Peak(NamedTuple):
    """Of one rank's device."""

    flops_per_s: float
    source: str


def peak_of_gpu(name: str, precision: Precision) -> Peak | None:
    """By its data sheet, dense; None for a GPU that is not in the table."""
    device = device_named(name)
    if device is None:
        return None
    # Convolutions in fp32 may use TF32 or not: torch's default lets cuDNN, so the figure for fp32 is a low one.
    tflops = device.tflops_fp32 if precision.compute == "fp32" else device.tflops_half
    return Peak(tflops * 1e12, f"data sheet of {device.name}: {tflops:g} TFLOP/s")


def peak_of_cpu(precision: Precision) -> Peak:
    """The fastest of some products of matrices, on this rank's threads, now. In half precision also tried in fp32,
    which is the faster one where the CPU has no instructions for bf16.
    """
    dtypes = [torch.float32] if precision.compute == "fp32" else [torch.float32, torch.bfloat16]
    rate, dtype = max((_measured(dtype), str(dtype).removeprefix("torch.")) for dtype in dtypes)
    return Peak(rate, f"a product of {SIDE}x{SIDE} matrices in {dtype}: {rate / 1e9:.0f} GFLOP/s")


def _measured(dtype: torch.dtype) -> float:
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)
