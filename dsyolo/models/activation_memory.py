"""Counts the activations that training keeps, exactly and without computing them, and chooses the nodes to checkpoint.

The network runs on fake tensors (shapes without memory) while hooks see what autograd saves in each node.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from dsyolo.base.errors import UserError
from dsyolo.config.run_config import budget_gib
from dsyolo.config.spec import Precision
from dsyolo.models.network import Network

N = TypeVar("N", bound=Network)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NodeBytes(NamedTuple):
    """The storages that one node keeps, by number. A storage that several nodes keep has one number."""

    name: str
    inputs: frozenset[int]  # storages that it reads
    saved: frozenset[int]  # storages that autograd saves in it, including those of its inputs
    outputs: frozenset[int]
    casts: frozenset[int] = frozenset()  # those of `saved` that are autocast's copies of its weights


class Activations(NamedTuple):
    """The storages that autograd saves in a network: activations, casts of weights, batch statistics.

    Parameters, buffers, images and what the loss keeps are not counted.
    """

    sizes: Mapping[int, int]  # bytes of each storage
    nodes: tuple[NodeBytes, ...]
    blocks: frozenset[str]  # nodes worth checkpointing: `Network.blocks`

    def bytes_of(self, storages: Iterable[int]) -> int:
        """Return their size, counting each once."""
        return sum(self.sizes[storage] for storage in set(storages))

    def peak_bytes(self, checkpointed: frozenset[str] = frozenset(), *, offload: bool = False) -> int:
        """Return the most that is kept at once.

        Before the backward pass of a node, the nodes before it keep what they saved, or only their inputs if they
        are checkpointed, and the node itself has all of its own. At the end of the forward pass autocast still
        holds its casts of all weights, including those of checkpointed nodes. With `offload` the inputs of these
        wait in host memory, which is not counted.
        """
        kept: frozenset[int] = frozenset()
        peak = 0
        for node in self.nodes:
            peak = max(peak, self.bytes_of(kept | node.saved))
            kept |= _kept(node, node.name in checkpointed, offload)
        return max(peak, self._bytes_at_turn(kept))

    def fewest(self, budget_bytes: int, *, offload: bool = False) -> frozenset[str] | None:
        """Return the fewest nodes to checkpoint so that the peak fits the budget; None if it never does.

        Node by node, of all choices with equally many checkpointed nodes only the one that keeps least is followed:
        what later nodes add does not depend on the choice.
        """
        best: dict[int, tuple[frozenset[int], frozenset[str]]] = {0: (frozenset(), frozenset())}
        for node in self.nodes:
            choices: dict[int, list[tuple[frozenset[int], frozenset[str]]]] = {}
            for count, (kept, names) in best.items():
                if self.bytes_of(kept | node.saved) > budget_bytes:
                    continue
                choices.setdefault(count, []).append((kept | node.saved, names))
                if node.name in self.blocks:
                    both = (kept | _kept(node, True, offload), names | {node.name})
                    choices.setdefault(count + 1, []).append(both)
            best = {n: min(pairs, key=lambda pair: self.bytes_of(pair[0])) for n, pairs in choices.items()}
        fitting = [n for n, (kept, _) in best.items() if self._bytes_at_turn(kept) <= budget_bytes]
        return best[min(fitting)][1] if fitting else None

    def _bytes_at_turn(self, kept: frozenset[int]) -> int:
        """Return what is kept between the forward and the backward pass."""
        return self.bytes_of(kept.union(*(node.casts for node in self.nodes)))


def _kept(node: NodeBytes, is_checkpointed: bool, offload: bool) -> frozenset[int]:
    if not is_checkpointed:
        return node.saved
    return frozenset() if offload else node.inputs


class ActivationPlan(NamedTuple):
    """The nodes that are checkpointed, and what a rank then keeps for a micro-batch."""

    counted: Activations
    checkpointed: frozenset[str] = frozenset()
    offload: bool = False

    @property
    def peak_bytes(self) -> int:
        """Return the planned peak activation bytes of the whole network."""
        return self.stage_bytes([node.name for node in self.counted.nodes])

    def stage_bytes(
        self, names: Iterable[str], in_flight: int = 1, checkpointed: frozenset[str] | None = None
    ) -> int:
        """Return the most that a pipeline stage of these nodes keeps.

        Args:
            in_flight: micro-batches whose forward pass has ended before the backward pass of the first begins.
            checkpointed: instead of the planned nodes.
        """
        checkpointed = self.checkpointed if checkpointed is None else checkpointed
        own = frozenset(names)
        part = self.counted._replace(nodes=tuple(n for n in self.counted.nodes if n.name in own))
        waiting = part.bytes_of(chain(*(_kept(n, n.name in checkpointed, self.offload) for n in part.nodes)))
        return waiting * (in_flight - 1) + part.peak_bytes(checkpointed, offload=self.offload)

    def host_bytes(self, names: Iterable[str], in_flight: int = 1) -> int:
        """Return what the stage keeps in host memory: a copy of the inputs of each checkpointed node."""
        own = frozenset(names) & self.checkpointed if self.offload else frozenset()
        copies = (self.counted.bytes_of(node.inputs) for node in self.counted.nodes if node.name in own)
        return in_flight * sum(copies)

    def explain(self) -> str:
        """Return a line for the start of a run."""
        line = f"activations: {self.peak_bytes / 2**30:.2f} GiB a micro-batch"
        if not self.checkpointed:
            return line
        of = f"{len(self.checkpointed)} of {len(self.counted.blocks)} blocks"
        return f"{line}, recomputing {of}; {self.counted.peak_bytes() / 2**30:.2f} GiB without"


def choose(activations: Activations, recompute: str | int, *, offload: bool) -> ActivationPlan:
    """Return the plan for "none", "blocks", or a budget in bytes; raise UserError if no plan fits the budget."""
    if isinstance(recompute, str):
        names = activations.blocks if recompute == "blocks" else frozenset[str]()
        return ActivationPlan(activations, names, offload)
    fewest = activations.fewest(recompute, offload=offload)
    if fewest is None:
        plain = activations.peak_bytes()
        least = activations.peak_bytes(activations.blocks, offload=offload)
        kept = f"a micro-batch keeps {budget_gib(least)} with all blocks recomputed, and {budget_gib(plain)} with none"
        remedy = f"Set it to {budget_gib(least)}, or lower train_micro_batch_size_per_gpu or --imgsz"
        problem = f"recompute: {recompute / 2**30:.4g}GiB given, but {kept}. {remedy}."
        raise UserError("The activations do not fit their budget", [problem])
    return ActivationPlan(activations, fewest, offload)


def count_activations(network: Network, images_shape: Sequence[int], precision: Precision) -> Activations:
    """Count what autograd saves in a forward pass of `network` in training, node by node.

    Storages are numbered in the order of their first use, which is the same for any number of images. The fake tensors
    are on the CPU, as fake GPU tensors would start a CUDA context; autocast treats both alike in all operations here.

    Args:
        network: on any device, meta included: its tensors are not read.
        images_shape: (B, 3, H, W), of uint8.
    """
    with FakeTensorMode():
        fake = fake_copy(network, DTYPES[precision.params]).train()
        return _count(fake, images_shape, precision, network.blocks())


def _count(
    fake: Network, images_shape: Sequence[int], precision: Precision, blocks: frozenset[str]
) -> Activations:
    images = torch.empty(images_shape, dtype=torch.uint8)
    dtype = DTYPES[precision.compute] if precision.is_autocast else None
    ledger = _Ledger([images, *fake.parameters(), *fake.buffers()])
    boundary: tuple[torch.Tensor, ...] = (images,)
    nodes = []
    with torch.autocast("cpu", dtype, enabled=precision.is_autocast):
        for i, name in enumerate(fake.order):
            inputs = ledger.numbers(boundary[k] for k in fake.links[i].reads)
            saved: list[torch.Tensor] = []
            with saved_tensors_hooks(saved.append, _unused):
                boundary = fake.run(boundary, i, i + 1)
            outputs = ledger.numbers(tree_leaves(boundary[-1]))
            kernels = {p.shape for p in fake.get_submodule(name).parameters() if p.ndim > 1}
            casts = ledger.numbers(t for t in saved if t.shape in kernels and t.dtype == dtype)
            nodes.append(NodeBytes(name, inputs, ledger.numbers(saved), outputs, casts))
    return Activations(ledger.sizes, tuple(nodes), blocks)


class _Ledger:
    """Numbers storages, without those of `uncounted`. It keeps them alive, so that no two get one number."""

    def __init__(self, uncounted: Iterable[torch.Tensor]) -> None:
        self.sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # by address
        self._uncounted = {tensor.untyped_storage()._cdata for tensor in uncounted}
        self._kept: list[torch.UntypedStorage] = []

    def numbers(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        storages = [tensor.untyped_storage() for tensor in tensors]
        numbers = set()
        for storage in storages:
            if storage._cdata not in self._uncounted:
                number = self._numbers.setdefault(storage._cdata, len(self._numbers))
                self.sizes[number] = storage.nbytes()
                numbers.add(number)
        self._kept += storages
        return frozenset(numbers)


def _unused(packed: Any) -> Any:
    raise AssertionError("no backward pass runs here")


def fake_copy(network: N, weights_dtype: torch.dtype) -> N:
    """Return a copy of `network` with fake tensors in place of its own, and no node checkpointed."""
    fakes: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        is_weight = isinstance(tensor, nn.Parameter)
        fake = torch.empty(tensor.shape, dtype=weights_dtype if is_weight else tensor.dtype)
        fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
    result = copy.deepcopy(network, fakes)
    result.checkpointed = frozenset()
    return result
