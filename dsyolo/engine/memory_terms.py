"""The terms of a rank's memory, estimated or measured."""

from __future__ import annotations

from typing import NamedTuple


class MemoryTerms(NamedTuple):
    """Bytes. What is small is left out: BatchNorm's buffers, images, targets, scalars."""

    parameters: int = 0  # that the network computes with
    gradients: int = 0
    optimizer: int = 0  # its states, and fp32 master weights where they are not the parameters themselves
    ema: int = 0
    buckets: int = 0  # copies in which gradients and weights travel
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them at once: no moment of a step needs more, and most need less."""
        return sum(self)

    @property
    def states(self) -> int:
        """What lies there whatever the images are: parameters, gradients, optimizer and EMA."""
        return self.parameters + self.gradients + self.optimizer + self.ema


class MemoryEstimate(NamedTuple):
    """Of one rank. Where the device is the CPU, `host` is what was offloaded all the same."""

    device: MemoryTerms
    host: MemoryTerms = MemoryTerms()

    @property
    def together(self) -> MemoryTerms:
        """Wherever it lies."""
        return MemoryTerms(*(a + b for a, b in zip(self.device, self.host, strict=True)))

    def to_json(self) -> dict[str, dict[str, int]]:
        """Bytes by place and term."""
        return {"device": self.device._asdict(), "host": self.host._asdict()}
