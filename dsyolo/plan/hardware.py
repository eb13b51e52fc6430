"""Stated figures of devices and links, and how a user names them."""

from __future__ import annotations

import re
from typing import NamedTuple

GIB = 2**30


class Device(NamedTuple):
    """Of a vendor's data sheet: dense, without sparsity; links in one direction."""

    name: str
    memory_gib: float
    half_tflops: float  # fp16 or bf16 with sums in fp32
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float  # to another GPU of the node
    host_gb_s: float  # PCIe
    has_bf16: bool = True


# Data sheets of NVIDIA. "NVLink" figures are halved: they count both directions.
DEVICES = (
    Device("T4", 16, 65, 8.1, 320, 16, 16, has_bf16=False),
    Device("A10", 24, 125, 31.2, 600, 32, 32),
    Device("L4", 24, 121, 30.3, 300, 32, 32),
    Device("RTX3090", 24, 71, 35.6, 936, 32, 32),
    Device("RTX4090", 24, 165, 82.6, 1008, 32, 32),
    Device("V100", 32, 125, 15.7, 900, 150, 16, has_bf16=False),
    Device("A100-40GB", 40, 312, 19.5, 1555, 300, 32),
    Device("L40S", 48, 362, 91.6, 864, 32, 32),
    Device("A100-80GB", 80, 312, 19.5, 2039, 300, 32),
    Device("H100", 80, 989, 67, 3350, 450, 64),
    Device("H200", 141, 989, 67, 4800, 450, 64),
)
DEFAULT_OF_MEMORY = {
    16: "T4",
    24: "A10",
    32: "V100",
    40: "A100-40GB",
    48: "L40S",
    80: "A100-80GB",
    141: "H200",
}
MOST_NODES = 1024
NODE_LINK_GB_S = 25.0  # where --bandwidth is not given: a 200 Gb/s card

# Assumptions, of every device: shares of the data sheet that a convolutional network reaches, and the time to
# start an operation. They scale all strategies alike; only the recommendation among near ones hangs on them.
COMPUTE_SHARE = 0.4
MEMORY_SHARE = 0.7
LINK_SHARE = 0.7
START_S = 4e-6
CONTEXT_GIB = (
    0.6  # CUDA's context and libraries: outside of torch's allocator, and so of every published peak
)


class Hardware(NamedTuple):
    """What the ranks run on."""

    device: Device
    memory_gib: float  # of a GPU
    gpus_per_node: int
    nodes: int
    node_gb_s: float  # in one direction, of a node to the others

    @property
    def num_gpus(self) -> int:
        return self.gpus_per_node * self.nodes

    def describe(self) -> str:
        """A line with every figure that is used."""
        d = self.device
        nodes = f"{self.nodes} nodes x " if self.nodes > 1 else ""
        between = f", {self.node_gb_s:g} GB/s between nodes" if self.nodes > 1 else ""
        return (
            f"{nodes}{self.gpus_per_node} GPUs of {self.memory_gib:g} GiB; {d.name} by its data sheet: "
            f"{d.half_tflops:g} TFLOP/s in fp16/bf16, {d.fp32_tflops:g} in fp32, {d.memory_gb_s:g} GB/s memory, "
            f"{d.link_gb_s:g} GB/s to other GPUs, {d.host_gb_s:g} GB/s to the host{between}"
        )


def read_hardware(
    gpus: str, nodes: int, bandwidth: str | None, gpu: str | None, tflops: float | None, problems: list[str]
) -> Hardware:
    """From the command line: `gpus` of one node. What cannot be read is added to `problems`."""
    count, memory = _read_gpus(gpus, problems)
    node_gb_s = NODE_LINK_GB_S if bandwidth is None else _read_bandwidth(bandwidth, problems)
    if not 1 <= nodes <= MOST_NODES:
        problems.append(f"--nodes: {nodes} given, but it must be 1 to {MOST_NODES}.")
    names = {device.name.lower(): device for device in DEVICES}
    if gpu and gpu.lower() not in names:
        problems.append(f"--gpu: {gpu} given, but figures are kept of {', '.join(d.name for d in DEVICES)}.")
    if tflops is not None and not 0 < tflops < 1e6:
        problems.append(f"--tflops: {tflops:g} given, but it must be above 0.")
    device = names.get(gpu.lower(), DEVICES[0]) if gpu else _default(memory, names)
    if tflops is not None:
        device = device._replace(name=f"{device.name}, with --tflops", half_tflops=tflops)
    return Hardware(device, memory, count, max(1, nodes), node_gb_s)


def _default(memory_gib: float, names: dict[str, Device]) -> Device:
    nearest = min(DEFAULT_OF_MEMORY, key=lambda size: (abs(size - memory_gib), size))
    return names[DEFAULT_OF_MEMORY[nearest].lower()]


def _read_gpus(text: str, problems: list[str]) -> tuple[int, float]:
    """(GPUs of a node, GiB of each) of `8x24GiB`."""
    found = re.fullmatch(
        r"(\d{1,4})\s*x\s*(\d{1,4}(?:\.\d{1,3})?)\s*(gib|gb|g)?", text.strip(), re.IGNORECASE
    )
    count, size = (int(found[1]), float(found[2])) if found else (0, 0.0)
    if not count or not size:
        problems.append(f"--gpus: {text} given, but it is a number of GPUs and their memory, as in 8x24GiB.")
        return 1, 1.0
    return count, size  # vendors write GB for what are GiB


def _read_bandwidth(text: str, problems: list[str]) -> float:
    """GB/s of `25GB/s` or `200Gb/s`."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*(GB/s|Gb/s|Gbit/s|MB/s)?", text.strip())
    scale = {None: 1.0, "GB/s": 1.0, "MB/s": 1e-3}
    value = float(found[1]) * scale.get(found[2], 1 / 8) if found else 0.0
    if not value:
        problems.append(f"--bandwidth: {text} given, but it is bytes or bits, as in 25GB/s or 200Gb/s.")
    return value
