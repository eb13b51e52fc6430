"""The report of `dsyolo scale` as data, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsyolo.scaling.bottleneck import bottleneck, efficiency, unlike
from dsyolo.scaling.cases import ScalingCase, Wanted
from dsyolo.scaling.fit import Fit, fit
from dsyolo.scaling.results import CaseResult


class ReportRow(NamedTuple):
    """One size of one strategy under one scaling. What follows `why_not` holds for a size that ran."""

    wanted: Wanted
    measured: CaseResult | None = None
    why_not: str = ""
    base_ranks: int = 1  # the size that it is compared with
    base_strategy: str = ""
    speedup: float = 1.0
    efficiency: float = 1.0
    bottleneck: str = ""


class Group(NamedTuple):
    """A strategy under one scaling."""

    strategy: str
    scaling: str
    rows: list[ReportRow]
    fit: Fit


class Report(NamedTuple):
    """The whole report. `settings` are the command's, `notes` what a reader must know."""

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
    """Build the report from the results of the cases."""
    groups = []
    for scaling, strategy in dict.fromkeys((one.scaling, one.strategy) for one in wanted):
        own = [one for one in wanted if (one.scaling, one.strategy) == (scaling, strategy)]
        ran = [(one, one.case) for one in wanted if one.scaling == scaling and one.case in measured]
        base = _base(strategy, [(one, case) for one, case in ran if case])
        rows = [_row(one, measured, failed, base) for one in own]
        sizes = {row.wanted.ranks: row.measured.rounds_s for row in rows if row.measured}
        groups.append(Group(strategy, scaling, rows, fit(scaling, sizes)))
    return Report(settings, notes, groups)


def _base(strategy: str, ran: Sequence[tuple[Wanted, ScalingCase]]) -> Wanted | None:
    """Return the size that others are compared with: the strategy's smallest one.

    A pipeline cannot run on one rank, so that its base is a strategy without stages, if possible one of the same
    precision and recompute.
    """
    own = [(one, case) for one, case in ran if one.strategy == strategy]
    if own and own[0][1].stages > 1:
        differences = own[0][0].computes.differences
        plain = [(one, case) for one, case in ran if case.stages == 1]
        own = sorted(plain, key=lambda pair: len(differences(pair[0].computes))) or own
        own = [pair for pair in own if pair[0].computes == own[0][0].computes]
    return min((one for one, _ in own), key=lambda one: one.ranks, default=None)


def _row(
    one: Wanted,
    measured: Mapping[ScalingCase, CaseResult],
    failed: Mapping[ScalingCase, str],
    base: Wanted | None,
) -> ReportRow:
    found = measured.get(one.case) if one.case else None
    if found is None or base is None or base.case is None:
        why_not = one.why_not
        if one.case and not why_not:
            why_not = failed.get(one.case, "the command ended before its turn")
        return ReportRow(one, why_not=why_not)
    reference = measured[base.case]
    is_comparable = base.strategy == one.strategy and one.case != base.case
    text = bottleneck(found, one.ranks, reference if is_comparable else None, base.ranks, one.scaling)
    return ReportRow(
        one,
        found,
        base_ranks=base.ranks,
        base_strategy=base.strategy,
        speedup=found.images_per_s / reference.images_per_s,
        efficiency=efficiency(found, one.ranks, reference, base.ranks),
        bottleneck=text + unlike(one, base),
    )


def to_json(report: Report) -> dict[str, Any]:
    """Return everything, with the seconds of every measured step."""
    groups = [
        {
            "strategy": group.strategy,
            "scaling": group.scaling,
            "rows": [_row_json(row) for row in group.rows],
            "fit": {
                "formula": group.fit.formula,
                "coefficients_s": group.fit.coefficients,
                "says": group.fit.reliability,
                "predictions": [one._asdict() for one in group.fit.predictions],
            },
        }
        for group in report.groups
    ]
    return {"settings": dict(report.settings), "notes": list(report.notes), "groups": groups}


def _row_json(row: ReportRow) -> dict[str, Any]:
    one, case = row.measured, row.wanted.case
    if one is None or case is None:
        return {"ranks": row.wanted.ranks, "why_not": row.why_not}
    return {
        "ranks": row.wanted.ranks,
        "micro_batch": case.micro_batch,
        "accumulation": case.accumulation,
        "global_batch": case.global_batch,
        "images_per_s": one.images_per_s,
        "step_s": one.step_s,
        "spread_s": one.spread_s,
        "speedup": row.speedup,
        "efficiency": row.efficiency,
        "against": {"strategy": row.base_strategy, "ranks": row.base_ranks},
        "bottleneck": row.bottleneck,
        **one._asdict(),
        "use": one.use._asdict(),
    }
