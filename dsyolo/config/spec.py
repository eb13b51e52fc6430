"""The parts of a resolved run. Each carries its own arithmetic, so that nobody parses a name or a dict again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsyolo.config.recipe import NOMINAL_BATCH

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a number, by DeepSpeed's name of its type


@dataclass(frozen=True)
class BatchPlan:
    """How many images an optimizer step takes."""

    micro: int  # images of a rank in a forward pass
    accumulation: int  # micro-batches in an optimizer step
    dp_size: int  # ranks that hold the same parameters and take different images

    @property
    def global_batch(self) -> int:
        """Return the images in an optimizer step."""
        return self.micro * self.accumulation * self.dp_size

    @property
    def share(self) -> int:
        """Return the images of a data-parallel rank in an optimizer step."""
        return self.micro * self.accumulation

    def with_micro(self, micro: int) -> BatchPlan:
        """Return the plan with the same global batch and another micro-batch, a divisor of the share."""
        assert self.share % micro == 0, (self, micro)
        return BatchPlan(micro, self.share // micro, self.dp_size)


@dataclass(frozen=True)
class Precision:
    """The types of numbers in a training: fp32, bf16 or fp16."""

    compute: str = "fp32"  # convolutions and their activations
    params: str = "fp32"  # the weights that the network holds
    grads: str = "fp32"  # the sums of gradients over micro-batches
    master: str = "fp32"  # the weights that the optimizer updates

    @property
    def is_autocast(self) -> bool:
        """Return whether torch casts fp32 weights for each operation."""
        return self.compute != self.params

    @property
    def name(self) -> str:
        """Return fp32, autocast_bf16, autocast_fp16, bf16 or fp16."""
        return f"autocast_{self.compute}" if self.is_autocast else self.compute

    @property
    def compute_bytes(self) -> int:
        return BYTES[self.compute]

    @property
    def params_bytes(self) -> int:
        return BYTES[self.params]

    @property
    def grads_bytes(self) -> int:
        return BYTES[self.grads]

    def with_bf16(self) -> Precision:
        """Return the precision with bf16 in the place of fp16: its tensors have the same sizes."""
        kinds = (self.compute, self.params, self.grads, self.master)
        return Precision(*("bf16" if kind == "fp16" else kind for kind in kinds))

    def deepspeed_json(self) -> dict[str, Any]:
        """Return the block of a DeepSpeed JSON that asks for it."""
        if self.is_autocast:
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[self.compute]
            return {"torch_autocast": {"enabled": True, "dtype": dtype}}
        return {} if self.compute == "fp32" else {self.compute: {"enabled": True}}


PRECISIONS: Mapping[str, Precision] = {
    "autocast_bf16": Precision("bf16"),
    "autocast_fp16": Precision("fp16"),
    "bf16": Precision("bf16", "bf16", "bf16"),
    "fp16": Precision("fp16", "fp16", "fp16"),
    "fp32": Precision(),
}


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer that runs."""

    type: str  # SGD, Adam or AdamW, as torch.optim has it; not always what the JSON calls it
    params: Mapping[str, Any]  # as torch.optim takes them; `lr` is the peak of the schedule
    states_per_param: int  # tensors that it keeps for each weight
    scales_weight_decay: bool = False  # by the global batch over 64, as the recipe's SGD

    @property
    def is_adam(self) -> bool:
        return self.type != "SGD"

    @property
    def lr(self) -> float:
        return float(self.params["lr"])

    @property
    def momentum(self) -> float:
        """Return SGD's momentum; 0 where there is none."""
        return float(self.params.get("momentum", 0.0))

    @property
    def weight_decay(self) -> float:
        """Return the weight decay as the JSON has it; `weight_decay_at` is what runs."""
        return float(self.params.get("weight_decay", 0.0))

    def weight_decay_at(self, global_batch: int) -> float:
        """Return the weight decay that runs: of SGD, whose recipe is made for 64 images a step, in proportion to them."""
        times = global_batch / NOMINAL_BATCH if self.scales_weight_decay else 1.0
        return self.weight_decay * times


@dataclass(frozen=True)
class SchedulerSpec:
    """The schedule of DeepSpeed that a JSON asks for in the place of the recipe's."""

    type: str  # WarmupLR, WarmupDecayLR or WarmupCosineLR
    params: Mapping[str, Any]  # every parameter of the type; None: follows from optimizer, recipe or run

    @property
    def is_constant(self) -> bool:
        """Return whether the rate stays as it is after the warm-up."""
        return self.type == "WarmupLR"

    @property
    def ends_at_zero(self) -> bool:
        """Return whether the rate is 0 once its steps are over."""
        if self.is_constant:
            return False
        return not self.params["cos_min_ratio" if self.type == "WarmupCosineLR" else "warmup_min_lr"]


@dataclass(frozen=True)
class OffloadSpec:
    """The device of each offloaded part: host memory (`cpu`) or files (`nvme`); None: it stays on the accelerator."""

    optimizer: str | None = None
    params: str | None = None
    optimizer_folder: str | None = None  # folder of the files, under `nvme`
    params_folder: str | None = None
    activations: bool = False  # the inputs of recomputed blocks wait in host memory

    @property
    def devices(self) -> tuple[str | None, str | None]:
        return self.optimizer, self.params

    @property
    def folders(self) -> tuple[str | None, str | None]:
        return self.optimizer_folder, self.params_folder


@dataclass(frozen=True)
class Parallelism:
    """How a training is divided among ranks, and what it saves of memory."""

    zero_stage: int = 0
    stages: int = 1  # stages of the pipeline; 1: no pipeline
    partition: str | tuple[int, ...] = "balanced"  # or the layer index at which each further stage begins
    offload: OffloadSpec = OffloadSpec()
    recompute: str | int = "none"  # or "blocks", or bytes: the fewest blocks that fit these in a micro-batch


@dataclass(frozen=True)
class DataSpec:
    """A `data.yaml`, resolved: where the images of each split are and what the classes are called."""

    path: Path
    names: tuple[str, ...]
    train: tuple[Path, ...] | None  # folders and list files
    val: tuple[Path, ...] | None
    test: tuple[Path, ...] | None
    num_keypoint_values: int = 0  # numbers behind the box of a label row, which are not learned

    @property
    def num_classes(self) -> int:
        return len(self.names)
