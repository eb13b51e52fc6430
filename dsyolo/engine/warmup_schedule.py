"""DeepSpeed's WarmupLR, WarmupDecayLR and WarmupCosineLR as pure functions of the step.

Source: DeepSpeed 0.19.8, runtime/lr_schedules.py. Its engine takes the first optimizer step at the rate that the
scheduler sets when it is built, and steps the scheduler after each optimizer step. So optimizer step `k` (0-based) runs
at the scheduler's iteration `k - 1`, and the first two at the least rate.
"""

import math
from dataclasses import dataclass

import torch

from dsyolo.engine.optimizer import DECAYED, Schedule

COSINE, DECAY = "WarmupCosineLR", "WarmupDecayLR"


@dataclass(frozen=True)
class WarmupSchedule:
    """Learning rate at every optimizer step, in the place of the recipe's `Schedule`, with the same interface.

    All groups have the same rate, and momentum has no warm-up. A step that is skipped counts, as in `Schedule`.

    Args:
        kind: the type in the JSON.
        total_steps: optimizer steps of the run.
        decay_steps: the schedule's own total; WarmupLR has none and ignores it.
        lr, min_lr: the rate after the warm-up, and before it.
        floor: WarmupCosineLR's last rate as a share of `lr`.
        is_log: the warm-up follows a logarithm, else a line.
        momentum, weight_decay: as they run.
    """

    kind: str
    total_steps: int
    warmup_steps: int
    decay_steps: int
    lr: float
    min_lr: float
    floor: float
    is_log: bool
    momentum: float
    weight_decay: float
    is_adam: bool

    def explain(self) -> str:
        """Return a line for the start of a run."""
        shape = "logarithmic" if self.is_log else "linear"
        warmup = f"{shape} warm-up from {self.min_lr:g} to {self.lr:g} in {self.warmup_steps} steps"
        falls = {
            DECAY: f", then linearly to {self.min_lr:g} at step {self.decay_steps}",
            COSINE: f", then by a cosine to {self.lr * self.floor:g} at step {self.decay_steps}",
        }
        if self._has_no_fall:
            falls = dict.fromkeys((DECAY, COSINE), f", then at once to {self._last_lr:g}")
        text = f"steps: {self.total_steps}; lr by the JSON's {self.kind}: {warmup}{falls.get(self.kind, '')}"
        return f"{text}. Neither the recipe's schedule nor its warm-up of momentum and biases applies"

    def warning(self) -> str:
        """Return a warning if part of the run cannot learn; empty if it all can."""
        if self.total_steps <= self.warmup_steps:
            what = f"The run ends during the warm-up, after {self.total_steps} of {self.warmup_steps} steps"
            return f"{what}. Train more epochs, or lower scheduler.params.warmup_num_steps."
        if self._has_no_fall:
            what = f"scheduler.params.total_num_steps: {self.decay_steps} given, within the {self._warmup} of the warm-up"
            return f'{what}, after which the learning rate is {self._last_lr:g} at once. Set it to "auto".'
        lost = self.total_steps - max(self.decay_steps, self._warmup) - 1
        ends_at_0 = not (self.min_lr if self.kind == DECAY else self.floor) and self.kind in (DECAY, COSINE)
        if lost > 0 and ends_at_0:
            what = f"scheduler.params.total_num_steps: {self.decay_steps} given, but the run has {self.total_steps} steps"
            return f'{what}, and the last {lost} have a learning rate of 0. Set it to "auto".'
        return ""

    def warmed_lr_at(self, step: int) -> float:
        """Return the learning rate at optimizer step `step` (0-based)."""
        return self.lr_at(step)

    def lr_at(self, step: int) -> float:
        """Return the learning rate at optimizer step `step` (0-based)."""
        iteration = step - 1
        if self.kind == COSINE:
            return self.lr * self._cosine_ratio(iteration)
        if iteration < 0:
            return self.min_lr
        share = 1.0
        if iteration < self._warmup:
            share = self._risen(iteration)
        elif self.kind == DECAY:
            left = float(self.decay_steps - iteration)
            share = max(0.0, left / float(max(1.0, self.decay_steps - self._warmup)))
        return self.min_lr + (self.lr - self.min_lr) * share

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set every group's values for step `step` (0-based). Return the learning rate."""
        lr = self.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if not self.is_adam:
                group["momentum"] = self.momentum
            group["weight_decay"] = self.weight_decay if group["name"] == DECAYED else 0.0
        return lr

    @property
    def _has_no_fall(self) -> bool:
        return self.kind in (DECAY, COSINE) and self.decay_steps <= self._warmup

    @property
    def _last_lr(self) -> float:
        return self.min_lr if self.kind == DECAY else self.lr * self.floor

    @property
    def _warmup(self) -> int:
        return max(2, self.warmup_steps)  # as DeepSpeed, which divides by the logarithm

    def _risen(self, iteration: int) -> float:
        if self.is_log:
            return 1.0 / math.log(self._warmup) * math.log(iteration + 1)
        return iteration / self._warmup

    def _cosine_ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self._warmup:
            least = self.min_lr / self.lr
            return least + self._risen(iteration) * (1.0 - least)
        steps = max(1, self.decay_steps - self._warmup)
        progress = min(1.0, (iteration - self._warmup + 1) / steps)
        return max(0.0, self.floor + (1.0 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)


AnySchedule = Schedule | WarmupSchedule
