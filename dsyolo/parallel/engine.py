"""The DeepSpeed engine around a network: one optimizer step at a time, the same on every strategy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dsyolo.batch import Batch, StepStats
from dsyolo.optim import Schedule
from dsyolo.parallel.buffers import Buffers
from dsyolo.parallel.dist import World, all_gather_objects, all_reduce_sum, broadcast
from dsyolo.parallel.loss_scale import LossScale


class Engine:
    """Trains `network` under DeepSpeed.

    Invariant: the gradient of a step is that of the loss over the global batch, however it is split into
    micro-batches and ranks; and parameters and buffers are equal on all ranks between steps.

    Args:
        network: gives raw maps for uint8 images; its weights and buffers are made those of rank 0.
        loss: `loss(maps, targets)` gives (total summed over images, parts (3,)).
        optimizer: over the network's parameters, with rate 0.
        schedule: sets the optimizer's values before every step.
        deepspeed_json: what `deepspeed.initialize` gets.
        accumulation: micro-batches of a rank in one step.
        freeze_batchnorm: BatchNorm normalises with its running statistics and does not move them.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        deepspeed_json: Mapping[str, object],
        world: World,
        accumulation: int,
        freeze_batchnorm: bool = False,
    ) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = torch.device(get_accelerator().current_device_name())
        self.world = world
        self.accumulation = accumulation
        self.schedule = schedule
        self.freeze_batchnorm = freeze_batchnorm
        self.loss = loss.to(self.device)
        self.deepspeed_json = dict(deepspeed_json)  # as given, for the run's folder
        self.deepspeed, *_ = deepspeed.initialize(
            model=network.to(self.device), optimizer=optimizer, config=dict(deepspeed_json)
        )
        self.network = self.deepspeed.module
        self.buffers = Buffers(self.network)
        broadcast(self.buffers.flat)
        self.loss_scale = LossScale(self.deepspeed)

    def train_step(self, batches: Sequence[Batch], step: int) -> tuple[StepStats, float]:
        """One optimizer step from this rank's micro-batches; nothing here waits for the device.

        Args:
            batches: `accumulation` micro-batches.
            step: optimizer steps done so far in the whole run.

        Returns:
            what happened, over the global batch, and the learning rate of the weights.
        """
        assert len(batches) == self.accumulation
        self._train_mode()
        lr = self.schedule.apply(self.deepspeed.optimizer, step)
        counts = self._global_counts(batches)
        buffers_before = self.buffers.flat.clone() if self.loss_scale.can_skip else None
        losses = torch.zeros(3, device=self.device)
        # DeepSpeed divides by accumulation and ranks; the loss is a sum, so both are multiplied back in.
        undo_averaging = self.accumulation * self.world.size
        for batch in batches:
            targets = type(batch.targets)(*(self._to_device(t) for t in batch.targets))
            targets = targets._replace(num_matches=counts[:-1], num_images=counts[-1])
            maps = self.deepspeed(self.to_device_images(batch.images))
            total, parts = self.loss(maps, targets)
            self.deepspeed.backward(total * undo_averaging)
            self.deepspeed.step()
            losses += parts
        self._average_buffers()
        all_reduce_sum(losses)
        norm = self.deepspeed.get_global_grad_norm()
        applied = self.loss_scale.step_was_applied()
        if not applied and buffers_before is not None:
            self.buffers.flat.copy_(buffers_before)  # what overflowed may have been BatchNorm's input
        num_images = self.accumulation * self.world.size * len(batches[0].images)
        return StepStats(losses, norm, num_images, applied), lr

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Decoded boxes (B, boxes, 5 + K) on the device. Under ZeRO 3 all ranks must call it as often."""
        self.deepspeed.eval()
        return self.network.decode(self.deepspeed(self.to_device_images(images)))

    def to_device_images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) to the device, channels-last, without waiting."""
        return self._to_device(images).contiguous(memory_format=torch.channels_last)

    def all_gather(self, item: Any) -> list[Any]:
        """Every rank's item, on every rank."""
        return all_gather_objects(item, self.device)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _train_mode(self) -> None:
        self.deepspeed.train()
        if self.freeze_batchnorm:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def _global_counts(self, batches: Sequence[Batch]) -> torch.Tensor:
        """(L + 1,): matches per level and images of the global batch."""
        own = [torch.cat((b.targets.num_matches, b.targets.num_images[None])) for b in batches]
        return all_reduce_sum(self._to_device(torch.stack(own).sum(0)))

    def _average_buffers(self) -> None:
        if self.world.size > 1 and not self.freeze_batchnorm:
            all_reduce_sum(self.buffers.flat).div_(self.world.size)
