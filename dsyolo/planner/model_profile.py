"""Memory and FLOPs that a network needs per image: counted once, then scaled to any micro-batch."""

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsyolo.config.spec import Precision
from dsyolo.models.activation_memory import DTYPES, Activations, count_activations, fake_copy
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.flops import NodeCost, node_costs
from dsyolo.models.registry import meta_network


class ModelProfile:
    """The memory and work of one network on square images of one size."""

    def __init__(self, model: str, num_classes: int, image_size_px: int) -> None:
        self.model, self.num_classes, self.image_size_px = model, num_classes, image_size_px
        self.network: DetectionNetwork = meta_network(model, num_classes)
        self.numels = [p.numel() for p in self.network.parameters()]
        self.num_parameters = sum(self.numels)
        self.layers = self.network.has_parameters
        self._pairs: dict[Precision, tuple[Activations, Activations]] = {}
        self._inferred: dict[Precision, tuple[int, int]] = {}  # bytes of each image, and beside them

    def _shape(self, images: int) -> tuple[int, ...]:
        return images, 3, self.image_size_px, self.image_size_px

    def activations(self, images: int, precision: Precision) -> Activations:
        """Return what `count_activations` gives for a micro-batch of `images`.

        Every storage is linear in them, so two and three are counted and extrapolated; one alone may have another layout.
        """
        precision = precision.with_bf16()
        if precision not in self._pairs:
            two, three = (count_activations(self.network, self._shape(n), precision) for n in (2, 3))
            self._pairs[precision] = two, three
        two, three = self._pairs[precision]
        sizes = {key: size + (images - 2) * (three.sizes[key] - size) for key, size in two.sizes.items()}
        return two._replace(sizes=sizes)

    def most_inferred(self, free_bytes: int, precision: Precision) -> int:
        """Return how many images a forward pass without gradients can take in `free_bytes`."""
        precision = precision.with_bf16()
        if precision not in self._inferred:
            two, three = (inference_bytes(self.network, self._shape(n), precision) for n in (2, 3))
            self._inferred[precision] = three - two, 3 * two - 2 * three
        each, fixed = self._inferred[precision]
        return max(0, (free_bytes - fixed) // each)

    @cached_property
    def costs(self) -> list[NodeCost]:
        """Return the forward costs of one image, by node."""
        return node_costs(self.network, self._shape(1))

    @property
    def flops(self) -> int:
        """Return the forward FLOPs of one image: two a multiply-add."""
        return sum(cost.flops for cost in self.costs)

    def loss_bytes(self, images: int, precision: Precision) -> int:
        """Return what the loss holds between the forward and the backward pass of the network.

        The gradients of all maps in the maps' type, as the loss goes backward before the network does; the largest once
        more, while the gradient of its objectness is added to that of boxes and classes; and logits and targets of
        objectness in fp32.
        """
        num_anchors = self.network.anchors.shape[1]
        cells = [(self.image_size_px // s) ** 2 * num_anchors * images for s in self.network.strides]
        each = precision.compute_bytes
        channels = 5 + self.num_classes
        return each * channels * (sum(cells) + max(cells)) + 8 * sum(cells)


class StageProfile(NamedTuple):
    """One stage of a pipeline; without a pipeline, the whole network."""

    nodes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]  # elements of each parameter, in the optimizer's groups
    flops: int  # forward FLOPs of one image
    elements: int  # read and written for it
    boundary: int  # its elements that go to the next stage


def inference_bytes(network: DetectionNetwork, images_shape: Sequence[int], precision: Precision) -> int:
    """Return the peak bytes of a forward pass without gradients on uint8 images (B, 3, H, W), to decoded boxes.

    It is counted on fake tensors. Weights and images are not; autocast's copies of weights are.
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
