"""What a network needs for an image, counted once and then known for every size of micro-batch."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from dsyolo.config.spec import Precision
from dsyolo.models.activation_memory import Activations, count_each
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.flops import NodeCost, node_costs
from dsyolo.models.inference_memory import inference_bytes
from dsyolo.models.registry import meta_network


class ModelProfile:
    """Of one network and size of images.

    Args:
        model: variant.
        num_classes: K.
        image_size_px: side of the square images.
    """

    def __init__(self, model: str, num_classes: int, image_size_px: int) -> None:
        self.model, self.num_classes, self.image_size_px = model, num_classes, image_size_px
        self.network: DetectionNetwork = meta_network(model, num_classes)
        self.numels = [p.numel() for p in self.network.parameters()]
        self.num_parameters = sum(self.numels)
        self.layers = tuple(
            any(True for _ in self.network.get_submodule(name).parameters()) for name in self.network.order
        )
        self._pairs: dict[Precision, tuple[Activations, Activations]] = {}
        self._inferred: dict[Precision, tuple[int, int]] = {}  # bytes of each image, and beside them

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size_px, self.image_size_px

    def activations(self, images: int, precision: Precision) -> Activations:
        """What `count_activations` counts for a micro-batch of `images`: every storage is linear in them.

        So it is counted for two and for three of them (one alone may be of another layout), and drawn through both.
        """
        precision = precision.with_bf16()
        if precision not in self._pairs:
            shapes = [(images, *self.image_shape) for images in (2, 3)]
            self._pairs[precision] = tuple(count_each(self.network, shapes, precision))
        two, three = self._pairs[precision]
        sizes = {
            number: size + (images - 2) * (three.sizes[number] - size) for number, size in two.sizes.items()
        }
        return two._replace(sizes=sizes)

    def most_inferred(self, free_bytes: int, precision: Precision) -> int:
        """The most images of which a forward pass without gradients takes no more; every tensor is linear in them."""
        precision = precision.with_bf16()
        if precision not in self._inferred:
            shapes = [(images, *self.image_shape) for images in (2, 3)]
            two, three = inference_bytes(self.network, shapes, precision)
            self._inferred[precision] = three - two, 3 * two - 2 * three
        each, fixed = self._inferred[precision]
        return max(0, (free_bytes - fixed) // each)

    @cached_property
    def costs(self) -> list[NodeCost]:
        """Of one image, forward."""
        return node_costs(self.network, (1, *self.image_shape))

    @property
    def flops(self) -> int:
        """Of one image, forward: two a multiply-add."""
        return sum(cost.flops for cost in self.costs)

    def loss_bytes(self, images: int, precision: Precision) -> int:
        """What the loss holds between the forward and the backward pass of the network.

        The maps' gradients, in the maps' type, all at once, since the loss goes backward before the network does; the
        largest of them once more while the gradient of its objectness is added to that of its boxes and classes; and
        logits and targets of objectness in fp32.
        """
        num_anchors = self.network.anchors.shape[1]
        cells = [(self.image_size_px // s) ** 2 * num_anchors * images for s in self.network.strides]
        each = precision.compute_bytes
        channels = 5 + self.num_classes
        return each * channels * (sum(cells) + max(cells)) + 8 * sum(cells)


class StageProfile(NamedTuple):
    """Of a pipeline; of one stage it is the whole network."""

    nodes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]  # elements of each parameter, in the optimizer's groups
    flops: int  # of one image, forward
    elements: int  # read and written for it
    crossing: int  # elements of it that go on to the next stage
