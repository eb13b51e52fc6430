"""FLOPs, parameters and memory traffic of each node of a network, counted on the meta device."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dsyolo.models.network import Network

Shape = tuple[int, ...]
BACKWARD = 2  # the backward pass does twice the work of the forward pass: gradients of inputs and of weights


class NodeCost(NamedTuple):
    """The forward pass of one node on one micro-batch."""

    name: str
    num_parameters: int
    flops: int  # two per multiply-add
    elements: int  # read and written by the node's operations
    boundary: tuple[Shape, ...]  # shapes of the boundary activations after the node


def node_costs(network: Network, images_shape: Sequence[int]) -> list[NodeCost]:
    """Return the costs of all nodes, in order, for images (B, 3, H, W). Nothing is computed."""
    empty = copy.deepcopy(network).to("meta")
    boundary: tuple = (torch.empty(images_shape, device="meta"),)
    costs = []
    with torch.no_grad():
        for i, name in enumerate(empty.order):
            traffic = _TrafficCounter()
            with FlopCounterMode(display=False) as counter, traffic:
                boundary = empty.run(boundary, i, i + 1)
            num_parameters = sum(p.numel() for p in empty.get_submodule(name).parameters())
            shapes = tuple(tuple(t.shape) for t in tree_leaves(boundary))
            costs.append(NodeCost(name, num_parameters, counter.get_total_flops(), traffic.elements, shapes))
    return costs


class _TrafficCounter(TorchDispatchMode):
    """Counts the elements that operations read and write; views do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.elements += sum(t.numel() for t in tensors)
        return out
