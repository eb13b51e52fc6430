"""The machine that a run finds: its memory for each rank, and what it is."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from dsyolo.cluster.world import World
from dsyolo.engine.device import total_memory
from dsyolo.planner.hardware import GIB, Device, Hardware, device_named, typical_device

CPU_SHARE = 0.8  # of a machine's memory that training may take
# Of one thread of an AMD EPYC, measured: 28 GFLOP/s in a network, twice as much in bf16 where it has instructions for it.
CPU_TFLOPS, CPU_BYTES_S, CPU_LINK_BYTES_S = 0.07, 20e9, 1.5e9
GRAIN = GIB // 4  # of what is told of a rank's memory, so that all ranks tell the same
AMPERE = (8, 0)  # the first generation of NVIDIA's with bf16; AMD's numbers begin above it
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def hardware_here(world: World, accelerator: str, network_bytes_s: float = 3e9) -> Hardware:
    """As this rank sees it; other machines are taken to be the same."""
    # Where machines have different numbers of ranks all see the same this way, and hold every link for the slowest.
    gpus = 1 if world.size % world.local_size else world.local_size
    nodes = world.size // gpus
    if accelerator == "cpu":
        half = 2 * CPU_TFLOPS if _has_bf16() else CPU_TFLOPS / 2
        memory = int(CPU_SHARE * host_bytes()) // world.local_size // GRAIN * GRAIN or GRAIN
        device = Device("CPU", memory // GIB, CPU_TFLOPS, half, _has_bf16(), CPU_BYTES_S, CPU_LINK_BYTES_S)
        return Hardware(device, nodes, gpus, memory, None, network_bytes_s, accelerator)
    memory = total_memory(world.local_rank)
    name = torch.cuda.get_device_name(world.local_rank) if torch.cuda.is_available() else ""
    device = device_named(name, memory) or typical_device(memory)._replace(has_bf16=_gpu_has_bf16(world))
    return Hardware(device, nodes, gpus, memory, host_bytes(), network_bytes_s, accelerator)


def host_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    total = psutil.virtual_memory().total
    for path in LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def _gpu_has_bf16(world: World) -> bool:
    """By its generation: torch would say yes of older ones too, on which it is emulated."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(world.local_rank) >= AMPERE


def _has_bf16() -> bool:
    """Whether this CPU has instructions for it: without them torch computes it slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
