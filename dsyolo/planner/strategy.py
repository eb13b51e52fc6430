"""One strategy for a training, as settings and as the DeepSpeed JSON that asks for it."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.batch_sizes import MOST_IMAGES, batch_json, divisors
from dsyolo.config.deepspeed.optimizer_table import recipe_params
from dsyolo.config.run_config import budget_gib
from dsyolo.config.spec import BatchPlan, Precision

OPTIMIZERS = ("SGD", "AdamW")
# ZeRO stage, device of the optimizer, device of the parameters
SHARDINGS: tuple[tuple[int, str | None, str | None], ...] = (
    *((stage, None, None) for stage in range(4)),
    *((1, "cpu", None), (2, "cpu", None), (3, "cpu", "cpu")),
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
        """Return what strategies that differ only in micro-batch, precision or budget have in common."""
        recomputes = self.recompute != "none"
        return self.zero_stage, self.offload_optimizer, self.offload_param, recomputes, self.pipeline_stages

    def deepspeed_json(self) -> dict[str, Any]:
        """Return what `--deepspeed_config` takes."""
        offload = {"offload_optimizer": self.offload_optimizer, "offload_param": self.offload_param}
        content: dict[str, Any] = {
            **batch_json(BatchPlan(self.micro_batch, self.accumulation, self.dp_size)),
            **self.precision.deepspeed_json(),
            "zero_optimization": {
                "stage": self.zero_stage,
                **{key: {"device": device} for key, device in offload.items() if device},
            },
        }
        if self.recompute != "none":
            budget = self.recompute if isinstance(self.recompute, str) else budget_gib(self.recompute)
            content["activation_checkpointing"] = {"recompute": budget}
        if self.pipeline_stages > 1:
            content["pipeline"] = {"stages": self.pipeline_stages, "partition": "balanced"}
        content["optimizer"] = {"type": self.optimizer, "params": recipe_params(self.optimizer)}
        return {**content, "gradient_clipping": 10.0}

    def describe(self) -> str:
        """Return the strategy in words, without batch sizes."""
        parts = [f"ZeRO {self.zero_stage}"]
        if self.pipeline_stages > 1:
            parts.insert(0, f"pipeline {self.pipeline_stages} x {self.dp_size}")
        if self.offload_optimizer:
            parts.append("offload" if self.offload_param is None else "offload of all")
        if self.recompute != "none":
            parts.append("recompute" if self.recompute == "blocks" else "recompute in part")
        return ", ".join(parts)


def settings(
    ranks: int,
    global_batch: int,
    optimizer: str,
    precisions: Sequence[Precision],
    recomputes: Sequence[str | int] = RECOMPUTES,
) -> Iterator[StrategySettings]:
    """Yield every strategy to consider: all that these ranks and this batch allow.

    A micro-batch is a divisor of a rank's share of the global batch. A pipeline gets at least two micro-batches a stage:
    with fewer, its stages wait most of the time.
    """
    for stages in (1, *PIPELINES):
        dp_size, rest = divmod(ranks, stages)
        if rest or not dp_size or global_batch % dp_size:
            continue
        share = global_batch // dp_size
        for sharding, precision in product(SHARDINGS, precisions):
            if not _can_run(*sharding[:2], precision, stages, dp_size):
                continue
            for micro_batch, recompute in product(divisors(share, MOST_IMAGES), recomputes):
                accumulation = share // micro_batch
                if stages > 1 and (accumulation < 2 * stages or not isinstance(recompute, str)):
                    continue  # a budget is one for the whole network
                sizes = micro_batch, accumulation, stages, dp_size
                yield StrategySettings(*sharding, recompute, precision, *sizes, optimizer)


def _can_run(zero_stage: int, offload: str | None, precision: Precision, stages: int, dp_size: int) -> bool:
    is_half = precision.params_bytes == 2
    if stages > 1 and (zero_stage > 1 or offload):
        return False
    if dp_size == 1 and zero_stage > is_half and not offload:
        return False  # nobody to share with
    # DeepSpeed never lowers the scale of fp16 autocast from ZeRO 1 on, and has no ZeRO 0 for half weights
    if precision.name == "autocast_fp16" and (zero_stage or stages > 1):
        return False
    return bool(zero_stage) or not is_half
