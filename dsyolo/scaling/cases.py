"""Which trainings are run: strategies x numbers of ranks x ways of scaling, each with a DeepSpeed JSON of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS, batch_json, batch_sizes, fitted
from dsyolo.config.deepspeed.config import check
from dsyolo.config.deepspeed.json_reader import read_json, sane_part, without_auto
from dsyolo.config.run_config import AUTO
from dsyolo.config.spec import BatchPlan
from dsyolo.models.registry import has_parameters

WEAK, STRONG = "weak", "strong"
HALF_PRECISIONS = ("bf16", "fp16", "torch_autocast")


class ScalingStrategy(NamedTuple):
    """A DeepSpeed JSON with its sizes of batches taken out.

    Attributes:
        micro_batch, accumulation: of a replica, under weak scaling on any number of them.
        global_batch: under strong scaling.
    """

    name: str
    source: Mapping[str, Any]
    stages: int
    micro_batch: int
    accumulation: int
    global_batch: int

    def on(self, dp_size: int, scaling: str) -> tuple[int, int]:
        """(micro-batch, accumulation) of each.

        Raises:
            UserError: the global batch cannot be divided so.
        """
        if scaling == WEAK:
            return self.micro_batch, self.accumulation
        if self.global_batch % dp_size:
            rule = f"{self.global_batch} images a step cannot be divided among {dp_size} replicas"
            raise UserError("This size cannot run", [rule])
        batch = fitted(self.global_batch, self.micro_batch, None, dp_size)
        return batch.micro, batch.accumulation


class ScalingCase(NamedTuple):
    """One training. Equal ones are run once, whatever they are run for."""

    strategy: str
    ranks: int
    stages: int
    micro_batch: int
    accumulation: int

    @property
    def dp_size(self) -> int:
        return self.ranks // self.stages

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.dp_size

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.strategy}_{self.ranks}ranks_{self.micro_batch}x{self.accumulation}"


class Computes(NamedTuple):
    """What tells two trainings apart whatever they are spread over."""

    precision: str  # as `Precision.name` has it, or "auto"
    recompute: str | int

    def differences(self, other: Computes) -> list[str]:
        """Names of what is not the same."""
        return [name for name in self._fields if getattr(self, name) != getattr(other, name)]


class Wanted(NamedTuple):
    """A row of the report: a case, or why there is none."""

    strategy: str
    scaling: str
    ranks: int
    case: ScalingCase | None
    why_not: str = ""
    computes: Computes = Computes("fp32", "none")


def read_strategy(
    path: Path, smallest: int, micro_batch: int | None, accumulation: int | None, problems: list[str]
) -> ScalingStrategy | None:
    """The strategy of a JSON, whose sizes of batches are read as those of a training on `smallest` ranks.

    Other values that are "auto" stay so: train.py fills them in.

    Args:
        micro_batch, accumulation: in the place of the JSON's.
        problems: gets a line for each reason why it cannot be used.
    """
    faults: list[str] = []
    source = read_json(str(path), faults) or {}
    content, left_open = without_auto(source)
    sane = sane_part(content, faults)
    if not micro_batch:
        rule = "that leaves it to the machine, and so to each size. Give a number, or --micro_batch"
        faults += [f'{key}: "auto" given, but {rule}.' for key in BATCH_KEYS if (key,) in left_open]
    if faults:
        problems += [f"{path}: {fault}" for fault in faults]
        return None
    stages = int(sane.get("pipeline", {}).get("stages", 1))
    train, micro, steps = batch_sizes(sane)
    dp_size = max(1, smallest // stages)
    steps = (
        accumulation
        or steps
        or (max(1, train // ((micro_batch or micro) * dp_size)) if train and micro else 1)
    )
    micro = micro_batch or micro or (max(1, train // (steps * dp_size)) if train else 1)
    if micro_batch or accumulation or not train:
        train = micro * steps * dp_size
    # Under weak scaling a rank's images are those of a rank of the smallest world, where that has no room for all stages.
    steps *= max(1, stages // smallest)
    rest = {key: copy.deepcopy(value) for key, value in source.items() if key not in BATCH_KEYS}
    return ScalingStrategy(path.stem, rest, stages, micro, steps, train)


def wanted(
    strategies: Sequence[ScalingStrategy],
    scalings: Sequence[str],
    ranks: Sequence[int],
    model: str,
    accelerator: str,
) -> Iterator[Wanted]:
    """All rows. A size that a strategy cannot have says why."""
    for scaling in scalings:
        for strategy in strategies:
            for size in ranks:
                try:
                    case, computes = _case(strategy, size, scaling, model, accelerator)
                except UserError as error:
                    yield Wanted(strategy.name, scaling, size, None, " ".join(error.problems))
                else:
                    yield Wanted(strategy.name, scaling, size, case, computes=computes)


def deepspeed_json(strategy: ScalingStrategy, case: ScalingCase) -> dict[str, Any]:
    """What the case's training gets."""
    return {**batch_json(BatchPlan(case.micro_batch, case.accumulation, case.dp_size)), **strategy.source}


def _case(
    strategy: ScalingStrategy, ranks: int, scaling: str, model: str, accelerator: str
) -> tuple[ScalingCase, Computes]:
    if ranks % strategy.stages:
        rule = f"{ranks} ranks are no multiple of its {strategy.stages} stages"
        raise UserError("This size cannot run", [rule])
    sizes = strategy.on(ranks // strategy.stages, scaling)
    case = ScalingCase(strategy.name, ranks, strategy.stages, *sizes)
    content, left_open = without_auto(deepspeed_json(strategy, case))
    ds = check(content, world_size=ranks, accelerator=accelerator, layers=has_parameters(model))
    is_open = any(path[-1] == "enabled" and path[0] in HALF_PRECISIONS for path in left_open)
    return case, Computes(AUTO if is_open else ds.precision.name, ds.parallelism.recompute)
