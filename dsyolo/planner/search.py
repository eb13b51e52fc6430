"""All strategies that a network could be trained by, predicted and ranked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsyolo.config.spec import Precision
from dsyolo.planner.predict import Planner, StrategyEstimate
from dsyolo.planner.strategy import RECOMPUTES, StrategySettings, settings

HEADROOM = 0.05  # of a GPU's memory that a recommendation leaves free: predictions are off by as much
AS_FAST = 0.01  # strategies whose steps differ by less are equally fast: then the simpler one is taken


class Ranking(NamedTuple):
    """Strategies that fit, the recommended one first, and those that do not, the nearest first."""

    fitting: list[StrategyEstimate]
    others: list[StrategyEstimate]

    @property
    def best(self) -> StrategyEstimate | None:
        return self.fitting[0] if self.fitting else None

    def families(self) -> list[StrategyEstimate]:
        """The best of each way of spreading, whatever its precision and micro-batch, in the order of the ranking."""
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
) -> Ranking:
    """Predicts all; where a size fits with all blocks recomputed and not with none, the fewest blocks are looked for too."""
    found: dict[StrategySettings, StrategyEstimate] = {}
    # By kind: the last size that was looked at, and whether a device has room for it.
    fitting: dict[StrategySettings, tuple[int, bool]] = {}
    for one in settings(planner.hardware.ranks, global_batch, optimizer, tuple(precisions), recomputes):
        if one.offload_optimizer and planner.hardware.accelerator == "cpu":
            continue  # from a host to itself
        kind = one._replace(micro_batch=0, accumulation=0, recompute="none")
        size, fits = fitting.get(kind, (0, True))
        if size != one.micro_batch and not fits:
            continue  # nor does a larger one
        found[one] = planner.predict(one)
        has_room = found[one].peak_bytes <= planner.hardware.usable_bytes
        fitting[kind] = one.micro_batch, has_room or (size == one.micro_batch and fits)
    for one in _between(planner, found):
        found[one] = planner.predict(one)
    return rank(found.values(), planner.hardware.usable_bytes)


def rank(strategies: Iterable[StrategyEstimate], usable_bytes: int) -> Ranking:
    """The fastest first, and of equally fast ones the simplest; those with headroom before those without."""
    strategies = list(strategies)
    fitting = [s for s in strategies if s.fits]
    roomy = [s for s in fitting if s.peak_bytes <= (1 - HEADROOM) * usable_bytes]
    tight = [s for s in fitting if s.peak_bytes > (1 - HEADROOM) * usable_bytes]
    others = [s for s in strategies if not s.fits]
    return Ranking(
        [*_by_speed(roomy), *_by_speed(tight)], sorted(others, key=lambda s: (s.peak_bytes, s.times.step))
    )


def _by_speed(strategies: list[StrategyEstimate]) -> list[StrategyEstimate]:
    if not strategies:
        return []
    fastest = min(s.times.step for s in strategies)

    def key(strategy: StrategyEstimate) -> tuple:
        one = strategy.settings
        slower = max(0, int((strategy.times.step / fastest - 1) / AS_FAST))
        parts = bool(one.offload_optimizer), one.pipeline_stages > 1, one.recompute != "none"
        return slower, *parts, one.zero_stage, one.accumulation, strategy.times.step

    return sorted(strategies, key=key)


def _between(planner: Planner, found: dict[StrategySettings, StrategyEstimate]) -> list[StrategySettings]:
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
