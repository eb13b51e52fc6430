"""Peak memory of a forward pass without gradients, counted on fake tensors."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsyolo.config.spec import Precision
from dsyolo.models.activation_memory import DTYPES, fake_copy
from dsyolo.models.detection_network import DetectionNetwork


def inference_bytes(network: DetectionNetwork, images_shape: Sequence[int], precision: Precision) -> int:
    """Return the peak bytes of tensors for uint8 images (B, 3, H, W), from the images to decoded boxes.

    Weights and images are not counted; autocast's copies of weights are.
    """
    dtype = DTYPES[precision.compute] if precision.is_autocast else None
    autocast = torch.autocast("cpu", dtype, enabled=precision.is_autocast)
    with FakeTensorMode():
        fake = fake_copy(network, DTYPES[precision.params]).eval()
        images = torch.empty(images_shape, dtype=torch.uint8)
        with torch.no_grad(), autocast, _LiveBytes() as live:
            fake.decode(fake(images))
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _address(tensor) not in before and _address(tensor) not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
