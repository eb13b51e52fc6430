"""The part of each parameter that this rank owns, whatever the ZeRO stage.

A flat partition is one of the flat fp32 tensors that the torch optimizer steps, with its fragments of parameters.
EMA, checkpoints and a run's weights are made of flat partitions only.
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
    """A run of elements of the flattened parameter `name`, and its position in the flat partition."""

    name: str
    start: int  # in the parameter
    offset: int  # in the master
    numel: int


class FlatPartition(NamedTuple):
    """An fp32 master tensor of this rank and its fragments of parameters."""

    master: torch.Tensor
    fragments: tuple[Fragment, ...]


class Partitions:
    """All flat partitions of this rank.

    Attributes:
        flat: the flat partitions, in the order of the optimizer's groups.
        shapes: of every parameter of the whole network, by name.
        replicated: each replica has everything (ZeRO 0).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._params: dict[str, nn.Parameter] = dict(engine.network.named_parameters())
        self.stage: int = engine.deepspeed.zero_optimization_stage()
        self.shapes = {name: internals.full_shape(p) for name, p in self._params.items()}
        self.replicated = self.stage == 0
        self._all = self  # of which this may be a part: see `to_average`
        self.optimizer = internals.torch_optimizer(engine.deepspeed)
        self.flat = self._whole() if self.replicated else self._partitioned()

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
        """Return the tensors that key the torch optimizer's state, each with its flat partition."""
        keys = self._params.values() if self.replicated else internals.flat_masters(self._engine.deepspeed)
        return list(zip(keys, self.flat, strict=True))

    def to_average(self) -> Partitions:
        """Return what this rank averages for the EMA: all it owns, or its share where all replicas own the same."""
        if not self.replicated or self._engine.dp_size == 1:
            return self
        ranks, rank = self._engine.dp_size, self._engine.dp_rank
        total = sum(partition.master.numel() for partition in self.flat)
        first, last = total * rank // ranks, total * (rank + 1) // ranks
        part = copy.copy(self)
        part.flat, begin = [], 0
        for partition in self.flat:
            end = begin + partition.master.numel()
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                fragment = Fragment(partition.fragments[0].name, start, 0, stop - start)
                part.flat.append(FlatPartition(partition.master.view(-1)[start:stop], (fragment,)))
            begin = end
        return part

    def gather(
        self, tensors: Sequence[torch.Tensor], names: Sequence[str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather each parameter's values from `tensors`, one tensor per flat partition and shaped like its master.

        Every rank must run this to its end. A yielded tensor is valid until the next one.

        Yields:
            (name, fp32 tensor of the parameter's shape), in the order of `names` (default: all).
        """
        where: dict[str, list[tuple[Fragment, torch.Tensor]]] = {}
        for partition, tensor in zip(self.flat, tensors, strict=True):
            for fragment in partition.fragments:
                where.setdefault(fragment.name, []).append((fragment, tensor))
        for bucket in self._buckets(names or list(self.shapes)):
            if self._has_all():
                yield from ((name, where[name][0][1]) for name in bucket)
                continue
            numels = [torch.Size(self.shapes[name]).numel() for name in bucket]
            flat = torch.zeros(sum(numels), dtype=torch.float32, device=self._device())
            views = flat.split(numels)
            for name, view in zip(bucket, views, strict=True):
                for fragment, tensor in where.get(name, ()) if self._contributes() else ():
                    part = tensor.reshape(-1)[fragment.offset : fragment.offset + fragment.numel]
                    view[fragment.start : fragment.start + fragment.numel] = part
            all_reduce_sum(flat)
            yield from (
                (name, view.view(self.shapes[name])) for name, view in zip(bucket, views, strict=True)
            )

    def scatter(self, tensors: Sequence[torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
        """Write this rank's fragments of `read(name)` into `tensors`, one per flat partition."""
        for partition, tensor in zip(self.flat, tensors, strict=True):
            for fragment in partition.fragments:
                part = read(fragment.name).reshape(-1)[fragment.start : fragment.start + fragment.numel]
                tensor.view(-1)[fragment.offset : fragment.offset + fragment.numel].copy_(part)

    @contextmanager
    def swap_parameters(self, tensors: Sequence[torch.Tensor], buffers: torch.Tensor) -> Iterator[None]:
        """Inside, the engine predicts with the values of `tensors`, one per flat partition, and with `buffers`."""
        live = self._engine.buffers.flat
        # Under ZeRO 0 in fp32 the masters are the network's own parameters, which copying overwrites.
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
        """Make the network compute with the values of `tensors`, without touching the masters.

        Under ZeRO 0 in fp32 the network's parameters are the masters: there the caller must keep a copy of them.
        """
        if self.stage == 3:
            self._copy_sharded_to_model(tensors)
            return
        for name, value in self.gather(tensors):
            if name in self._params:
                self._params[name].data.copy_(value)

    def _copy_sharded_to_model(self, tensors: Sequence[torch.Tensor]) -> None:
        with internals.persistent_parameters_sharded(self._engine.deepspeed.optimizer):
            for partition, tensor in zip(self.flat, tensors, strict=True):
                for fragment in partition.fragments:
                    own = internals.shard(self._params[fragment.name]).data
                    own[: fragment.numel].copy_(tensor[fragment.offset : fragment.offset + fragment.numel])

    def masters(self) -> list[torch.Tensor]:
        """Return the masters, one per flat partition."""
        return [partition.master for partition in self.flat]

    def state(self) -> dict[str, list[torch.Tensor]]:
        """Return the optimizer's tensors by name, one per flat partition; empty before the first step."""
        state: dict[str, list[torch.Tensor]] = {}
        for key, partition in self.optimizer_keys():
            for name, value in self.optimizer.state[key].items():
                if torch.is_tensor(value) and value.shape == partition.master.shape:
                    state.setdefault(name, []).append(value)
        return {name: values for name, values in state.items() if len(values) == len(self.flat)}

    def scalars(self) -> dict[str, float]:
        """Return the optimizer's numbers, such as Adam's step: state that has not a master's shape."""
        key, partition = self.optimizer_keys()[0]
        return {
            name: float(value)
            for name, value in self.optimizer.state[key].items()
            if value is not None and not (torch.is_tensor(value) and value.shape == partition.master.shape)
        }

    def make_state(self, names: Sequence[str], scalars: Mapping[str, float]) -> dict[str, list[torch.Tensor]]:
        """Create the optimizer's state where there is none before its first step, to be filled from a checkpoint."""
        for key, partition in self.optimizer_keys():
            own = self.optimizer.state[key]
            for name in names:
                if own.get(name) is None:  # else it may be mapped to a file
                    own[name] = torch.zeros_like(partition.master)
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
        """Whether this rank has every value, so that gathering needs no communication."""
        return self.replicated and self._all is self

    def _contributes(self) -> bool:
        """Whether this rank adds its values when they are gathered; of replicas only one does."""
        return True

    def _device(self) -> torch.device:
        return self._engine.device
