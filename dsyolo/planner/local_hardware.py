"""The hardware of this machine: its devices, their memory for each rank, and their peak FLOP/s, which MFU refers to."""

from pathlib import Path

import psutil
import torch

from dsyolo.cluster.world import World
from dsyolo.config.spec import Precision
from dsyolo.engine.device import has_bf16_instructions, total_memory
from dsyolo.planner.cpu_peak import Peak
from dsyolo.planner.hardware import GIB, Device, Hardware, device_named, typical_device

CPU_SHARE = 0.8  # share of a machine's memory that training may take
# Measured on one thread of an AMD EPYC: 28 GFLOP/s in a network, twice as much in bf16 if it has instructions for it.
CPU_TFLOPS, CPU_BYTES_S, CPU_LINK_BYTES_S = 0.07, 20e9, 1.5e9
GRAIN = GIB // 4  # a rank's memory is rounded down to it, so that all ranks see the same
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def hardware_here(world: World, accelerator: str, network_bytes_s: float = 3e9) -> Hardware:
    """Return the hardware of the run, assuming that other machines are like this one."""
    # Machines with different numbers of ranks all see the same this way: every link is as slow as the network.
    gpus = 1 if world.size % world.local_size else world.local_size
    nodes = world.size // gpus
    has_bf16 = has_bf16_instructions(accelerator, world.local_rank)
    if accelerator == "cpu":
        half = 2 * CPU_TFLOPS if has_bf16 else CPU_TFLOPS / 2
        memory = int(CPU_SHARE * host_bytes()) // world.local_size // GRAIN * GRAIN or GRAIN
        device = Device("CPU", memory // GIB, CPU_TFLOPS, half, has_bf16, CPU_BYTES_S, CPU_LINK_BYTES_S)
        return Hardware(device, nodes, gpus, memory, None, network_bytes_s, accelerator)
    memory = total_memory(world.local_rank)
    name = torch.cuda.get_device_name(world.local_rank) if torch.cuda.is_available() else ""
    device = device_named(name, memory) or typical_device(memory)._replace(has_bf16=has_bf16)
    return Hardware(device, nodes, gpus, memory, host_bytes(), network_bytes_s, accelerator)


def host_bytes() -> int:
    """Return the memory of this machine, or of the container that this process is in."""
    total = psutil.virtual_memory().total
    for path in LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def bf16_warning(precision: Precision, zero_stage: int, accelerator: str, local_rank: int = 0) -> str:
    """Return a warning if a run computes in bf16 on a device without instructions for it; empty if it does not."""
    if precision.compute != "bf16" or has_bf16_instructions(accelerator, local_rank):
        return ""
    key = "torch_autocast" if precision.is_autocast else "bf16"
    if accelerator == "cpu":
        rule = "this CPU has no instructions for it (avx512_bf16, amx_bf16) and may take several times as long as in fp32"
        return (
            f"{key}: bf16 given, but {rule}. Take {key} out of the JSON, as ds_configs/zero2_fp32.json does."
        )
    rule = "this GPU has no instructions for it (NVIDIA's have them from Ampere on) and emulates it"
    fp16 = (
        '"torch_autocast": {"enabled": true, "dtype": "float16"}'
        if zero_stage == 0
        else '"fp16": {"enabled": true}'
    )
    return f"{key}: bf16 given, but {rule}. Write {fp16} in its place."


def peak_of_gpu(name: str, precision: Precision) -> Peak | None:
    """Return the dense peak by the data sheet; None for a GPU that is not in the table."""
    device = device_named(name)
    if device is None:
        return None
    # cuDNN may use TF32 for convolutions in fp32 (torch's default), so this figure for fp32 is a low one.
    tflops = device.tflops_fp32 if precision.compute == "fp32" else device.tflops_half
    return Peak(tflops * 1e12, f"data sheet of {device.name}: {tflops:g} TFLOP/s")
