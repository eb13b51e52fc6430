"""The exponential moving average of weights and buffers, held only for the partitions that a rank owns."""

import math
from contextlib import AbstractContextManager

import torch

from dsyolo.engine.buffers import Buffers
from dsyolo.engine.partitions import Partitions


class Ema:
    """Averages the fp32 masters of this rank, at no communication, and the buffers.

    After n updates the decay is `decay` * (1 - exp(-n / `tau`)) (docs/yolov5.md, Recipe).

    Attributes:
        partitions: the part that is averaged here; ranks with the same weights average a share each.
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
        return self._gather(self.tensors, self.buffers, keep)

    def _gather(self, tensors: list[torch.Tensor], flat: torch.Tensor, keep: bool) -> dict[str, torch.Tensor]:
        gathered = self.partitions.gather(tensors)
        weights = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in gathered if keep}
        buffers = self._live_buffers.gathered(flat)
        if not keep:
            return {}
        named = self._live_buffers.named(buffers)
        return weights | {name: tensor.to("cpu", copy=True) for name, tensor in named.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        weight = 1 - self._decay * (1 - math.exp(-self.updates / self._tau))
        torch._foreach_lerp_(self.tensors, self.partitions.masters(), weight)
        self.buffers.lerp_(self._live_buffers.flat, weight)

    def swapped(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the average; afterwards with the trained weights again."""
        return self.partitions.swap_parameters(self.tensors, self.buffers)


class NoEma(Ema):
    """Stands in for `Ema` when it is off: the trained weights themselves."""

    def __init__(self, partitions: Partitions, buffers: Buffers) -> None:
        self.partitions, self._live_buffers = partitions, buffers
        self.tensors, self.buffers, self.updates = [], buffers.flat[:0], 0

    def update(self) -> None:
        """Do nothing."""

    def state_dict(self, *, keep: bool) -> dict[str, torch.Tensor]:
        return self._gather(self.partitions.masters(), self._live_buffers.flat, keep)

    def swapped(self) -> AbstractContextManager[None]:
        return self.partitions.swap_trained_parameters()
