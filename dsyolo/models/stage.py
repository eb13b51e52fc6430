"""A pipeline stage: a slice of a network's sequence, under the network's own names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dsyolo.models.network import Network

Shape = tuple[int, ...]  # (B, C, H, W)


class PipelineStage(nn.Module):
    """Nodes `start` .. `stop` - 1 of `network`.

    Boundary activations travel as one flat tensor: k tensors would cost k backward passes through the stage and
    2 k messages.

    Args:
        network: the whole; its modules are shared, not copied.
        incoming: shapes (B, C, H, W) of the boundary activations before node `start`; the first stage needs none.
    """

    def __init__(self, network: Network, start: int, stop: int, incoming: Sequence[Shape]) -> None:
        super().__init__()
        self._whole = (network,)  # in a tuple, so that torch does not register it
        self.start, self.stop, self.incoming = start, stop, tuple(incoming)
        for name in network.order[start:stop]:
            self.add_module(name, network.get_submodule(name))

    def forward(self, x: torch.Tensor) -> Any:
        """Run the stage on images (B, 3, H, W) or flat boundary activations; return the same, or the network's output."""
        (network,) = self._whole
        boundary = unpack(x, self.incoming) if self.start else (x,)
        boundary = network.run(boundary, self.start, self.stop)
        return boundary[0] if self.stop == len(network.order) else pack(boundary)


def pack(boundary: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return tensors (B, C, H, W) as one flat tensor, each in channels-last order."""
    flat = [tensor.permute(0, 2, 3, 1).reshape(-1) for tensor in boundary]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(flat: torch.Tensor, shapes: Sequence[Shape]) -> tuple[torch.Tensor, ...]:
    """Return the tensors that `pack` took, as channels-last views."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return tuple(
        part.view(b, h, w, c).permute(0, 3, 1, 2) for part, (b, c, h, w) in zip(parts, shapes, strict=True)
    )
