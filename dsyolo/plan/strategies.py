"""Which strategies there are: each is a DeepSpeed JSON, judged by the very check that a run makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from dsyolo.ds_config import DsConfig, check
from dsyolo.errors import UserError
from dsyolo.model.yolov5 import has_parameters
from dsyolo.plan.hardware import Hardware

PRECISIONS: Mapping[str, dict[str, Any]] = {
    "autocast_bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "autocast_fp16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}},
    "fp32": {},
}
HOST = {"device": "cpu"}
ZERO: tuple[dict[str, Any], ...] = (
    *({"stage": stage} for stage in range(4)),
    *({"stage": stage, "offload_optimizer": HOST} for stage in (1, 2, 3)),
    {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST},
)
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "blocks"},
    {"recompute": "blocks", "cpu_checkpointing": True},
)
STAGES = (1, 2, 4)
OPTIMIZER = {
    "type": "SGD",
    "params": {"lr": 0.01, "momentum": 0.937, "nesterov": True, "weight_decay": 0.0005},
}  # the recipe's


class Strategy(NamedTuple):
    """A JSON that DeepSpeed and dsyolo take, and what dsyolo makes of it."""

    source: dict[str, Any]
    ds: DsConfig

    def settings(self) -> dict[str, Any]:
        """What tells it from the others, flat."""
        ds = self.ds
        return {
            "zero_stage": ds.zero_stage,
            "offload_optimizer": ds.offload_optimizer or "none",
            "offload_param": ds.offload_param or "none",
            "recompute": self.recompute,
            "offload_activations": ds.offload_activations,
            "precision": ds.precision,
            "micro_batch": ds.micro_batch,
            "accumulation": ds.accumulation,
            "global_batch": ds.global_batch,
            "pipeline_stages": ds.stages,
            "replicas": ds.data_parallel_size,
            "gpus": ds.world_size,
        }

    @property
    def recompute(self) -> str:
        """none, blocks, or a budget as the JSON gives it."""
        return self.source.get("activation_checkpointing", {}).get("recompute", "none")

    def in_words(self) -> str:
        """In the words of a table's cell."""
        ds = self.ds
        words = [f"ZeRO {ds.zero_stage}"]
        if ds.stages > 1:
            words.append(f"{ds.stages} stages x {ds.data_parallel_size}")
        offloaded = [
            name
            for name, is_on in (
                ("optimizer", ds.offload_optimizer),
                ("weights", ds.offload_param),
                ("inputs of blocks", ds.offload_activations),
            )
            if is_on
        ]
        if self.recompute != "none":
            words.append("recompute" if self.recompute == "blocks" else f"recompute beyond {self.recompute}")
        return ", ".join(words) + (f", {' and '.join(offloaded)} on the host" if offloaded else "")


def strategies(model: str, global_batch: int, hardware: Hardware) -> Iterator[Strategy]:
    """All that can run on this hardware. Budgets of recompute are added where memory asks for them: `with_budget`."""
    world_size = hardware.num_gpus
    for stages in STAGES:
        replicas, rest = divmod(world_size, stages)
        if rest or global_batch % replicas:
            continue
        share = global_batch // replicas
        micros = [size for size in range(1, share + 1) if share % size == 0]
        zeros = [zero for zero in ZERO if stages == 1 or zero["stage"] < 2]
        for zero, recompute, precision, micro in product(zeros, RECOMPUTE, PRECISIONS, micros):
            if "bf16" in precision and not hardware.device.has_bf16:
                continue
            source = {
                "train_batch_size": global_batch,
                "train_micro_batch_size_per_gpu": micro,
                **PRECISIONS[precision],
                "zero_optimization": zero,
                **({"activation_checkpointing": recompute} if recompute else {}),
                **({"pipeline": {"stages": stages, "partition": "balanced"}} if stages > 1 else {}),
                "optimizer": OPTIMIZER,
                "gradient_clipping": 10.0,
            }
            found = _checked(source, world_size, model)
            if found is not None:
                yield found


def with_budget(strategy: Strategy, budget: str, model: str) -> Strategy | None:
    """The same, recomputing the fewest blocks for a budget such as `4.5GiB`."""
    source = {**strategy.source, "activation_checkpointing": {"recompute": budget}}
    return _checked(source, strategy.ds.world_size, model)


def _checked(source: dict[str, Any], world_size: int, model: str) -> Strategy | None:
    try:
        ds = check(source, world_size=world_size, accelerator="cuda", layers=has_parameters(model))
    except UserError:  # of a combination that cannot be, such as fp16 autocast with ZeRO 1
        return None
    return Strategy(source, ds)
