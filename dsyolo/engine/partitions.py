"""The part of each parameter that this rank owns, whatever the ZeRO stage.

EMA, checkpoints and a run's weights are made of flat partitions only.
"""

from __future__ import annotations

import copy
import math
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
    in_parameter: slice
    in_master: slice


class FlatPartition(NamedTuple):
    """One of the flat fp32 tensors that the torch optimizer steps, with its fragments of parameters."""

    key: torch.Tensor  # key into the torch optimizer's state
    master: torch.Tensor  # the same memory
    fragments: list[Fragment]


class Partitions:
    """All flat partitions of this rank.

    Attributes:
        flat: the flat partitions, in the order of the optimizer's groups.
        shapes: of every parameter of the whole network, by name.
        replicated: each data-parallel rank has everything (ZeRO 0).
        has_all: this one has all values, so that gathering needs no communication.
        contributes: adds its values to what is gathered; of several ranks with the same values only one does.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._params: dict[str, nn.Parameter] = dict(engine.network.named_parameters())
        self.stage: int = engine.ds_engine.zero_optimization_stage()
        self.shapes = {name: internals.full_shape(p) for name, p in self._params.items()}
        self.replicated = self.stage == 0
        self._all = self  # the partitions that these may be a part of: see `to_average`
        self.has_all, self.contributes = self.replicated, True
        self.optimizer = internals.torch_optimizer(engine.ds_engine)
        self.flat = self._whole() if self.replicated else self._partitioned()

    def _whole(self) -> list[FlatPartition]:
        return [
            FlatPartition(p, p.detach(), [Fragment(name, slice(p.numel()), slice(p.numel()))])
            for name, p in self._params.items()
        ]

    def _partitioned(self) -> list[FlatPartition]:
        engine, rank = self._engine.ds_engine, torch.distributed.get_rank()
        flat = [FlatPartition(master, master.detach(), []) for master in internals.flat_masters(engine)]
        for name, p in self._params.items():
            if found := internals.fragment_address(engine, p, rank):
                group, start, offset, numel = found
                fragment = Fragment(name, slice(start, start + numel), slice(offset, offset + numel))
                flat[group].fragments.append(fragment)
        return flat

    def to_average(self) -> Partitions:
        """Return what this rank averages for the EMA: all it owns, or its share where others own the same."""
        if not self.replicated or self._engine.dp_size == 1:
            return self
        ranks, rank = self._engine.dp_size, self._engine.dp_rank
        total = sum(partition.master.numel() for partition in self.flat)
        first, last = total * rank // ranks, total * (rank + 1) // ranks
        part = copy.copy(self)
        part.has_all, part.contributes = False, True
        part.flat, begin = [], 0
        for key, master, (fragment,) in self.flat:
            end = begin + master.numel()
            start, stop = max(first, begin) - begin, min(last, end) - begin
            if start < stop:
                own = Fragment(fragment.name, slice(start, stop), slice(stop - start))
                part.flat.append(FlatPartition(key, master.view(-1)[start:stop], [own]))
            begin = end
        return part

    def gather(self, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each parameter's name and fp32 values, in the order of `shapes`.

        Every rank must run this to its end. A yielded tensor is valid until the next one.

        Args:
            tensors: one per flat partition, shaped like its master.
        """
        where: dict[str, list[tuple[Fragment, torch.Tensor]]] = {}
        for partition, tensor in zip(self.flat, tensors, strict=True):
            for fragment in partition.fragments:
                where.setdefault(fragment.name, []).append((fragment, tensor))
        if self.has_all:
            yield from ((name, where[name][0][1]) for name in self.shapes)
            return
        for bucket in self._buckets():
            numels = [math.prod(self.shapes[name]) for name in bucket]
            flat = torch.zeros(sum(numels), dtype=torch.float32, device=self._engine.device)
            views = flat.split(numels)
            for name, view in zip(bucket, views, strict=True):
                for fragment, tensor in where.get(name, ()) if self.contributes else ():
                    view[fragment.in_parameter] = tensor.reshape(-1)[fragment.in_master]
            all_reduce_sum(flat)
            yield from ((name, v.view(self.shapes[name])) for name, v in zip(bucket, views, strict=True))

    def scatter(self, tensors: Sequence[torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
        """Write this rank's fragments of `read(name)` into `tensors`, one per flat partition."""
        for partition, tensor in zip(self.flat, tensors, strict=True):
            for fragment in partition.fragments:
                values = read(fragment.name).reshape(-1)[fragment.in_parameter]
                tensor.view(-1)[fragment.in_master].copy_(values)

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
        except (RuntimeError, MemoryError):
            raise  # of this rank alone, most likely: to restore takes all ranks, and what is raised ends or restarts the run
        except BaseException:
            self._restore(kept, kept_buffers)
            raise
        self._restore(kept, kept_buffers)

    def _restore(self, kept: Sequence[torch.Tensor], kept_buffers: torch.Tensor) -> None:
        self._all.copy_to_model(kept)
        self._engine.buffers.flat.copy_(kept_buffers)

    def swap_trained_parameters(self) -> AbstractContextManager[None]:
        """Inside, the engine predicts with the weights that are trained."""
        return nullcontext()

    @torch.no_grad()
    def copy_to_model(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the network compute with the values of `tensors`, without touching the masters.

        Under ZeRO 0 in fp32 the network's parameters are the masters: there the caller must keep a copy of them.
        """
        if self.stage < 3:
            for name, value in self.gather(tensors):
                if name in self._params:
                    self._params[name].data.copy_(value)
            return
        with internals.persistent_parameters_sharded(self._engine.ds_engine.optimizer):
            for partition, tensor in zip(self.flat, tensors, strict=True):
                for fragment in partition.fragments:
                    values = tensor[fragment.in_master]
                    internals.shard(self._params[fragment.name]).data[: len(values)].copy_(values)

    def masters(self) -> list[torch.Tensor]:
        return [partition.master for partition in self.flat]

    def state(self) -> dict[str, list[torch.Tensor]]:
        """Return the optimizer's tensors by name, one per flat partition; empty before the first step."""
        state: dict[str, list[torch.Tensor]] = {}
        for partition in self.flat:
            for name, value in self.optimizer.state[partition.key].items():
                if torch.is_tensor(value) and value.shape == partition.master.shape:
                    state.setdefault(name, []).append(value)
        return {name: values for name, values in state.items() if len(values) == len(self.flat)}

    def scalars(self) -> dict[str, float]:
        """Return the optimizer's numbers, such as Adam's step: state that has not a master's shape."""
        first = self.flat[0]
        return {
            name: float(value)
            for name, value in self.optimizer.state[first.key].items()
            if value is not None and not (torch.is_tensor(value) and value.shape == first.master.shape)
        }

    def make_state(self, names: Sequence[str], scalars: Mapping[str, float]) -> dict[str, list[torch.Tensor]]:
        """Create the optimizer's state where there is none before its first step, to be filled from a checkpoint."""
        for partition in self.flat:
            own = self.optimizer.state[partition.key]
            for name in names:
                if own.get(name) is None:  # else it may be mapped to a file
                    own[name] = torch.zeros_like(partition.master)
            for name, value in scalars.items():
                own[name] = torch.tensor(value)
        return self.state()

    def _buckets(self) -> Iterator[list[str]]:
        bucket: list[str] = []
        size = 0
        for name, shape in self.shapes.items():
            numel = math.prod(shape)
            if bucket and size + numel > GATHER_ELEMENTS:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += numel
        if bucket:
            yield bucket
