"""What this rank owns of each parameter, whatever the ZeRO stage: the one place that knows DeepSpeed's partitions.

A holding is one of the flat fp32 tensors that the torch optimizer steps, with the pieces of parameters in it.
EMA, checkpoints and the weights of a run are made of holdings and of nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from dsyolo.cluster.collectives import all_reduce_sum
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.engine import Engine

GATHER_ELEMENTS = 1 << 24  # 64 MiB of fp32 at a time, while tensors are gathered


class Fragment(NamedTuple):
    """A run of elements of the parameter `name`, flattened, and where it lies in the holding."""

    name: str
    start: int  # in the parameter
    offset: int  # in the holding
    numel: int


class FlatPartition(NamedTuple):
    """A fp32 master tensor of this rank and the pieces of parameters that it is made of."""

    master: torch.Tensor
    pieces: tuple[Fragment, ...]


class Partitions:
    """All holdings of this rank.

    Attributes:
        holdings: in the order of the optimizer's groups.
        shapes: of every parameter of the whole network, by name.
        replicated: each replica holds everything (ZeRO 0).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._params: dict[str, nn.Parameter] = dict(engine.network.named_parameters())
        self.stage: int = engine.deepspeed.zero_optimization_stage()
        self.shapes = {name: internals.full_shape(p) for name, p in self._params.items()}
        self.replicated = self.stage == 0
        self._all = self  # of which this may be a part: see `to_average`
        self.optimizer = internals.torch_optimizer(engine.deepspeed)
        self.holdings = self._whole() if self.replicated else self._partitioned()

    def _whole(self) -> list[FlatPartition]:
        return [
            FlatPartition(p.detach(), (Fragment(name, 0, 0, p.numel()),)) for name, p in self._params.items()
        ]

    def _partitioned(self) -> list[FlatPartition]:
        engine, rank = self._engine.deepspeed, torch.distributed.get_rank()
        masters = internals.flat_masters(engine)
        fragments: list[list[Fragment]] = [[] for _ in masters]
        for name, p in self._params.items():
            if found := internals.fragment_address(engine, p, rank):
                fragments[found.group].append(Fragment(name, found.start, found.offset, found.numel))
        return [FlatPartition(m.detach(), tuple(f)) for m, f in zip(masters, fragments, strict=True)]

    def optimizer_keys(self) -> list[tuple[torch.nn.Parameter, FlatPartition]]:
        """The tensors by which the torch optimizer knows its state, one per holding."""
        keys = self._params.values() if self.replicated else internals.flat_masters(self._engine.deepspeed)
        return list(zip(keys, self.holdings, strict=True))

    def to_average(self) -> Partitions:
        """What this rank averages for the EMA: what it holds, or its share of that where all replicas hold the same."""
        if not self.replicated or self._engine.dp_size == 1:
            return self
        ranks, rank = self._engine.dp_size, self._engine.dp_rank
        total = sum(holding.master.numel() for holding in self.holdings)
        first, last = total * rank // ranks, total * (rank + 1) // ranks
        part = copy.copy(self)
        part.holdings, begin = [], 0
        for holding in self.holdings:
            end = begin + holding.master.numel()
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                piece = Fragment(holding.pieces[0].name, start, 0, stop - start)
                part.holdings.append(FlatPartition(holding.master.view(-1)[start:stop], (piece,)))
            begin = end
        return part

    def gather(
        self, tensors: Sequence[torch.Tensor], names: Sequence[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole of each parameter's values in `tensors`, one tensor per holding and like its master.

        Every rank must run this to its end. What is yielded is valid until the next one.

        Yields:
            (name, fp32 tensor of the parameter's shape), in the order of `names` (default: all).
        """
        where: dict[str, list[tuple[Fragment, torch.Tensor]]] = {}
        for holding, tensor in zip(self.holdings, tensors, strict=True):
            for piece in holding.pieces:
                where.setdefault(piece.name, []).append((piece, tensor))
        for bucket in self._buckets(names or list(self.shapes)):
            if self._has_all():
                yield from ((name, where[name][0][1]) for name in bucket)
                continue
            numels = [torch.Size(self.shapes[name]).numel() for name in bucket]
            flat = torch.zeros(sum(numels), dtype=torch.float32, device=self._device())
            views = flat.split(numels)
            for name, view in zip(bucket, views, strict=True):
                for piece, tensor in where.get(name, ()) if self._gives() else ():
                    part = tensor.reshape(-1)[piece.offset : piece.offset + piece.numel]
                    view[piece.start : piece.start + piece.numel] = part
            all_reduce_sum(flat)
            yield from (
                (name, view.view(self.shapes[name])) for name, view in zip(bucket, views, strict=True)
            )

    def scatter(self, tensors: Sequence[torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
        """Writes this rank's pieces of `read(name)` into `tensors`, one per holding."""
        for holding, tensor in zip(self.holdings, tensors, strict=True):
            for piece in holding.pieces:
                part = read(piece.name).reshape(-1)[piece.start : piece.start + piece.numel]
                tensor.view(-1)[piece.offset : piece.offset + piece.numel].copy_(part)

    @contextmanager
    def swap_parameters(self, tensors: Sequence[torch.Tensor], buffers: torch.Tensor) -> Iterator[None]:
        """Inside, the engine predicts with the values of `tensors`, one per holding, and with `buffers`."""
        live = self._engine.buffers.flat
        # Under ZeRO 0 in fp32 the masters are the network's own parameters, which publishing overwrites.
        masters = self._all.masters()
        kept = [master.clone() for master in masters] if self.replicated else masters
        kept_buffers = live.clone()
        self.copy_to_model(tensors)
        live.copy_(buffers)
        try:
            yield
        finally:
            self._all.copy_to_model(kept)
            live.copy_(kept_buffers)

    def swap_trained_parameters(self) -> AbstractContextManager[None]:
        """Inside, the engine predicts with the weights that are trained."""
        return nullcontext()

    @torch.no_grad()
    def copy_to_model(self, tensors: Sequence[torch.Tensor]) -> None:
        """Makes the network compute with the values of `tensors`, without touching the masters.

        Under ZeRO 0 in fp32 the network's parameters are the masters: there `tensors` must be other ones, kept
        by the caller together with a copy to come back to.
        """
        if self.stage == 3:
            self._copy_sharded_to_model(tensors)
            return
        for name, value in self.gather(tensors):
            if name in self._params:
                self._params[name].data.copy_(value)

    def _copy_sharded_to_model(self, tensors: Sequence[torch.Tensor]) -> None:
        with internals.persistent_parameters_sharded(self._engine.deepspeed.optimizer):
            for holding, tensor in zip(self.holdings, tensors, strict=True):
                for piece in holding.pieces:
                    own = internals.shard(self._params[piece.name]).data
                    own[: piece.numel].copy_(tensor[piece.offset : piece.offset + piece.numel])

    def masters(self) -> list[torch.Tensor]:
        """The masters, one per holding."""
        return [holding.master for holding in self.holdings]

    def state(self) -> dict[str, list[torch.Tensor]]:
        """The optimizer's tensors by their name there, each one per holding; made where the first step has not."""
        state: dict[str, list[torch.Tensor]] = {}
        for key, holding in self.optimizer_keys():
            for name, value in self.optimizer.state[key].items():
                if torch.is_tensor(value) and value.shape == holding.master.shape:
                    state.setdefault(name, []).append(value)
        return {name: values for name, values in state.items() if len(values) == len(self.holdings)}

    def scalars(self) -> dict[str, float]:
        """The optimizer's numbers that are no tensors of a holding's shape, such as Adam's step."""
        key, holding = self.optimizer_keys()[0]
        return {
            name: float(value)
            for name, value in self.optimizer.state[key].items()
            if value is not None and not (torch.is_tensor(value) and value.shape == holding.master.shape)
        }

    def make_state(self, names: Sequence[str], scalars: Mapping[str, float]) -> dict[str, list[torch.Tensor]]:
        """Creates the optimizer's state where there is none before its first step, to be filled from a checkpoint."""
        for key, holding in self.optimizer_keys():
            own = self.optimizer.state[key]
            for name in names:
                if own.get(name) is None:  # else it may lie in a file
                    own[name] = torch.zeros_like(holding.master)
            for name, value in scalars.items():
                own[name] = torch.tensor(value)
        return self.state()

    def _buckets(self, names: Sequence[str]) -> Iterator[list[str]]:
        bucket, size = [], 0
        for name in names:
            numel = torch.Size(self.shapes[name]).numel()
            if bucket and size + numel > GATHER_ELEMENTS:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += numel
        if bucket:
            yield bucket

    def _has_all(self) -> bool:
        """Whether this rank holds every value, so that gathering needs no communication."""
        return self.replicated and self._all is self

    def _gives(self) -> bool:
        """Whether this rank adds what it holds when values are gathered; of replicas only one does."""
        return True

    def _device(self) -> torch.device:
        return self._engine.device
