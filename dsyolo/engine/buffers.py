"""The network's buffers: BatchNorm's statistics and the anchors."""

import torch
from torch import nn


class Buffers:
    """All float buffers of `network` as views of one flat fp32 tensor. Do not move or cast the network afterwards.

    So averaging them over ranks is one small collective a step, and their EMA one operation.

    Attributes:
        flat: (elements,) float32, in the order of `named_buffers`.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        places = [
            (module, name, buffer)
            for module in network.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]
        self.flat = torch.cat([buffer.detach().float().reshape(-1) for _, _, buffer in places])
        views = self.flat.split([buffer.numel() for *_, buffer in places])
        for (module, name, buffer), view in zip(places, views, strict=True):
            module._buffers[name] = view.view(buffer.shape)

    def gathered(self, flat: torch.Tensor) -> torch.Tensor:
        """Return `flat` (laid out like this rank's) for the whole network. All ranks must call it."""
        return flat

    def own(self, gathered: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of what `gathered` returned."""
        return gathered

    def named(self, gathered: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return every buffer of the whole network by its name in the state."""
        return named_buffers(self._network, gathered)


def named_buffers(network: nn.Module, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the buffers of `network` by name, float ones with the values of `flat`, in the order of `named_buffers`."""
    named, start = {}, 0
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            named[name] = flat[start : start + buffer.numel()].view(buffer.shape)
            start += buffer.numel()
        else:
            named[name] = buffer
    return named
