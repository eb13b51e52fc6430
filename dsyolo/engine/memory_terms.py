"""The terms of a rank's memory, estimated or measured, in bytes."""

from typing import NamedTuple


class MemoryTerms(NamedTuple):
    """Bytes by term. Small parts are left out: BatchNorm's buffers, images, targets, scalars."""

    parameters: int = 0  # that the network computes with
    gradients: int = 0
    optimizer: int = 0  # its states, and fp32 master weights where they are not the parameters themselves
    ema: int = 0
    buckets: int = 0  # copies in which gradients and weights travel
    activations: int = 0

    @property
    def total(self) -> int:
        """Return the sum: an upper bound, since the terms peak at different moments."""
        return sum(self)

    @property
    def states(self) -> int:
        """Return what does not depend on the images: parameters, gradients, optimizer and EMA."""
        return self.parameters + self.gradients + self.optimizer + self.ema


class MemoryEstimate(NamedTuple):
    """The terms of one rank, by place. If the device is the CPU, `host` is still what was offloaded."""

    device: MemoryTerms
    host: MemoryTerms = MemoryTerms()

    @property
    def combined(self) -> MemoryTerms:
        return MemoryTerms(*(a + b for a, b in zip(self.device, self.host, strict=True)))

    def to_json(self) -> dict[str, dict[str, int]]:
        return {"device": self.device._asdict(), "host": self.host._asdict()}
