"""Stated figures of devices and links, and how they are written on a command line.

The peaks are those of the vendors' data sheets, dense, with sums in fp32. What a convolutional network reaches of them is
an assumption (`REACHED`), as is the share of the memory that training can use.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dsyolo.config.spec import Precision

GIB = 2**30
REACHED_FLOPS, REACHED_BANDWIDTH = 0.4, 0.7  # of the peaks; assumptions
RESERVED_BYTES = int(0.6 * GIB)  # of a GPU: context of CUDA, libraries, NCCL's buffers; an assumption
HOST_BYTES_S = 12e9  # of a GPU to the host's memory and back, PCIe 4 x16 in practice; an assumption
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Device(NamedTuple):
    """A GPU by its data sheet."""

    name: str
    memory_gib: int
    tflops_fp32: float
    tflops_half: float  # fp16 and bf16
    has_bf16: bool
    memory_bytes_s: float
    link_bytes_s: float  # to the other GPUs of its machine, each way


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("T4", 16, 8.1, 65, False, 320e9, 16e9),
        Device("V100", 32, 15.7, 125, False, 900e9, 150e9),
        Device("L4", 24, 30.3, 121, True, 300e9, 32e9),
        Device("A10", 24, 31.2, 125, True, 600e9, 32e9),
        Device("RTX3090", 24, 35.6, 71, True, 936e9, 32e9),
        Device("RTX4090", 24, 82.6, 165, True, 1008e9, 32e9),
        Device("A100-40", 40, 19.5, 312, True, 1555e9, 300e9),
        Device("L40S", 48, 91.6, 362, True, 864e9, 32e9),
        Device("A100-80", 80, 19.5, 312, True, 2039e9, 300e9),
        Device("H100", 80, 67, 989, True, 3350e9, 450e9),
        Device("H200", 141, 67, 989, True, 4800e9, 450e9),
    )
}
TYPICAL = (
    "T4",
    "A10",
    "V100",
    "A100-40",
    "L40S",
    "A100-80",
    "H200",
)  # for a size of memory alone, the smallest that has it


class Hardware(NamedTuple):
    """What a run would have.

    Attributes:
        gpus: of each node.
        memory_bytes: of each GPU.
        host_bytes: memory of each node; None: not told, and then not judged.
        network_bytes_s: between nodes, each way.
    """

    device: Device
    nodes: int
    gpus: int
    memory_bytes: int
    host_bytes: int | None
    network_bytes_s: float
    accelerator: str = "cuda"  # DeepSpeed's name

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - RESERVED_BYTES

    def is_on_one_node(self, first: int, ranks: int) -> bool:
        """Whether so many neighbours are, from the rank `first` on. Ranks go through one node after the other."""
        return first // self.gpus == (first + ranks - 1) // self.gpus

    def ring_bytes_s(self, first: int, ranks: int) -> float:
        """Of the slowest link of a ring over these neighbours: it goes once into each node and once out of it."""
        inside = self.device.link_bytes_s
        return inside if self.is_on_one_node(first, ranks) else min(inside, self.network_bytes_s)

    def border_bytes_s(self, stage: int, dp_size: int) -> float:
        """Of each pair of GPUs from a stage of a pipeline to the next one, while all replicas send.

        A stage's replicas are neighbours (`place_in`), so their partners are `replicas` ranks away. Pairs that leave a
        node share its network.
        """
        inside = self.device.link_bytes_s
        if self.nodes == 1:
            return inside
        if dp_size >= self.gpus:
            return min(inside, self.network_bytes_s / self.gpus)
        ranks = range(stage * dp_size, (stage + 1) * dp_size)
        leaving = Counter(r // self.gpus for r in ranks if not self.is_on_one_node(r, dp_size + 1))
        return min(inside, self.network_bytes_s / max(leaving.values())) if leaving else inside

    def flops(self, precision: Precision) -> float:
        """Floating-point operations a second that are assumed to be reached."""
        peak = self.device.tflops_fp32 if precision.compute == "fp32" else self.device.tflops_half
        return peak * 1e12 * REACHED_FLOPS

    def explain(self) -> str:
        """What is assumed, in a line."""
        device = self.device
        inside = f"{device.tflops_half:g} TFLOP/s in half precision, {device.tflops_fp32:g} in fp32"
        moves = f"{device.memory_bytes_s / 1e9:.0f} GB/s memory, {device.link_bytes_s / 1e9:.0f} GB/s between GPUs"
        network = f", {self.network_bytes_s / 1e9:g} GB/s between nodes" if self.nodes > 1 else ""
        reached = f"{REACHED_FLOPS:.0%} and {REACHED_BANDWIDTH:.0%} of them assumed to be reached"
        return f"{device.name} by its data sheet: {inside}, {moves}{network}; {reached}"


def typical_device(memory_bytes: int) -> Device:
    """For so much memory, where no device was named."""
    fitting = [DEVICES[name] for name in TYPICAL if DEVICES[name].memory_gib * GIB >= 0.95 * memory_bytes]
    return fitting[0] if fitting else DEVICES["H200"]


def device_named(name: str, memory_bytes: float | None = None) -> Device | None:
    """The device of a name as drivers tell it, such as "NVIDIA A100-SXM4-80GB"; None: it is not in the table.

    Args:
        memory_bytes: tells variants apart; None: the first of them.
    """
    words = name.upper().replace("RTX ", "RTX")
    families = {key: key.split("-")[0] for key in DEVICES}
    # No letter or digit before it, and no digit behind: an A100 is no A10, an L40S no L4.
    known = [
        DEVICES[key]
        for key, family in families.items()
        if re.search(rf"(?<![A-Z0-9]){family}(?![0-9])", words)
    ]
    if memory_bytes is None:
        return known[0] if known else None
    return min(known, key=lambda device: abs(device.memory_gib * GIB - memory_bytes), default=None)


def read_bytes(text: str) -> int:
    """24GiB, 24GB, 512MiB: bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)B?", text.strip().upper())
    value = float(match[1]) * {**UNITS, **BINARY}[match[2]] if match else 0
    if value <= 0:
        raise ValueError("an amount such as 24GiB or 24GB")
    return int(value)


def read_gpus(text: str) -> tuple[int, int]:
    """8x24GiB: (8, bytes of each).

    Raises:
        ValueError: it is none.
    """
    count, cross, each = text.partition("x")
    if not (cross and count.isdecimal() and int(count)):
        raise ValueError("a number of GPUs and the memory of each, such as 8x24GiB")
    return int(count), read_bytes(each)


def read_rate(text: str) -> float:
    """25GB/s, or 200Gb/s and 200Gbit/s, which are bits: bytes a second.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)(B|b|[Bb]it)(?:/s|ps)", text.strip())
    value = float(match[1]) * UNITS[match[2].upper()] / (1 if match[3] == "B" else 8) if match else 0
    if value <= 0:
        raise ValueError("a rate such as 25GB/s or 200Gbit/s")
    return value
