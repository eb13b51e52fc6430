"""One way of spreading a training, as settings and as the DeepSpeed JSON that asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.batch_sizes import MOST_IMAGES, batch_json, divisors
from dsyolo.config.deepspeed.optimizers import recipe_params
from dsyolo.config.spec import BatchPlan, Precision

OPTIMIZERS = ("SGD", "AdamW")
# (ZeRO stage, device of the optimizer, device of the parameters)
SHARDING = (
    (0, None, None),
    (1, None, None),
    (2, None, None),
    (3, None, None),
    (1, "cpu", None),
    (2, "cpu", None),
    (3, "cpu", "cpu"),
)
PIPELINES = (2, 4)
RECOMPUTES = ("none", "blocks")


class StrategySettings(NamedTuple):
    """Everything that a strategy chooses."""

    zero_stage: int
    offload_optimizer: str | None
    offload_param: str | None
    recompute: str | int  # none, blocks, or the bytes of a budget per micro-batch
    precision: Precision
    micro_batch: int
    accumulation: int
    pipeline_stages: int
    dp_size: int
    optimizer: str

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.dp_size

    @property
    def family(self) -> tuple[Any, ...]:
        """What the sizes of micro-batches and precisions are variations of."""
        recomputes = self.recompute != "none"
        return self.zero_stage, self.offload_optimizer, self.offload_param, recomputes, self.pipeline_stages

    def deepspeed_json(self) -> dict[str, Any]:
        """What `--deepspeed_config` takes."""
        offload = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_param}
        zero = {"stage": self.zero_stage, **{key: {"device": to} for key, to in offload.items() if to}}
        recompute = self.recompute if isinstance(self.recompute, str) else gib(self.recompute)
        return {
            **batch_json(BatchPlan(self.micro_batch, self.accumulation, self.dp_size)),
            **self.precision.deepspeed_json(),
            "zero_optimization": zero,
            **({"activation_checkpointing": {"recompute": recompute}} if recompute != "none" else {}),
            **(
                {"pipeline": {"stages": self.pipeline_stages, "partition": "balanced"}}
                if self.pipeline_stages > 1
                else {}
            ),
            "optimizer": {"type": self.optimizer, "params": recipe_params(self.optimizer)},
            "gradient_clipping": 10.0,
        }

    def in_words(self) -> str:
        """Without sizes of batches."""
        words = [f"ZeRO {self.zero_stage}"]
        if self.pipeline_stages > 1:
            words.insert(0, f"pipeline {self.pipeline_stages} x {self.dp_size}")
        if self.offload_optimizer:
            words.append("offload" if self.offload_param is None else "offload of all")
        if self.recompute != "none":
            words.append("recompute" if self.recompute == "blocks" else "recompute in part")
        return ", ".join(words)


def gib(size: int | str) -> str:
    """Bytes as the JSON takes them, rounded up."""
    return f"{-(-int(size) * 1000 // 2**30) / 1000:.3f}GiB"


def settings(
    ranks: int,
    global_batch: int,
    optimizer: str,
    precisions: tuple[Precision, ...],
    recomputes: Sequence[str | int] = RECOMPUTES,
) -> Iterator[StrategySettings]:
    """All strategies that are looked at: those that need something of their ranks and batch, where they have it.

    A micro-batch is any divisor of a replica's share of the global batch. In a pipeline there are two micro-batches for
    each stage at least: with fewer its stages wait for most of the time.
    """
    for stages in (1, *PIPELINES):
        if ranks % stages or ranks < stages:
            continue
        dp_size = ranks // stages
        if global_batch % dp_size:
            continue
        share = global_batch // dp_size
        micro_batches = divisors(share, MOST_IMAGES)
        for zero_stage, of_optimizer, of_param in SHARDING:
            if stages > 1 and (zero_stage > 1 or of_optimizer):
                continue
            for precision in precisions:
                is_half = precision.params_bytes == 2
                if dp_size == 1 and zero_stage > is_half and not of_optimizer:
                    continue  # nobody to share with
                # DeepSpeed never lowers the scale of fp16 autocast from ZeRO 1 on, and has no ZeRO 0 for half weights
                if precision.name == "autocast_fp16" and (zero_stage or stages > 1):
                    continue
                if is_half and not zero_stage:
                    continue
                for micro_batch in micro_batches:
                    accumulation = share // micro_batch
                    if stages > 1 and accumulation < 2 * stages:
                        continue
                    for recompute in recomputes:
                        if stages > 1 and not isinstance(recompute, str):
                            continue  # a budget is one for the whole network
                        yield StrategySettings(
                            zero_stage,
                            of_optimizer,
                            of_param,
                            recompute,
                            precision,
                            micro_batch,
                            accumulation,
                            stages,
                            dp_size,
                            optimizer,
                        )
