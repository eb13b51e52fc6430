"""The report of `dsyolo scale` as data, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsyolo.scaling import bottleneck as words
from dsyolo.scaling.cases import ScalingCase, Wanted
from dsyolo.scaling.fit import Fit, fit
from dsyolo.scaling.results import CaseResult


class ReportRow(NamedTuple):
    """One size of one strategy under one scaling."""

    wanted: Wanted
    measured: CaseResult | None
    why_not: str
    base_ranks: int | None  # what it is compared with; None where it did not run
    base_strategy: str
    speedup: float | None
    efficiency: float | None
    bottleneck: str


class Group(NamedTuple):
    """A strategy under one scaling."""

    strategy: str
    scaling: str
    rows: list[ReportRow]
    fit: Fit


class Report(NamedTuple):
    """All of it. `settings` is what was asked for, `notes` what a reader must know."""

    settings: Mapping[str, Any]
    notes: Sequence[str]
    groups: Sequence[Group]


def build(
    wanted: Sequence[Wanted],
    measured: Mapping[ScalingCase, CaseResult],
    failed: Mapping[ScalingCase, str],
    settings: Mapping[str, Any],
    notes: Sequence[str],
) -> Report:
    """From what each case came to."""
    groups = []
    for scaling, strategy in dict.fromkeys((one.scaling, one.strategy) for one in wanted):
        own = [one for one in wanted if (one.scaling, one.strategy) == (scaling, strategy)]
        base = _base(own, wanted, measured)
        rows = [_row(one, measured, failed, base) for one in own]
        sizes = {row.wanted.ranks: row.measured.rounds for row in rows if row.measured}
        groups.append(Group(strategy, scaling, rows, fit(scaling, sizes)))
    return Report(settings, notes, groups)


def _base(
    own: Sequence[Wanted], wanted: Sequence[Wanted], measured: Mapping[ScalingCase, CaseResult]
) -> Wanted | None:
    """The strategy's smallest size; of a pipeline, that of one without stages, since it has none so small itself.

    Of those without stages, one of the same precision and recompute before others, whatever its size.
    """
    ran = [one for one in own if one.case in measured]
    if ran and ran[0].case and ran[0].case.stages > 1:
        computes = ran[0].computes
        plain = [
            one
            for one in wanted
            if one.scaling == own[0].scaling and one.case in measured and one.case and one.case.stages == 1
        ]
        ran = sorted(plain, key=lambda one: len(computes.differences(one.computes))) or ran
        ran = [one for one in ran if one.computes == ran[0].computes]
    return min(ran, key=lambda one: one.ranks, default=None)


def _row(
    one: Wanted,
    measured: Mapping[ScalingCase, CaseResult],
    failed: Mapping[ScalingCase, str],
    base: Wanted | None,
) -> ReportRow:
    found = measured.get(one.case) if one.case else None
    if found is None or base is None or base.case is None:
        why_not = (
            one.why_not or failed.get(one.case, "this ended before its turn")
            if one.case or one.why_not
            else one.why_not
        )
        return ReportRow(one, None, why_not, None, "", None, None, "")
    at = measured[base.case]
    speedup = found.images_per_s / at.images_per_s
    efficiency = words.efficiency(found, one.ranks, at, base.ranks)
    is_base = one.case == base.case
    comparable = base.strategy == one.strategy
    said = words.bottleneck(
        found, one.ranks, None if is_base or not comparable else at, base.ranks, one.scaling
    )
    said += words.unlike(one, base)
    return ReportRow(one, found, "", base.ranks, base.strategy, speedup, efficiency, said)


def to_json(report: Report) -> dict[str, Any]:
    """Everything, with the seconds of every measured step."""
    return {
        "settings": dict(report.settings),
        "notes": list(report.notes),
        "groups": [
            {
                "strategy": group.strategy,
                "scaling": group.scaling,
                "rows": [_row_json(row) for row in group.rows],
                "fit": {
                    "formula": group.fit.formula,
                    "coefficients_s": group.fit.coefficients,
                    "says": group.fit.says,
                    "predictions": [one._asdict() for one in group.fit.predictions],
                },
            }
            for group in report.groups
        ],
    }


def _row_json(row: ReportRow) -> dict[str, Any]:
    place = {"ranks": row.wanted.ranks}
    one = row.measured
    if one is None:
        return {**place, "why_not": row.why_not}
    case = row.wanted.case
    assert case is not None
    return {
        **place,
        "micro_batch": case.micro_batch,
        "accumulation": case.accumulation,
        "global_batch": case.global_batch,
        "images_per_s": one.images_per_s,
        "step_s": one.step_s,
        "spread_s": one.spread_s,
        "speedup": row.speedup,
        "efficiency": row.efficiency,
        "against": {"strategy": row.base_strategy, "ranks": row.base_ranks},
        "split_s": one.split,
        "validation_s": one.validation_s,
        "checkpoint_s": one.checkpoint_s,
        "startup_s": one.startup_s,
        "wall_s": one.wall_s,
        "mfu": one.utilisation,
        "use": one.use._asdict(),
        "collectives_a_step": one.collectives,
        "collective_mb_a_step": one.collective_mb,
        "comms_logger": one.comms_log,
        "bottleneck": row.bottleneck,
        "about": one.about,
        "rounds_s": one.rounds,
    }
