"""All strategies that a network could be trained by, predicted and ranked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dsyolo.config.spec import Precision
from dsyolo.planner.predict import Planner, StrategyEstimate
from dsyolo.planner.strategy import RECOMPUTES, StrategySettings, settings

HEADROOM = 0.05  # share of a GPU's memory that a recommendation leaves free: predictions are off by as much
AS_FAST = 0.01  # strategies whose steps differ by less are equally fast, and the simpler one is taken


class Ranking(NamedTuple):
    """Strategies that fit, the recommended one first, and those that do not, the nearest first."""

    fitting: list[StrategyEstimate]
    others: list[StrategyEstimate]

    @property
    def best(self) -> StrategyEstimate | None:
        return self.fitting[0] if self.fitting else None

    def families(self) -> list[StrategyEstimate]:
        """Return the best of each family, in the order of the ranking."""
        found: dict[tuple, StrategyEstimate] = {}
        for strategy in (*self.fitting, *self.others):
            found.setdefault(strategy.settings.family, strategy)
        return list(found.values())


def search(
    planner: Planner,
    global_batch: int,
    optimizer: str,
    precisions: Sequence[Precision],
    recomputes: Sequence[str | int] = RECOMPUTES,
    micro_batch: int | None = None,
) -> Ranking:
    """Predict all strategies, or those of one micro-batch, and rank them.

    If a micro-batch fits only with recompute, recompute the fewest blocks that make it fit.
    """
    usable_bytes = planner.hardware.usable_bytes
    found: dict[StrategySettings, StrategyEstimate] = {}
    # By kind: the last size that was looked at, and whether a device has room for it.
    fitting: dict[StrategySettings, tuple[int, bool]] = {}
    for one in settings(planner.hardware.ranks, global_batch, optimizer, precisions, recomputes):
        if one.offload_optimizer and planner.hardware.accelerator == "cpu":
            continue  # from a host to itself
        if micro_batch not in (None, one.micro_batch):
            continue
        kind = one._replace(micro_batch=0, accumulation=0, recompute="none")
        size, fits = fitting.get(kind, (0, True))
        if size != one.micro_batch and not fits:
            continue  # nor does a larger one
        found[one] = planner.predict(one)
        has_room = found[one].peak_bytes <= usable_bytes
        fitting[kind] = one.micro_batch, has_room or (size == one.micro_batch and fits)
    found |= {one: planner.predict(one) for one in _with_fewest_blocks(planner, found)}
    # The fastest first, of equally fast ones the simplest; those with headroom before those without
    strategies, limit = list(found.values()), (1 - HEADROOM) * usable_bytes
    roomy = [one for one in strategies if one.fits and one.peak_bytes <= limit]
    tight = [one for one in strategies if one.fits and one.peak_bytes > limit]
    others = [one for one in strategies if not one.fits]
    others.sort(key=lambda one: (one.peak_bytes, one.times.step))
    return Ranking([*_by_speed(roomy), *_by_speed(tight)], others)


def _by_speed(strategies: list[StrategyEstimate]) -> list[StrategyEstimate]:
    fastest = min((one.times.step for one in strategies), default=0.0)

    def key(strategy: StrategyEstimate) -> tuple[Any, ...]:
        one = strategy.settings
        slower = max(0, int((strategy.times.step / fastest - 1) / AS_FAST))
        parts = bool(one.offload_optimizer), one.pipeline_stages > 1, one.recompute != "none"
        return slower, *parts, one.zero_stage, one.accumulation, strategy.times.step

    return sorted(strategies, key=key)


def _with_fewest_blocks(
    planner: Planner, found: dict[StrategySettings, StrategyEstimate]
) -> list[StrategySettings]:
    result = []
    for one, strategy in found.items():
        recomputing = found.get(one._replace(recompute="blocks"))
        if one.recompute != "none" or strategy.fits or recomputing is None or not recomputing.fits:
            continue
        if one.pipeline_stages > 1:
            continue  # a budget is one for the whole network
        rest = strategy.peak_bytes - strategy.terms["activations"]
        free = int((1 - HEADROOM) * planner.hardware.usable_bytes) - rest
        fewest = planner.smallest_recompute(one, free) if free > 0 else None
        if fewest:
            result.append(fewest)
    return result
