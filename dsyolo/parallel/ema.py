"""The exponential moving average of weights and buffers, held only for the pieces that a rank owns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from dsyolo.parallel.buffers import Buffers
from dsyolo.parallel.shards import Shards


class Ema:
    """Averages the fp32 masters of this rank, at no communication, and the buffers.

    decay(n) = decay * (1 - exp(-n / tau)) after n updates (spec.md, Recipe).

    Args:
        shards: the rank's share of the parameters.
        buffers: the network's float buffers, equal on all ranks.
        decay: the limit; 0 makes the average the weights themselves.
        tau: updates over which the decay grows.
    """

    def __init__(self, shards: Shards, buffers: Buffers, decay: float, tau: float) -> None:
        self._shards = shards
        self._live_buffers = buffers
        self._decay, self._tau = decay, tau
        self.updates = 0
        self.tensors = [master.clone() for master in shards.masters()]
        self.buffers = buffers.flat.clone()

    def state_dict(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """The average as the network's state, fp32 on the host; empty where not `keep`. All ranks must call it."""
        return _state_dict(self._shards, self.tensors, self._live_buffers.named(self.buffers), keep)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.updates += 1
        weight = 1 - self._decay * (1 - math.exp(-self.updates / self._tau))
        torch._foreach_lerp_(self.tensors, self._shards.masters(), weight)
        self.buffers.lerp_(self._live_buffers.flat, weight)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the network computes with the average; after it, with the trained weights again."""
        shards = self._shards
        # Under ZeRO 0 in fp32 the masters are the network's own parameters, which publishing overwrites.
        kept = [master.clone() for master in shards.masters()] if shards.replicated else shards.masters()
        live_buffers = self._live_buffers.flat.clone()
        shards.publish(self.tensors)
        self._live_buffers.flat.copy_(self.buffers)
        try:
            yield
        finally:
            shards.publish(kept)
            self._live_buffers.flat.copy_(live_buffers)


class NoEma:
    """In the place of an average: the trained weights themselves."""

    updates = 0

    def __init__(self, shards: Shards, buffers: Buffers) -> None:
        self._shards, self._live_buffers = shards, buffers
        self.tensors: list[torch.Tensor] = []
        self.buffers = buffers.flat[:0]

    def update(self) -> None:
        """Nothing to do."""

    def state_dict(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """The weights as `Ema.state_dict` gives them."""
        return _state_dict(self._shards, self._shards.masters(), self._live_buffers.named(), keep)

    def swapped(self) -> nullcontext:
        """Nothing to swap."""
        return nullcontext()


def _state_dict(
    shards: Shards, tensors: list[torch.Tensor], buffers: dict[str, torch.Tensor], keep: bool
) -> dict[str, torch.Tensor]:
    weights = {
        name: tensor.to("cpu", copy=True).contiguous() for name, tensor in shards.gather(tensors) if keep
    }
    return weights | {name: tensor.to("cpu", copy=True) for name, tensor in buffers.items()} if keep else {}
