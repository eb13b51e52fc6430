"""What is counted of a model once, for all strategies and micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from dsyolo.assign import MIN_CAPACITY
from dsyolo.batch import Targets
from dsyolo.loss import DetectionLoss
from dsyolo.model.activations import PRIME, Activations, count_activations
from dsyolo.model.costs import NodeCost, node_costs, parameters_in_order
from dsyolo.model.moments import Moments, follow
from dsyolo.model.stage import Stage
from dsyolo.model.yolov5 import YOLOv5, build_yolov5
from dsyolo.optim import parameter_groups

CAPACITY = 8 * MIN_CAPACITY  # matches per level that the loss is counted with: some hundred labels
KINDS = {  # of precisions, that keep the same bytes
    "fp32": "fp32",
    "autocast_bf16": "autocast_bf16",
    "autocast_fp16": "autocast_bf16",
    "bf16": "bf16",
    "fp16": "bf16",
}
FOLLOWED = "autocast_bf16"
Groups = tuple[tuple[int, ...], ...]


class Counts(NamedTuple):
    """Of a model and an image size."""

    model: str
    image_size_px: int
    network: YOLOv5  # without memory
    costs: tuple[tuple[NodeCost, ...], ...]  # of one image, and of two
    modules: tuple[tuple[int, ...], ...]
    num_parameters: int
    num_statistics: int  # elements of BatchNorm's running means and variances
    activations: dict[str, Activations]  # of PRIME images, by kind of precision
    plain: Moments  # of a pass in autocast
    recomputed: Moments  # the same, with all blocks recomputed

    def of_batch(self, precision: str, num_images: int) -> Activations:
        """What autograd saves for a micro-batch."""
        return self.activations[KINDS[precision]].of_batch(num_images)

    def groups(self, start: int, stop: int) -> Groups:
        """Elements of each parameter of nodes `start` .. `stop` - 1, in the optimizer's groups."""
        groups = parameter_groups(Stage(self.network, start, stop, ())).values()
        return tuple(tuple(p.numel() for p in group) for group in groups if group)


def count(model: str, image_size_px: int, num_classes: int) -> Counts:
    """All that plans need of a model."""
    with torch.device("meta"):
        network = build_yolov5(model, num_classes)
    shape, loss = (PRIME, 3, image_size_px, image_size_px), _Loss(image_size_px)
    plain, recomputed = (
        follow(network, image_size_px, FOLLOWED, loss, names)
        for names in (frozenset[str](), network.blocks())
    )
    modules = tuple(parameters_in_order(network))
    return Counts(
        network.variant,
        image_size_px,
        network,
        tuple(tuple(node_costs(network, (num, *shape[1:]))) for num in (1, 2)),
        modules,
        num_parameters=sum(map(sum, modules)),
        num_statistics=sum(b.numel() for name, b in network.named_buffers() if "running" in name),
        activations={kind: count_activations(network, shape, kind) for kind in set(KINDS.values())},
        plain=plain,
        recomputed=recomputed,
    )


class _Loss:
    """The loss over the maps of a network on fake tensors, as `Engine` computes it."""

    def __init__(self, image_size_px: int) -> None:
        self._size_px = image_size_px

    def __call__(self, network: nn.Module, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        shape = (len(maps), CAPACITY)
        numbers = [torch.zeros(shape, dtype=torch.int64) for _ in range(2)]
        targets = Targets(
            numbers[0],
            torch.zeros((*shape, 4)),
            numbers[1],
            torch.zeros(shape),
            torch.zeros(len(maps)),
            torch.zeros(()),
        )
        loss = DetectionLoss(network.anchors, network.num_classes, self._size_px)
        return loss(maps, targets)[0]
