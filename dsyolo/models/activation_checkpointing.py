"""Activation checkpointing of a node: keep its inputs alone, and run it again in the backward pass.

Invariant: weights, gradients and buffers are those of a plain run, bit for bit, on the same machine.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dsyolo.models.blocks import BatchNorm


def run_checkpointed(module: nn.Module, inputs: tuple[torch.Tensor, ...], *, offload: bool) -> torch.Tensor:
    """Return `module(*inputs)`, and keep only its inputs for the backward pass; in host memory if `offload`.

    A network draws no random numbers, so the generators' states are not saved. Nothing here waits for the device.
    """
    # These hooks see only the inputs: inside, the checkpoint has its own.
    with saved_tensors_hooks(_to_host, _to_device) if offload else nullcontext():
        return checkpoint(
            module,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _FrozenStatistics(module)),
        )


class _FrozenStatistics:
    """Keeps the BatchNorms of `module` from moving their statistics again, which the first pass moved.

    It can be entered again: a second backward pass over a retained graph runs the forward pass once more.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if isinstance(part, BatchNorm)]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.moves_statistics = False

    def __exit__(self, *error: object) -> None:
        for norm in self.norms:
            norm.moves_statistics = True


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    # torch's save_on_cpu waits for the copy and loses the strides of channels-last.
    pinned = tensor.device.type != "cpu"
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return tensor.device, copy.copy_(tensor, non_blocking=pinned)


def _to_device(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, copy = packed
    return copy.to(device, non_blocking=True)
