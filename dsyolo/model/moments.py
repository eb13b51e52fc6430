"""Follows every tensor of a training pass from its making to its end, without computing any.

Forward, loss and backward run on fake tensors (shapes without memory) and in autograd's own order, so that what lives
at a moment is what lives there in training: what is saved, copies, gradients on their way. A GPU's kernels may
take a workspace beside it, which no shape tells.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsyolo.model.activations import LOW_PRECISION, PRIME, fake_copy
from dsyolo.model.network import Network

BLOCK_BYTES = 512  # torch's CUDA allocator gives out multiples of it

Loss = Callable[[nn.Module, Any], torch.Tensor]  # (the network on fake tensors, its output) to a scalar


class Moments(NamedTuple):
    """Bytes at every operation of a pass, as arrays (moments,): of a batch of b images `fixed` + b * `per_image`.

    Not in them: weights, buffers and images, and the sums of weights' gradients, which are apart.
    """

    fixed: np.ndarray
    per_image: np.ndarray
    gradients: np.ndarray  # of weights, made so far, as a share of all

    def live(self, num_images: int) -> np.ndarray:
        """Bytes at each moment."""
        return self.fixed + num_images * self.per_image


def follow(
    network: Network,
    image_size_px: int,
    precision: str,
    loss: Loss,
    recomputed: frozenset[str] = frozenset(),
) -> Moments:
    """The moments of a forward and backward pass in training.

    Args:
        network: its tensors may be on any device, meta included: they are not read.
        precision: fp32, autocast_bf16, autocast_fp16, bf16 or fp16, as in `DsConfig`.
        loss: of the network's output.
        recomputed: the nodes that keep their inputs alone.
    """
    autocast = precision.startswith("autocast")
    dtype = LOW_PRECISION.get(precision.removeprefix("autocast_"), torch.float32)
    with FakeTensorMode(), _no_collection():
        fake = fake_copy(network, torch.float32 if autocast else dtype).train()
        fake.recompute = recomputed
        images = torch.empty((PRIME, 3, image_size_px, image_size_px), dtype=torch.uint8)
        ledger = _Ledger([images, *fake.parameters(), *fake.buffers()])
        with ledger, ledger.telling_gradients(fake):
            with torch.autocast("cpu", dtype if autocast else None, enabled=autocast):
                maps = fake(images)
            total = loss(fake, maps)
            total.backward()  # the maps are alive meanwhile, as in Engine
    return ledger.moments()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector would look through all modules of torch again and again: a seventh of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Ledger(TorchDispatchMode):
    """Notes after each operation what lives of all that was made under it. Views of what was there before are nothing."""

    def __init__(self, uncounted: Iterable[torch.Tensor]) -> None:
        super().__init__()
        there = (tensor.untyped_storage()._cdata for tensor in uncounted)
        self._living = dict.fromkeys(there, (0, 0))  # (fixed, per image) bytes of each storage
        self._now = [0, 0, 0]  # fixed, per image, gradients of weights
        self._line: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self._line.append(tuple(self._now))
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._living:
            return
        size = storage.nbytes()
        grows = size and size % PRIME == 0
        bytes_ = (0, size // PRIME) if grows else (-(-size // BLOCK_BYTES) * BLOCK_BYTES, 0)
        self._living[key] = bytes_
        self._add(bytes_, 1)
        weakref.finalize(storage, self._gone, key).atexit = False

    def _gone(self, key: int) -> None:
        self._add(self._living.pop(key, (0, 0)), -1)

    def _add(self, bytes_: tuple[int, int], sign: int) -> None:
        self._now[0] += sign * bytes_[0]
        self._now[1] += sign * bytes_[1]

    @contextmanager
    def telling_gradients(self, module: nn.Module) -> Iterator[None]:
        """Inside, a weight's gradient is counted apart once it is there."""

        def there(parameter: torch.Tensor) -> None:
            key = parameter.grad.untyped_storage()._cdata
            self._add(self._living.pop(key, (0, 0)), -1)
            self._living[key] = (0, 0)
            self._now[2] += parameter.grad.nbytes

        hooks = [p.register_post_accumulate_grad_hook(there) for p in module.parameters()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def moments(self) -> Moments:
        fixed, per_image, gradients = np.array(self._line, np.int64).T
        return Moments(fixed, per_image, gradients / max(1, gradients[-1]))
