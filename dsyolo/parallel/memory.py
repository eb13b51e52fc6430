"""How much memory a rank takes."""

from __future__ import annotations

import resource
import sys

import torch


def process_memory_gib() -> float:
    """Peak resident memory of this process, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory of this rank so far: the device's allocator, or on a CPU the process's resident set."""
    from deepspeed.accelerator import get_accelerator

    return process_memory_gib() if device.type == "cpu" else get_accelerator().max_memory_allocated() / 2**30
