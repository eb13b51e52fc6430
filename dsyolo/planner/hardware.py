"""Data-sheet figures of devices and links, and how to write them on a command line.

Peaks are dense, with fp32 accumulation. What a convolutional network reaches of them is an assumption, as is the memory
that training can use.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from dsyolo.config.spec import Precision

GIB = 2**30
REACHED_FLOPS, REACHED_BANDWIDTH = 0.4, 0.7  # shares of the peaks; assumptions
RESERVED_BYTES = int(0.6 * GIB)  # a GPU's for CUDA's context, libraries, NCCL's buffers; an assumption
HOST_BYTES_S = 12e9  # between a GPU and the host's memory, PCIe 4 x16 in practice; an assumption
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
    link_bytes_s: float  # rate to the other GPUs of its machine, each way


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
# Where only a size of memory is given, the smallest of these that has it.
TYPICAL = ("T4", "A10", "V100", "A100-40", "L40S", "A100-80", "H200")


class Hardware(NamedTuple):
    """The machines that a run would have.

    Attributes:
        gpus: of each node.
        memory_bytes: of each GPU.
        host_bytes: memory of each node; None: unknown, and not checked.
        network_bytes_s: network bandwidth of each node, one direction.
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
        """Return whether `ranks` consecutive ranks from `first` on share a node. Ranks fill one node after the other."""
        return first // self.gpus == (first + ranks - 1) // self.gpus

    def ring_bytes_s(self, first: int, ranks: int) -> float:
        """Return the slowest link of a ring over these ranks: the ring enters and leaves each node once."""
        inside = self.device.link_bytes_s
        return inside if self.is_on_one_node(first, ranks) else min(inside, self.network_bytes_s)

    def border_bytes_s(self, stage: int, dp_size: int) -> float:
        """Return the rate from a pipeline stage to the next, of each pair of GPUs while all pairs send.

        The ranks of a stage are consecutive, so their partners are `dp_size` ranks away. Pairs on two nodes share the
        network.
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
        """Return the FLOP/s that are assumed to be reached."""
        peak = self.device.tflops_fp32 if precision.compute == "fp32" else self.device.tflops_half
        return peak * 1e12 * REACHED_FLOPS

    def explain(self) -> str:
        """Return the assumptions as a line."""
        device = self.device
        inside = f"{device.tflops_half:g} TFLOP/s in half precision, {device.tflops_fp32:g} in fp32"
        moves = f"{device.memory_bytes_s / 1e9:.0f} GB/s memory, {device.link_bytes_s / 1e9:.0f} GB/s between GPUs"
        network = f", {self.network_bytes_s / 1e9:g} GB/s between nodes" if self.nodes > 1 else ""
        reached = f"{REACHED_FLOPS:.0%} and {REACHED_BANDWIDTH:.0%} of them assumed to be reached"
        return f"{device.name} by its data sheet: {inside}, {moves}{network}; {reached}"


def typical_device(memory_bytes: int) -> Device:
    """Return the device to assume for a size of memory."""
    fitting = [DEVICES[name] for name in TYPICAL if DEVICES[name].memory_gib * GIB >= 0.95 * memory_bytes]
    return fitting[0] if fitting else DEVICES["H200"]


def device_named(name: str, memory_bytes: float | None = None) -> Device | None:
    """Return the device of a driver's name, such as "NVIDIA A100-SXM4-80GB"; None if it is not in the table.

    `memory_bytes` distinguishes variants; without it, take the first of them.
    """
    upper = name.upper().replace("RTX ", "RTX")
    # No letter or digit before it, and no digit behind: an A100 is no A10, an L40S no L4.
    known = [
        device
        for key, device in DEVICES.items()
        if re.search(rf"(?<![A-Z0-9]){key.split('-')[0]}(?![0-9])", upper)
    ]
    if memory_bytes is None:
        return known[0] if known else None
    return min(known, key=lambda device: abs(device.memory_gib * GIB - memory_bytes), default=None)


def read_bytes(text: str) -> int:
    """Return the bytes of 24GiB, 24GB or 512MiB; raise ValueError with what the text must be."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)B?", text.strip().upper())
    value = float(match[1]) * {**UNITS, **BINARY}[match[2]] if match else 0
    if value <= 0:
        raise ValueError("an amount such as 24GiB or 24GB")
    return int(value)


def read_gpus(text: str) -> tuple[int, int]:
    """Return the number and the bytes of each of 8x24GiB; raise ValueError with what the text must be."""
    count, cross, each = text.partition("x")
    if not (cross and count.isdecimal() and int(count)):
        raise ValueError("a number of GPUs and the memory of each, such as 8x24GiB")
    return int(count), read_bytes(each)


def read_rate(text: str) -> float:
    """Return the bytes a second of 25GB/s or 200Gbit/s; raise ValueError with what the text must be."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGTkmgt]?)(B|b|[Bb]it)(?:/s|ps)", text.strip())
    value = float(match[1]) * UNITS[match[2].upper()] / (1 if match[3] == "B" else 8) if match else 0
    if value <= 0:
        raise ValueError("a rate such as 25GB/s or 200Gbit/s")
    return value
