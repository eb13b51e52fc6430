"""The accelerator of this rank, by DeepSpeed's `get_accelerator`: no device is named anywhere else."""

from pathlib import Path
from typing import Any

import torch

from dsyolo.cluster.world import World, cores_of_rank

AMPERE = (8, 0)  # NVIDIA's first generation with bf16; AMD's numbers are all above it
BF16_FLAGS = {
    "avx512_bf16",
    "amx_bf16",
    "bf16",
}  # in Linux's list of a CPU's abilities; the last one is ARM's


def accelerator() -> Any:
    """Return DeepSpeed's accelerator. Importing it takes a second, so not before it is needed."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def total_memory(local_rank: int) -> int:
    """Return the memory of this rank's accelerator in bytes."""
    return accelerator().total_memory(local_rank)


def current_device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device(accelerator().current_device_name())


def pins_memory() -> bool:
    """Return whether batches are copied to an accelerator, from pinned memory."""
    return accelerator().device_name() != "cpu"


def num_workers(world: World, workers: int | None) -> int:
    """Return the loader processes of this rank: `workers`, or as many as its cores allow beside the training."""
    # On a CPU the training itself takes the rank's cores; one worker keeps ahead of it.
    return (min(8, cores_of_rank(world)) if pins_memory() else 1) if workers is None else workers


def has_bf16_instructions(name: str, local_rank: int = 0) -> bool:
    """Return whether this rank's accelerator of that name has bf16 instructions: without them bf16 is slower than fp32."""
    if name != "cpu":
        # torch also says that older GPUs have bf16, which emulate it.
        return torch.cuda.is_available() and torch.cuda.get_device_capability(local_rank) >= AMPERE
    try:
        found = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return not BF16_FLAGS.isdisjoint(found.split())
