"""Which strategies fit, which is best, and why the others lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsyolo.plan.counts import Counts
from dsyolo.plan.hardware import CONTEXT_GIB, GIB, Hardware
from dsyolo.plan.memory import Ledger, Peak
from dsyolo.plan.pace import Pace, pace, wire_of
from dsyolo.plan.strategies import PRECISIONS, Strategy, strategies, with_budget
from dsyolo.wire import Wire

NEAR = 1.05  # times as long as the fastest is as good: the simplest of these is recommended


class Judged(NamedTuple):
    """A strategy with its figures."""

    strategy: Strategy
    peak: Peak
    wire: Wire
    pace: Pace
    room: float  # bytes that a GPU has left; negative: it does not fit

    @property
    def fits(self) -> bool:
        return self.room >= 0

    @property
    def family(self) -> tuple[Any, ...]:
        """Of all that differ in precision and batches alone, the best one is shown."""
        ds = self.strategy.ds
        offloads = (ds.offload_optimizer, ds.offload_param, ds.offload_activations)
        return ds.zero_stage, offloads, ds.stages, self.strategy.recompute == "none"

    @property
    def plainness(self) -> tuple[Any, ...]:
        """Of near ones the smallest is taken: nothing that it does not need."""
        ds = self.strategy.ds
        offloads = [ds.offload_optimizer, ds.offload_param, ds.offload_activations]
        stage = (1, 0, 2, 3).index(ds.zero_stage) if ds.data_parallel_size > 1 else ds.zero_stage
        precision = list(PRECISIONS).index(ds.precision)
        recomputes = self.strategy.recompute != "none"
        return sum(map(bool, offloads)), recomputes, ds.stages, precision, stage, -ds.micro_batch

    def to_json(self) -> dict[str, Any]:
        """As `--json` gives it."""
        return {
            "settings": self.strategy.settings(),
            "peak_gpu_gib": self.peak.total / GIB,
            "terms_gib": {name: size / GIB for name, size in self.peak.device.items()},
            "host_gib": self.peak.host_total / GIB,
            "wire_bytes_per_step": self.wire.total,
            "wire_bytes": self.wire._asdict(),
            "step_s": self.pace.step,
            "time_s": self.pace._asdict(),
            "fits": self.fits,
            "why_not": self.why_not(),
            "config": self.strategy.source,
        }

    def why_not(self) -> str | None:
        """Why it does not fit."""
        if self.fits:
            return None
        largest = max(self.peak.device, key=lambda name: self.peak.device[name])
        size = self.peak.device[largest] / GIB
        return f"{-self.room / GIB:.2f} GiB too large; {largest} take{'s' if largest in ('ema', 'optimizer') else ''} {size:.2f}"


def judge(counts: Counts, global_batch: int, hardware: Hardware) -> list[Judged]:
    """All strategies, those first that fit, the fastest first."""
    ledger = Ledger(counts)
    found: list[Judged] = []
    for strategy in strategies(counts.model, global_batch, hardware):
        one = _judge(ledger, strategy, hardware)
        if one is None:
            continue
        found.append(one)
        if not one.fits and _may_take_a_budget(strategy):
            found += _with_budget(ledger, one, hardware)
    return sorted(found, key=lambda one: (not one.fits, one.pace.step if one.fits else -one.room))


def best_of(found: Sequence[Judged]) -> Judged | None:
    """The plainest of those that are nearly as fast as the fastest; None where nothing fits."""
    fitting = [one for one in found if one.fits]
    if not fitting:
        return None
    fastest = min(one.pace.step for one in fitting)
    return min((one for one in fitting if one.pace.step <= NEAR * fastest), key=lambda one: one.plainness)


def best_of_families(found: Sequence[Judged], most: int) -> list[Judged]:
    """The first of each family, in their order."""
    seen: dict[tuple[Any, ...], Judged] = {}
    for one in found:
        seen.setdefault(one.family, one)
    return list(seen.values())[:most]


def why_it_loses(one: Judged, best: Judged) -> str:
    """In a table's cell."""
    if not one.fits:
        return one.why_not() or ""
    ratio = one.pace.step / best.pace.step
    if ratio <= 1.005:
        return "as fast, but not as plain"
    if ratio <= NEAR:
        return f"{ratio - 1:.0%} slower"
    more = [
        (now - then, name)
        for now, then, name in zip(one.pace, best.pace, ("compute", "traffic", "bubble", "host"), strict=True)
    ]
    return f"{ratio:.2f} times as long: {max(more)[1]}"


def _judge(ledger: Ledger, strategy: Strategy, hardware: Hardware) -> Judged | None:
    ds = strategy.ds
    plan = ledger.plan(ds)
    if plan is None:
        return None
    zero = ds.deepspeed_json(ledger.counts.num_parameters, cpu=False)["zero_optimization"]
    peak = ledger.peak(ds, zero, plan)
    wire = wire_of(ledger, ds, zero)
    room = (hardware.memory_gib - CONTEXT_GIB) * GIB - peak.total
    return Judged(strategy, peak, wire, pace(ledger, ds, plan, peak, wire, hardware), room)


def _may_take_a_budget(strategy: Strategy) -> bool:
    ds = strategy.ds
    return ds.stages == 1 and strategy.recompute == "none" and ds.precision == "autocast_bf16"


def _with_budget(ledger: Ledger, one: Judged, hardware: Hardware) -> list[Judged]:
    """The same with the fewest blocks recomputed that make it fit, if any do."""
    kept = one.peak.device["activations"] + one.room
    budget = math.floor(kept / GIB * 20) / 20  # in steps of 0.05 GiB
    if budget <= 0:
        return []
    strategy = with_budget(one.strategy, f"{budget:.2f}GiB", ledger.counts.model)
    judged = strategy and _judge(ledger, strategy, hardware)
    return [judged] if judged and judged.fits else []
