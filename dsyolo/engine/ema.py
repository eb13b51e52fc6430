"""The exponential moving average of weights and buffers, held only for the partitions that a rank owns."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch

from dsyolo.engine.buffers import Buffers
from dsyolo.engine.partitions import Partitions


class Ema:
    """Averages the fp32 masters of this rank, at no communication, and the buffers.

    decay(n) = decay * (1 - exp(-n / tau)) after n updates (docs/yolov5.md, Recipe).

    Args:
        partitions: this rank's part of the parameters.
        buffers: the network's float buffers, equal on all ranks.
        decay: the limit; 0 makes the average the weights themselves.
        tau: updates over which the decay grows.

    Attributes:
        partitions: the part that is averaged here; replicas of the same weights average a share each.
        tensors: the average, one per flat partition.
    """

    def __init__(self, partitions: Partitions, buffers: Buffers, decay: float, tau: float) -> None:
        self.partitions = partitions.to_average()
        self._live_buffers = buffers
        self._decay, self._tau = decay, tau
        self.updates = 0
        self.tensors = [master.clone() for master in self.partitions.masters()]
        self.buffers = buffers.flat.clone()

    def state_dict(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the average as the network's state, fp32 on the host; empty unless `keep`. All ranks must call it."""
        return _state_dict(self.partitions, self.tensors, self._live_buffers, self.buffers, keep)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after an optimizer step."""
        self.updates += 1
        weight = 1 - self._decay * (1 - math.exp(-self.updates / self._tau))
        torch._foreach_lerp_(self.tensors, self.partitions.masters(), weight)
        self.buffers.lerp_(self._live_buffers.flat, weight)

    def swapped(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the average; afterwards with the trained weights again."""
        return self.partitions.swap_parameters(self.tensors, self.buffers)


class NoEma:
    """Stands in for `Ema` when it is off: the trained weights themselves."""

    updates = 0

    def __init__(self, partitions: Partitions, buffers: Buffers) -> None:
        self.partitions, self._live_buffers = partitions, buffers
        self.tensors: list[torch.Tensor] = []
        self.buffers = buffers.flat[:0]

    def update(self) -> None:
        """Do nothing."""

    def state_dict(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """Return the weights as `Ema.state_dict` does."""
        live = self._live_buffers
        return _state_dict(self.partitions, self.partitions.masters(), live, live.flat, keep)

    def swapped(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the trained weights."""
        return self.partitions.swap_trained_parameters()


def _state_dict(
    partitions: Partitions, tensors: list[torch.Tensor], buffers: Buffers, flat: torch.Tensor, keep: bool
) -> dict[str, torch.Tensor]:
    weights = {
        name: tensor.to("cpu", copy=True).contiguous() for name, tensor in partitions.gather(tensors) if keep
    }
    gathered = buffers.gathered(flat)
    if not keep:
        return {}
    return weights | {name: tensor.to("cpu", copy=True) for name, tensor in buffers.named(gathered).items()}
