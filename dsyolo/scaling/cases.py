"""The trainings of `dsyolo scale`: strategies x numbers of ranks x scalings, each with its own DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS, batch_json, batch_sizes, fitted
from dsyolo.config.deepspeed.config import check
from dsyolo.config.deepspeed.json_reader import read_json, valid_part, without_auto
from dsyolo.config.deepspeed.set_aside import Reason
from dsyolo.config.run_config import AUTO
from dsyolo.config.spec import BatchPlan
from dsyolo.models.registry import meta_network

WEAK, STRONG = "weak", "strong"
HALF_PRECISIONS = ("bf16", "fp16", "torch_autocast")


class ScalingStrategy(NamedTuple):
    """A DeepSpeed JSON without its batch sizes."""

    name: str
    source: Mapping[str, Any]
    stages: int
    micro_batch: int  # images of a data-parallel rank under weak scaling, as `accumulation`
    accumulation: int
    global_batch: int  # under strong scaling
    set_aside: tuple[Reason, ...] = ()  # keys of the file that have no effect here

    def on(self, dp_size: int, scaling: str) -> tuple[int, int]:
        """Return (micro-batch, accumulation) of each rank. Raise UserError for a batch that they cannot share."""
        if scaling == WEAK:
            return self.micro_batch, self.accumulation
        if self.global_batch % dp_size:
            rule = f"{self.global_batch} images a step cannot be divided among {dp_size} data-parallel ranks"
            raise UserError("This size cannot run", [rule])
        batch = fitted(self.global_batch, self.micro_batch, None, dp_size)
        return batch.micro, batch.accumulation


class ScalingCase(NamedTuple):
    """One training. Equal ones run once, whatever they are needed for."""

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
        """Return the name of its folder."""
        return f"{self.strategy}_{self.ranks}ranks_{self.micro_batch}x{self.accumulation}"


class Computes(NamedTuple):
    """Precision and recompute, which must be equal for a fair comparison of two trainings."""

    precision: str  # as `Precision.name` has it, or "auto"
    recompute: str | int

    def differences(self, other: Computes) -> list[str]:
        """Return the names of what differs."""
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
    """Read a JSON, whose batch sizes are taken as those of a training on `smallest` ranks, where none are given here.

    Other values that are "auto" stay so: train.py fills them in.
    """
    read = read_json(path)
    source, faults = read.content or {}, list(read.problems)
    content, left_open = without_auto(source)
    valid = valid_part(content, faults)
    if not micro_batch:
        rule = "it would differ between sizes. Give a number, or --micro_batch"
        faults += [f'{key}: "auto" given, but {rule}.' for key in BATCH_KEYS if (key,) in left_open]
    if faults:
        problems += [f"{path}: {fault}" for fault in faults]
        return None
    stages = int(valid.get("pipeline", {}).get("stages", 1))
    train, micro, steps = batch_sizes(valid)
    dp_size = max(1, smallest // stages)
    share = train // dp_size if train else None  # images of a data-parallel rank in a step
    micro_given, micro = micro, micro_batch or micro
    steps = accumulation or steps or (max(1, share // micro) if share and micro_given and micro else 1)
    micro = micro or (max(1, share // steps) if share else 1)
    if micro_batch or accumulation or not train:
        train = micro * steps * dp_size
    # The smallest world may have fewer ranks than stages; under weak scaling a rank keeps its images.
    steps *= max(1, stages // smallest)
    rest = {key: value for key, value in source.items() if key not in BATCH_KEYS}
    return ScalingStrategy(path.stem, rest, stages, micro, steps, train, read.set_aside)


def wanted(
    strategies: Sequence[ScalingStrategy],
    scalings: Sequence[str],
    ranks: Sequence[int],
    model: str,
    accelerator: str,
) -> Iterator[Wanted]:
    """Yield all rows of the report. A size that a strategy cannot run at has the reason."""
    for scaling, strategy, size in product(scalings, strategies, ranks):
        try:
            case, computes = _case(strategy, size, scaling, model, accelerator)
            yield Wanted(strategy.name, scaling, size, case, computes=computes)
        except UserError as error:
            yield Wanted(strategy.name, scaling, size, None, " ".join(error.problems))


def deepspeed_json(strategy: ScalingStrategy, case: ScalingCase) -> dict[str, Any]:
    """Return the JSON of the case's training."""
    return {**batch_json(BatchPlan(case.micro_batch, case.accumulation, case.dp_size)), **strategy.source}


def _case(
    strategy: ScalingStrategy, ranks: int, scaling: str, model: str, accelerator: str
) -> tuple[ScalingCase, Computes]:
    if ranks % strategy.stages:
        rule = f"{ranks} ranks are not a multiple of its {strategy.stages} stages"
        raise UserError("This size cannot run", [rule])
    sizes = strategy.on(ranks // strategy.stages, scaling)
    case = ScalingCase(strategy.name, ranks, strategy.stages, *sizes)
    content, left_open = without_auto(deepspeed_json(strategy, case))
    ds = check(content, world_size=ranks, accelerator=accelerator, layers=meta_network(model).has_parameters)
    is_open = any(path[-1] == "enabled" and path[0] in HALF_PRECISIONS for path in left_open)
    return case, Computes(AUTO if is_open else ds.precision.name, ds.parallelism.recompute)
