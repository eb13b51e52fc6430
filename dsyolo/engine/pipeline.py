"""The network in stages over ranks: DeepSpeed's pipeline engine behind the same interface as `Engine`."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from dsyolo.base.batch import Batch, StepStats, Targets
from dsyolo.cluster.collectives import all_reduce_sum
from dsyolo.cluster.world import ParallelDims
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.buffers import Buffers, named_buffers
from dsyolo.engine.engine import Engine
from dsyolo.engine.partitions import Partitions
from dsyolo.engine.step_timer import BACKWARD, COPY, FORWARD, OPTIMIZER, StepTimer


class PipelineEngine(Engine):
    """Trains one stage of a network. Other ranks have the other stages, or the same one with other images.

    Invariant: as `Engine`'s. The micro-batches of a data-parallel rank pass through its stages.

    Args:
        stage: this rank's slice of the network; it returns flat tensors, the last stage raw maps.
        whole: the whole network on the meta device: its names, shapes and decoding, without memory.
        others, settings: as for `Engine`. The optimizer is over the stage's parameters.
    """

    def __init__(self, stage: nn.Module, whole: nn.Module, *others: Any, **settings: Any) -> None:
        self.whole = whole
        self._whole_on_device: Any = None
        super().__init__(stage, *others, **settings)
        self._losses = torch.zeros(3, device=self.device)
        if self.ds_engine.zero_optimization_stage() == 1:
            optimizer = self.ds_engine.optimizer
            self._norm_of_stage = internals.replace_global_norm(optimizer, self._norm_of_stages)

    def train_step(self, batches: Sequence[Batch], step: int) -> tuple[StepStats, float]:
        """Take one optimizer step, as `Engine.train_step`. Only the first and the last stage read `batches`, the same ones."""
        lr = self.schedule.apply(self.ds_engine.optimizer, step)
        buffers_before = self.buffers.flat.clone()
        self._losses.zero_()
        images: Sequence[torch.Tensor | None] = [None] * self.accumulation
        labels: Sequence[Targets | None] = [None] * self.accumulation
        if self.place.is_first_stage:
            with self._phase(COPY):
                images = [self.to_device_images(batch.images) for batch in batches]
        if self.place.is_last_stage:
            labels = self._counted_targets(batches)
        self.ds_engine.train_batch(iter(zip(images, labels, strict=True)))
        micro_batch = self.ds_engine.train_micro_batch_size_per_gpu()
        return self._stats(self._losses.clone(), micro_batch, buffers_before), lr

    def _raw_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the whole network's maps: only inside `StagePartitions.swap_parameters`."""
        with self._autocast():
            return self._whole_on_device(self.to_device_images(images))

    def _decode(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._whole_on_device.decode(maps)

    def set_timer(self, timer: StepTimer) -> None:
        """Time the phases. Waiting for a neighbour stage cannot be separated from its sending: both are communication."""
        super().set_timer(timer)
        phase_of = {"LoadMicroBatch": COPY, "ForwardPass": FORWARD}
        phase_of |= {"BackwardPass": BACKWARD, "OptimizerStep": OPTIMIZER}

        def timed(name: str, instruction: Callable[..., None]) -> Callable[..., None]:
            def run(*args: Any, **settings: Any) -> None:
                with timer.phase(phase_of[name]):
                    instruction(*args, **settings)

            return run if name in phase_of else instruction

        internals.replace_instructions(self.ds_engine, timed)

    @contextmanager
    def with_whole(self) -> Iterator[nn.Module]:
        """Yield the whole network on this rank's device, for the weights of all stages; freed at the end.

        So every rank validates a share of the images, and no stage waits for another. Without gradients the whole
        takes less memory than a stage in training.
        """
        self._whole_on_device = copy.deepcopy(self.whole).to_empty(device=self.device).eval()
        dtype = next(self.network.parameters()).dtype
        for parameter in self._whole_on_device.parameters():
            parameter.data = parameter.data.to(dtype)
        try:
            yield self._whole_on_device
        finally:
            self._whole_on_device = None

    @property
    def dp_group(self) -> Any:
        return internals.dp_group(self.ds_engine)

    def _module(self) -> nn.Module:
        from deepspeed.pipe import PipelineModule

        own, num_stages = self.place.pp_rank, self.place.pp_size
        layers = [self.network if stage == own else nn.Identity() for stage in range(num_stages)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds
            return PipelineModule(layers, num_stages, loss_fn=self._loss, partition_method="uniform")

    def _loss(self, maps: tuple[torch.Tensor, ...], labels: Sequence[torch.Tensor]) -> torch.Tensor:
        total, parts = self.loss(maps, Targets(*labels))
        self._losses += parts
        return total * self._undo_averaging

    def _sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(tensor, internals.stage_group(self.ds_engine))

    def _norm_of_stages(self) -> torch.Tensor:
        """Return the gradient norm over all stages.

        ZeRO 1's own sums over stages group by group: the others would wait forever for a stage with fewer groups.
        """
        with internals.without_sum_over_stages(self.ds_engine.optimizer):
            own = torch.as_tensor(self._norm_of_stage(), dtype=torch.float32, device=self.device)
        return self._sum_over_stages(torch.where(own < 0, torch.inf, own.square())).sqrt()  # -1: not finite

    def _make_buffers(self) -> Buffers:
        return StageBuffers(self.network, self.whole, self.place)

    def _autocast(self) -> AbstractContextManager:
        """Return the autocast context that DeepSpeed runs its forward passes in."""
        if self.ds_engine.torch_autocast_enabled():
            return torch.autocast(self.device.type, dtype=self.ds_engine.torch_autocast_dtype())
        return nullcontext()


class StageBuffers(Buffers):
    """A stage's buffers, and their position among those of the whole network."""

    def __init__(self, stage: nn.Module, whole: nn.Module, place: ParallelDims) -> None:
        super().__init__(stage)
        self._whole, self._place = whole, place
        sizes = {name: b.numel() for name, b in whole.named_buffers() if b.is_floating_point()}
        own = [name for name, b in stage.named_buffers() if b.is_floating_point()]
        names = list(sizes)
        first = names.index(own[0]) if own else 0
        assert names[first : first + len(own)] == own, "a stage's buffers lie together"
        self._start = sum(sizes[name] for name in names[:first])
        self._total = sum(sizes.values())

    def gathered(self, flat: torch.Tensor) -> torch.Tensor:
        if not flat.numel():
            return flat
        whole = torch.zeros(self._total, dtype=torch.float32, device=flat.device)
        if self._place.dp_rank == 0:
            self.own(whole).copy_(flat)
        return all_reduce_sum(whole)

    def own(self, gathered: torch.Tensor) -> torch.Tensor:
        return gathered[self._start : self._start + self.flat.numel()]

    def named(self, gathered: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(b.shape, dtype=b.dtype) if b.is_meta else b
            for name, b in named_buffers(self._whole, gathered).items()
        }


class StagePartitions(Partitions):
    """This rank's partitions of its stage; gathering collects the parameters of all stages."""

    def __init__(self, engine: PipelineEngine) -> None:
        super().__init__(engine)
        self._engine: PipelineEngine = engine
        self.has_all, self.contributes = False, not self.replicated or engine.dp_rank == 0
        self.shapes = {name: tuple(p.shape) for name, p in engine.whole.named_parameters()}

    @contextmanager
    def swap_parameters(self, tensors: Sequence[torch.Tensor], buffers: torch.Tensor) -> Iterator[None]:
        """Inside, every rank predicts with the whole network, with the values of `tensors` and `buffers`."""
        with self._engine.with_whole() as network:
            state = dict(network.named_parameters()) | dict(network.named_buffers())
            for name, value in self.gather(tensors):
                state[name].data.copy_(value)
            for name, value in named_buffers(network, self._engine.buffers.gathered(buffers)).items():
                state[name].copy_(value)
            yield

    def swap_trained_parameters(self) -> AbstractContextManager[None]:
        return self.swap_parameters(self.masters(), self._engine.buffers.flat)
