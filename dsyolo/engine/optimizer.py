"""The optimizer's three groups, and their schedule (docs/yolov5.md, Recipe)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsyolo.config.recipe import NOMINAL_BATCH
from dsyolo.config.spec import OptimizerSpec

GROUPS = ("weights", "norms", "biases")  # decayed; not decayed; not decayed, with a warm-up of their own
DECAYED = "weights"


def parameter_groups(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters by kind: convolution weights, BatchNorm weights, all biases. Each exactly once."""
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in network.named_parameters():
        kind = "biases" if name.endswith("bias") else "norms" if parameter.ndim < 2 else "weights"
        groups[kind].append(parameter)
    return groups


def build_optimizer(network: nn.Module, name: str, params: Mapping[str, object]) -> torch.optim.Optimizer:
    """Return the torch optimizer `name` (SGD, Adam or AdamW) over the three groups.

    Learning rate and weight decay start at 0, so a step that an engine takes only to create states changes nothing.
    `Schedule.apply` sets them before each step.
    """
    # A pipeline stage may lack a kind.
    groups = [{"params": p, "name": kind} for kind, p in parameter_groups(network).items() if p]
    settings = {key: params[key] for key in params.keys() - {"lr", "weight_decay"}}
    return getattr(torch.optim, name)(groups, lr=0.0, weight_decay=0.0, **settings)


def optimizer_record(
    spec: OptimizerSpec, lr: float, weight_decay: float, groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, Any]:
    """Return the optimizer as it runs, as plain types for the run's folder.

    Args:
        lr: the peak of the schedule.
        weight_decay: of the group that decays.
        groups: the parameters of the whole network by kind.
    """
    return {
        "type": spec.type,
        **spec.params,
        "lr": lr,
        "weight_decay": weight_decay,
        "groups": {
            kind: {
                "parameters": sum(p.numel() for p in parameters),
                "weight_decay": weight_decay if kind == DECAYED else 0.0,
            }
            for kind, parameters in groups.items()
        },
    }


def lr_factor(scaling: str, global_batch: int) -> float:
    """Return the factor of the learning rate for a batch other than 64 images.

    linear: Goyal et al. 2017 (arXiv:1706.02677), who went to 8,192 images with a gradual warm-up, as the schedule
    has; sqrt: Krizhevsky 2014 (arXiv:1404.5997), which keeps the variance of a step, for Adam's kinds.
    """
    ratio = global_batch / NOMINAL_BATCH
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[scaling]


@dataclass(frozen=True)
class Schedule:
    """Learning rate, momentum and weight decay at every optimizer step: a pure function of the step.

    After the warm-up, lr(x) = lr * (shape(x) * (1 - lrf) + lrf) with x the share of all steps done and shape
    linear, 1 - x, or cosine, (1 + cos(pi x)) / 2; it stays at lr * lrf after the last one, where a finished run is
    extended. During it, the rate of weights rises linearly from 0, that of
    biases comes from `warmup_bias_lr`, momentum from `warmup_momentum`.

    Args:
        lr, momentum: the JSON's.
        weight_decay: what runs: `OptimizerSpec.weight_decay_at`.
        is_adam: Adam's step has the size of its rate, whatever the gradient: its biases warm up from 0 too.
    """

    total_steps: int
    warmup_steps: int
    lr: float
    lrf: float
    shape: str
    momentum: float
    weight_decay: float
    warmup_bias_lr: float
    warmup_momentum: float
    is_adam: bool

    def explain(self) -> str:
        """Return a line for the start of a run."""
        steps = min(self.warmup_steps, self.total_steps)
        text = f"steps: {self.total_steps}, the first {steps} of them warm-up"
        if steps and not self.is_adam:
            text += f": lr of biases from {self.warmup_bias_lr:g}"
            text += f", momentum from {self.warmup_momentum:g}" if self.momentum else ""
        return text

    def warning(self) -> str:
        """Return a warning if the run is too short to learn; empty if it is not."""
        if self.total_steps > self.warmup_steps:
            return ""
        what = f"The run ends during the warm-up, after {self.total_steps} of {self.warmup_steps} steps"
        return f"{what}. Train more epochs, or lower train_batch_size or --warmup_min_images."

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the weights at step `step` (0-based), without the warm-up."""
        x = min(step / max(self.total_steps, 1), 1.0)
        falling = (1 + math.cos(math.pi * x)) / 2 if self.shape == "cosine" else 1 - x
        return self.lr * (falling * (1 - self.lrf) + self.lrf)

    def warmed_lr_at(self, step: int) -> float:
        """Return the learning rate that the weights train with at step `step` (0-based)."""
        return self.lr_at(step) * self._warm(step)

    def _warm(self, step: int) -> float:
        return min(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set every group's values for step `step` (0-based). Return the learning rate of the weights."""
        warm = self._warm(step)
        goal = self.lr_at(step)
        # Without momentum SGD keeps no state, so there is nothing to warm up.
        first = self.momentum if self.is_adam or not self.momentum else self.warmup_momentum
        momentum = _mix(first, self.momentum, warm)
        for group in optimizer.param_groups:
            kind = group["name"]
            start = self.warmup_bias_lr if kind == "biases" and not self.is_adam else 0.0
            group["lr"] = _mix(start, goal, warm)
            if not self.is_adam:
                group["momentum"] = momentum
            group["weight_decay"] = self.weight_decay if kind == DECAYED else 0.0
        return self.warmed_lr_at(step)


def _mix(start: float, goal: float, share: float) -> float:
    return start + (goal - start) * share
