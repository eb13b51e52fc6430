"""Measures the peak FLOP/s of a CPU's threads in moments without other load, or finds that there are none."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil
import torch

from dsyolo.config.spec import Precision
from dsyolo.engine.device import has_bf16_instructions

SIDE = 1024  # a product of square matrices takes 2 SIDE^3 operations, some 20 ms of a core
PRODUCTS, MOST_BURSTS, PAUSE_S = 3, 8, 0.05  # what disturbs one burst for a moment leaves the next one alone
QUIET = 0.85  # least share of the threads' time that the CPU was really theirs
MOST_S = 0.6  # for one type of numbers
AGREE = 0.9  # two bursts at least must be this near to the fastest
MOST_STEAL = 0.05  # of the time, taken by other virtual machines


class Peak(NamedTuple):
    """The peak FLOP/s of one rank's device, and the source of that figure."""

    flops_per_s: float  # 0: not known
    source: str


class Burst(NamedTuple):
    """Some products in a row: the rate of the fastest one, and the share of the threads' time that they ran."""

    flops_per_s: float
    share: float


def peak_of_cpu(precision: Precision) -> Peak:
    """Measure the fastest products of matrices on this rank's threads; 0 where other load spoils too many.

    Half precision is tried where the CPU has instructions for it: without them one product takes seconds.
    """
    is_half = precision.compute != "fp32" and has_bf16_instructions("cpu")
    dtypes = [torch.float32, torch.bfloat16] if is_half else [torch.float32]
    return max((_peak_of(dtype) for dtype in dtypes), key=lambda peak: peak.flops_per_s)


def _peak_of(dtype: torch.dtype) -> Peak:
    name = str(dtype).removeprefix("torch.")
    a = torch.ones(SIDE, SIDE, dtype=dtype)
    a @ a  # the first one starts the threads
    return judged(lambda: _burst(a), f"products of {SIDE}x{SIDE} matrices in {name}")


def judged(measure: Callable[[], Burst], what: str) -> Peak:
    """Return the rate of the fastest undisturbed burst, once another one agrees with it; else 0 and the reason."""
    quiet: list[float] = []
    number, end = 0, time.monotonic() + MOST_S
    while number < MOST_BURSTS and time.monotonic() < end:
        number += 1
        burst = measure()
        if burst.share >= QUIET:
            quiet.append(burst.flops_per_s)
        if len(quiet) > 1 and sorted(quiet)[-2] >= AGREE * max(quiet):
            source = f"the fastest of {counted_bursts(number)} of {what}, {len(quiet)} of them undisturbed"
            return Peak(max(quiet), f"{max(quiet) / 1e9:.0f} GFLOP/s, {source}")
        time.sleep(PAUSE_S)
    if len(quiet) < 2:
        why = f"other load disturbed {number - len(quiet)} of {counted_bursts(number)} of {what}"
    else:
        low, high = min(quiet) / 1e9, max(quiet) / 1e9
        why = f"{what} ran at {low:.0f} to {high:.0f} GFLOP/s, median {statistics.median(quiet) / 1e9:.0f}"
    return Peak(0.0, f"not known, and no share of it is given: {why}")


def counted_bursts(number: int) -> str:
    """Return the number of bursts with its noun."""
    return f"{number} burst{'' if number == 1 else 's'}"


def _burst(a: torch.Tensor) -> Burst:
    threads, before = torch.get_num_threads(), psutil.cpu_times()
    begin, cpu_begin, times = time.perf_counter(), time.process_time(), []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    steal_s = getattr(psutil.cpu_times(), "steal", 0.0) - getattr(before, "steal", 0.0)
    share = 0.0 if steal_s > MOST_STEAL * wall_s * (psutil.cpu_count() or 1) else cpu_s / (wall_s * threads)
    return Burst(2 * SIDE**3 / min(times), share)
