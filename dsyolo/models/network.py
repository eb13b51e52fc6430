"""A network as a sequence of named nodes: the only graph logic.

Between two nodes live the boundary activations: the outputs that some later node still reads, in the order in
which they were made. So any slice of the sequence is a pipeline stage, and no output lives longer than needed.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dsyolo.models.activation_checkpointing import run_checkpointed
from dsyolo.models.blocks import BatchNorm


class Node(NamedTuple):
    """A module with a name, and the names of the nodes (or of the input) whose outputs it reads.

    Without `reads` it reads the node before it, the first one the input.
    """

    name: str
    module: nn.Module
    reads: tuple[str, ...] = ()


class NodeLink(NamedTuple):
    """How one node uses the boundary activations before it."""

    reads: tuple[int, ...]  # positions among them
    keeps: tuple[int, ...]  # positions that stay alive; the node's own output is appended


def connect(nodes: Sequence[Node], source: str = "images") -> tuple[NodeLink, ...]:
    """Find by liveness which boundary activations each node reads and which it passes on.

    Invariant: the boundary activations after node i are exactly the outputs that a node after i reads; after the
    last node, its output alone.

    Raises:
        AssertionError: a name is used twice, read before it exists, or never read.
    """
    assert nodes, "a network needs at least one node"
    names = [node.name for node in nodes]
    reads = [node.reads or (before,) for node, before in zip(nodes, [source, *names], strict=False)]
    assert len(set(names) | {source}) == len(nodes) + 1, "a node's name is used twice"
    last_read = {read: i for i, own in enumerate(reads) for read in own}
    boundary, links = [source], []
    for i, (name, own) in enumerate(zip(names, reads, strict=True)):
        assert set(own) <= set(boundary), f"{name} reads {own}, but only {boundary} are alive"
        keeps = tuple(k for k, alive in enumerate(boundary) if last_read.get(alive, -1) > i)
        links.append(NodeLink(tuple(boundary.index(read) for read in own), keeps))
        boundary = [boundary[k] for k in keeps] + [name]
    unread = set(names[:-1]) - last_read.keys()
    assert not unread, f"{sorted(unread)} are made and never read"
    return tuple(links)


class Network(nn.Module):
    """Runs the nodes in order. Parameter names start with the node's name, in the whole network and in stages.

    Args:
        nodes: the sequence; the last one makes the output.

    Attributes:
        checkpointed: names of the nodes under activation checkpointing: they keep only their inputs.
        offload_inputs: whether those inputs wait in host memory.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        self.links = connect(nodes)
        self.order = tuple(node.name for node in nodes)
        self.checkpointed: frozenset[str] = frozenset()
        self.offload_inputs = False
        for node in nodes:
            self.add_module(node.name, node.module)

    @property
    def has_parameters(self) -> tuple[bool, ...]:
        """Return, for every node in order, whether it has parameters."""
        return tuple(any(True for _ in self.get_submodule(name).parameters()) for name in self.order)

    def blocks(self) -> frozenset[str]:
        """Return the names of the nodes worth checkpointing: those that keep activations besides their inputs.

        Nodes with parameters; the last node only if it has a BatchNorm, as plain convolutions keep only inputs.
        """
        *inner, last = self.order
        found = {name for name, has in zip(inner, self.has_parameters, strict=False) if has}
        if any(isinstance(part, BatchNorm) for part in self.get_submodule(last).modules()):
            found.add(last)
        return frozenset(found)

    def run(self, boundary: tuple[torch.Tensor, ...], start: int, stop: int) -> tuple:
        """Run nodes `start` .. `stop` - 1; return the boundary activations after them, from those before them."""
        for name, link in zip(self.order[start:stop], self.links[start:stop], strict=True):
            module, inputs = self.get_submodule(name), tuple(boundary[k] for k in link.reads)
            if name in self.checkpointed and torch.is_grad_enabled():
                out = run_checkpointed(module, inputs, offload=self.offload_inputs)
            else:
                out = module(*inputs)
            boundary = (*(boundary[k] for k in link.keeps), out)
        return boundary

    def forward(self, images: torch.Tensor) -> Any:
        """Return the last node's output for `images`."""
        (out,) = self.run((images,), 0, len(self.order))
        return out


class PipelineStage(nn.Module):
    """Nodes `start` .. `stop` - 1 of `network`.

    Boundary activations travel as one flat tensor: k tensors would cost k backward passes through the stage and
    2 k messages.

    Args:
        network: the whole; its modules are shared, not copied.
        incoming: shapes (B, C, H, W) of the boundary activations before node `start`; the first stage needs none.
    """

    def __init__(self, network: Network, start: int, stop: int, incoming: Sequence[tuple[int, ...]]) -> None:
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


def unpack(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    """Return the tensors that `pack` took, as channels-last views."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return tuple(
        part.view(b, h, w, c).permute(0, 3, 1, 2) for part, (b, c, h, w) in zip(parts, shapes, strict=True)
    )
