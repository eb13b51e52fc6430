"""The DeepSpeed engine around a network: one optimizer step at a time, the same on every strategy."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dsyolo.base.batch import Batch, StepStats, Targets
from dsyolo.cluster.collectives import all_gather_objects, all_reduce_sum, broadcast
from dsyolo.cluster.world import ParallelDims, World
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.buffers import Buffers
from dsyolo.engine.device import current_device
from dsyolo.engine.step_timer import BACKWARD, COPY, FORWARD, OPTIMIZER, StepTimer
from dsyolo.engine.warmup_schedule import AnySchedule

_LOSS_EVENT = "Train/Samples/train_loss"


class Engine:
    """Trains `network` under DeepSpeed.

    Invariant: a step's gradient is that of the loss over the global batch, however that is split into micro-batches
    and ranks. Between steps, parameters and buffers are equal on all ranks.

    Args:
        network: maps uint8 images to raw maps; gets the weights and buffers of rank 0.
        loss: `loss(maps, targets)` returns (total summed over images, parts (3,)).
        optimizer: over the network's parameters, with learning rate 0.
        schedule: sets the optimizer's values before every step.
        deepspeed_json: for `deepspeed.initialize`.
        place: among the data-parallel ranks and the pipeline's stages.
        accumulation: micro-batches of a rank in one step.
        statistics_move: BatchNorm's statistics follow each rank's own batches, and so must be averaged.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: DetectionLoss,
        optimizer: torch.optim.Optimizer,
        schedule: AnySchedule,
        *,
        deepspeed_json: Mapping[str, Any],
        world: World,
        place: ParallelDims,
        accumulation: int,
        statistics_move: bool,
    ) -> None:
        import deepspeed

        self.device = current_device()
        self.world, self.place = world, place
        self.dp_rank, self.dp_size = place.dp_rank, place.dp_size
        self.accumulation, self.schedule = accumulation, schedule
        self.loss = loss.to(self.device)
        self.deepspeed_json = dict(deepspeed_json)  # as given, for the run's folder
        self.network = network.to(self.device)
        settings = {"optimizer": optimizer, "config": dict(deepspeed_json)}
        self.ds_engine: Any = deepspeed.initialize(model=self._module(), **settings)[0]
        internals.accumulate_in_partition(self.ds_engine)
        self._undo_averaging = accumulation * self.dp_size  # DeepSpeed divides by both, and the loss is a sum
        self._norm: torch.Tensor | None = None
        self._phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
        if self.ds_engine.zero_optimization_stage() == 0:
            internals.replace_clipping(self.ds_engine, self._clip_gradients)
            self._take_step = internals.replace_step(self.ds_engine.optimizer, self._step_if_finite)
        self._write_events = internals.replace_monitor_writer(self.ds_engine, self._write_own_events)
        self.buffers = self._make_buffers()
        broadcast(self.buffers.flat, self.dp_group)
        self._statistics_weight = self._scale_batchnorm_momentum() if statistics_move else None
        self.loss_scale = LossScale(self.ds_engine)

    def train_step(self, batches: Sequence[Batch], step: int) -> tuple[StepStats, float]:
        """Take one optimizer step from this rank's micro-batches, after `step` others in the whole run.

        If its gradients are not finite, change nothing. That check is the only wait for the device in a step; at ZeRO 1
        to 3 it is DeepSpeed's own. Return the statistics of the global batch, and the learning rate of the weights.
        """
        assert len(batches) == self.accumulation
        self.ds_engine.train()
        lr = self.schedule.apply(self.ds_engine.optimizer, step)
        buffers_before = self.buffers.flat.clone()
        losses = torch.zeros(3, device=self.device)
        for batch, targets in zip(batches, self._counted_targets(batches), strict=True):
            losses += self._add_gradients(batch.images, targets)
            with self._phase(OPTIMIZER):
                self.ds_engine.step()
        return self._stats(losses, len(batches[0].images), buffers_before), lr

    def _add_gradients(self, images: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Accumulate the gradients of one micro-batch. Its maps are freed with the graph, before the next one's exist."""
        with self._phase(COPY):
            images = self.to_device_images(images)
        with self._phase(FORWARD):
            maps = self.ds_engine(images)
            total, parts = self.loss(maps, targets)
        with self._phase(BACKWARD):
            self.ds_engine.backward(total * self._undo_averaging)
        return parts

    def set_timer(self, timer: StepTimer) -> None:
        self._phase = timer.phase

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return decoded boxes (B, boxes, 5 + K) on the device. Under ZeRO 3 all ranks must call it equally often."""
        return self._decode(self._raw_maps(images))

    @torch.no_grad()
    def predict_with_loss(self, images: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `predict` does, and the loss's sums (L, 3) of `DetectionLoss.level_sums`; it counts as one call."""
        maps = self._raw_maps(images)
        # Before decoding, which takes more memory: the peak is that of `predict`.
        sums = self.loss.level_sums(maps, Targets(*map(self._to_device, targets)))
        return self._decode(maps), sums

    def _raw_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.ds_engine.eval()
        return self.ds_engine(self.to_device_images(images))

    def _decode(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        network: Any = self.network  # a DetectionNetwork here; a stage of one has no decode
        return network.decode(maps)

    def to_device_images(self, images: torch.Tensor) -> torch.Tensor:
        """Copy uint8 images (B, 3, H, W) to the device, channels-last, without waiting."""
        return self._to_device(images).contiguous(memory_format=torch.channels_last)

    def all_gather(self, item: Any) -> list[Any]:
        """Return every rank's item, on every rank."""
        return all_gather_objects(item)

    @property
    def dp_group(self) -> Any:
        """Return the process group of the data-parallel ranks; None for all ranks."""
        return None

    def _module(self) -> nn.Module:
        return self.network

    def _clip_gradients(self) -> None:
        self._norm = self._total_norm()
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.ds_engine.gradient_clipping(), self._norm)

    def _total_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return self._sum_over_stages(torch.nn.utils.get_total_norm(gradients).square()).sqrt()

    def _step_if_finite(self) -> None:
        """Step at ZeRO 0; ZeRO's own optimizers check by themselves."""
        overflow = False
        if not self.loss_scale.can_skip:
            if self._norm is None or not self.ds_engine.gradient_clipping():
                self._norm = self._total_norm()
            overflow = not bool(self._norm.isfinite())
        internals.set_overflow(self.ds_engine.optimizer, overflow)
        if not overflow:
            self._take_step()

    def _sum_over_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _make_buffers(self) -> Buffers:
        return Buffers(self.network)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _scale_batchnorm_momentum(self) -> float | None:
        """Make BatchNorm's statistics move on N data-parallel ranks as on one that sees their micro-batches in turn.

        There each micro-batch moves them by the momentum m: s <- (1 - m) s + m x. So here one moves them by
        1 - (1 - m)^N, and rank i counts in the average by m (1 - m)^(N - 1 - i) over the sum of these weights, which
        is exact. Return this rank's weight; None where it is alone.
        """
        n = self.dp_size
        if n == 1:
            return None
        norms = [module for module in self.network.modules() if isinstance(module, nn.BatchNorm2d)]
        m = norms[0].momentum if norms else 0.5  # a stage without any still takes part in the collective
        assert m is not None
        assert all(norm.momentum == m for norm in norms), "one momentum for all"
        for norm in norms:
            norm.momentum = 1 - (1 - m) ** n
        return m * (1 - m) ** (n - 1 - self.dp_rank) / (1 - (1 - m) ** n)

    def _counted_targets(self, batches: Sequence[Batch]) -> list[Targets]:
        """Return the targets on the device, with the global batch's matches per level and images as their counts."""
        own = [torch.cat((b.targets.num_matches, b.targets.num_images[None])) for b in batches]
        with self._phase(COPY):
            counts = all_reduce_sum(self._to_device(torch.stack(own).sum(0)), self.dp_group)
            return [
                Targets._make((*map(self._to_device, b.targets[:-2]), counts[:-1], counts[-1]))
                for b in batches
            ]

    def _write_own_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Write DeepSpeed's events except its loss, a sum that exists only in a pipeline; `_stats` writes ours."""
        self._write_events([event for event in events if event[0] != _LOSS_EVENT])

    def _stats(self, losses: torch.Tensor, micro_batch: int, buffers_before: torch.Tensor) -> StepStats:
        """Return a step's statistics, and settle the buffers. `losses` (3,) are this rank's share."""
        if self._statistics_weight is not None:
            # Anchors do not move, so they stay bit-equal.
            moved = (self.buffers.flat - buffers_before).mul_(self._statistics_weight)
            torch.add(buffers_before, all_reduce_sum(moved, self.dp_group), out=self.buffers.flat)
        norm = self.ds_engine.get_global_grad_norm() if self._norm is None else self._norm
        applied = self.loss_scale.step_was_applied()
        if not applied:
            self.buffers.flat.copy_(buffers_before)  # non-finite values may have reached BatchNorm
        losses = all_reduce_sum(losses)
        if (samples := internals.monitor_samples(self.ds_engine)) is not None:
            # waits for the device, as DeepSpeed's own events do
            self._write_events([(_LOSS_EVENT, losses.sum().item(), samples)])
        return StepStats(losses, norm, self._undo_averaging * micro_batch, applied)


class LossScale:
    """The loss scaler of a DeepSpeed engine: its own (`fp16.enabled`), torch's (fp16 autocast at ZeRO 0), or none.

    Attributes:
        can_skip: there is a scaler; it skips a step whose gradients are not finite, and halves the scale.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._torch = internals.autocast_scaler(engine)
        self._own = internals.dynamic_scaler(engine)
        self.can_skip = self._torch is not None or engine.fp16_enabled()
        self._before = self._torch.get_scale() if self._torch else 0.0

    def step_was_applied(self) -> bool:
        """Return whether the last step changed the weights. Waits for the device under fp16 autocast only."""
        if self._torch is None:
            return self._engine.was_step_applied()
        before, self._before = self._before, self._torch.get_scale()
        return self._before >= before

    def state(self) -> dict[str, float]:
        """Return scale, steps since its last change, and (DeepSpeed's) overflows until it falls; empty without a scaler."""
        if self._torch is not None:
            state = self._torch.state_dict()
            return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}
        return {} if self._own is None else internals.scaler_state(self._own)

    def load(self, state: Mapping[str, float]) -> None:
        """Continue from a `state` of either scaler. An empty one changes nothing, nor does any without a scaler here."""
        if state and self._torch is not None:
            settings = self._torch.state_dict()
            good_steps = int(state["good_steps"]) % settings["growth_interval"]
            self._torch.load_state_dict({**settings, "scale": state["scale"], "_growth_tracker": good_steps})
            self._before = self._torch.get_scale()
        elif state and self._own is not None:
            internals.load_scaler_state(self._own, state)
