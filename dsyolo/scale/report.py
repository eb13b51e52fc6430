"""The report of `dsyolo scale` as data, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsyolo.parallel.phases import PHASES
from dsyolo.scale import words
from dsyolo.scale.cases import WEAK, Case, Wanted
from dsyolo.scale.fit import Fit, fit
from dsyolo.scale.results import Measured


class Row(NamedTuple):
    """One size of one strategy under one scaling."""

    wanted: Wanted
    measured: Measured | None
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
    rows: list[Row]
    fit: Fit


class Report(NamedTuple):
    """All of it. `settings` is what was asked for, `notes` what a reader must know."""

    settings: Mapping[str, Any]
    notes: Sequence[str]
    groups: Sequence[Group]


def build(
    wanted: Sequence[Wanted],
    measured: Mapping[Case, Measured],
    failed: Mapping[Case, str],
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
    own: Sequence[Wanted], wanted: Sequence[Wanted], measured: Mapping[Case, Measured]
) -> Wanted | None:
    """The strategy's smallest size; of a pipeline, that of one without stages, since it has none so small itself."""
    ran = [one for one in own if one.case in measured]
    if ran and ran[0].case and ran[0].case.stages > 1:
        plain = [
            one
            for one in wanted
            if one.scaling == own[0].scaling and one.case in measured and one.case and one.case.stages == 1
        ]
        ran = plain or ran
    return min(ran, key=lambda one: one.ranks, default=None)


def _row(
    one: Wanted, measured: Mapping[Case, Measured], failed: Mapping[Case, str], base: Wanted | None
) -> Row:
    found = measured.get(one.case) if one.case else None
    if found is None or base is None or base.case is None:
        why_not = (
            one.why_not or failed.get(one.case, "it was not run") if one.case or one.why_not else one.why_not
        )
        return Row(one, None, why_not, None, "", None, None, "")
    at = measured[base.case]
    speedup = found.images_per_s / at.images_per_s
    efficiency = words.efficiency(found, one.ranks, at, base.ranks)
    is_base = one.case == base.case
    comparable = base.strategy == one.strategy
    said = words.bottleneck(
        found, one.ranks, None if is_base or not comparable else at, base.ranks, one.scaling
    )
    return Row(one, found, "", base.ranks, base.strategy, speedup, efficiency, said)


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


def _row_json(row: Row) -> dict[str, Any]:
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
        "flop_utilisation": one.utilisation,
        "use": one.use._asdict(),
        "collectives_a_step": one.collectives,
        "collective_mb_a_step": one.collective_mb,
        "comms_logger": one.comms_log,
        "bottleneck": row.bottleneck,
        "about": one.about,
        "rounds_s": one.rounds,
    }


def to_markdown(report: Report) -> str:
    """For a README or an issue."""
    parts = ["# Scaling", "", *(f"- {key}: {value}" for key, value in report.settings.items()), ""]
    parts += [*(f"{note}\n" for note in report.notes)]
    for group in report.groups:
        parts += [f"## {title(group)}", "", *_table(rate_table(group)), ""]
        parts += ["A step in milliseconds, and seconds of a validation and of a checkpoint:\n"]
        parts += [
            *_table(split_table(group)),
            "",
            "Use of the machine while steps ran:\n",
            *_table(use_table(group)),
            "",
        ]
        parts += [
            *(f"- {ranks_words(row.wanted.ranks)}: {row.bottleneck}" for row in group.rows if row.bottleneck),
            "",
        ]
        parts += [
            fit_words(group.fit),
            "",
            *(_table(prediction_table(group.fit)) if group.fit.predictions else []),
            "",
        ]
    return "\n".join(parts)


Table = list[list[str]]  # rows of cells, the first of them the head


def title(group: Group) -> str:
    """Of a strategy under one scaling."""
    what = (
        "weak scaling, a rank's images a step stay"
        if group.scaling == WEAK
        else "strong scaling, a step's images stay"
    )
    return f"{group.strategy}: {what}"


def ranks_words(ranks: int) -> str:
    """1 rank, 2 ranks."""
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def rate_table(group: Group) -> Table:
    """Time, rate, speedup and efficiency."""
    head = [
        "ranks",
        "images a step",
        "step s (quartiles)",
        "images/s",
        "speedup",
        "efficiency",
        "epoch s",
        "start s",
        "FLOP/s used",
    ]
    rows = []
    for row in group.rows:
        one, case = row.measured, row.wanted.case
        if one is None or case is None:
            rows.append([str(row.wanted.ranks), f"did not run: {row.why_not}", *[""] * (len(head) - 2)])
            continue
        low, high = one.spread_s
        star = (
            ""
            if row.base_strategy == group.strategy
            else f" (against {row.base_strategy} on {row.base_ranks})"
        )
        rows.append(
            [
                str(row.wanted.ranks),
                f"{case.micro_batch} x {case.accumulation} x {case.replicas}",
                f"{one.step_s:.3f} ({low:.3f} to {high:.3f})",
                f"{one.images_per_s:.1f}",
                f"{row.speedup:.2f}",
                f"{row.efficiency:.2f}{star}",
                f"{one.about['data_images'] / one.images_per_s:.1f}" if "data_images" in one.about else "",
                f"{one.startup_s:.1f}",
                "" if one.utilisation is None else f"{one.utilisation:.0%}",
            ]
        )
    return [head, *rows]


def split_table(group: Group) -> Table:
    """Where a step's time goes."""
    rows = [
        [
            str(row.wanted.ranks),
            *(f"{1000 * one.split[name]:.1f}" for name in PHASES),
            f"{1000 * one.step_s:.1f}",
            f"{one.validation_s:.2f}",
            f"{one.checkpoint_s:.2f}",
        ]
        for row in group.rows
        if (one := row.measured)
    ]
    return [
        [
            "ranks",
            *("data wait" if name == "data" else name for name in PHASES),
            "step",
            "validation s",
            "checkpoint s",
        ],
        *rows,
    ]


def use_table(group: Group) -> Table:
    """Processors, memory, network."""
    head = ["ranks", "CPU all", "CPU own", "peak of a rank GiB", "activations GiB", "machine GiB"]
    head += [
        "sent MB a step",
        "loopback MB a step",
        "collectives a step",
        "tensors MB a step",
        "GPU",
        "GPU GiB",
        "GPU W",
    ]
    rows = []
    for row in group.rows:
        if one := row.measured:
            use = one.use
            rows.append(
                [
                    str(row.wanted.ranks),
                    _cell(use.cpu, "{:.0%}"),
                    _cell(use.cpu_own, "{:.0%}"),
                    _cell(use.process_gib, "{:.2f}"),
                    _cell(use.activations_gib, "{:.2f}"),
                    _cell(use.machine_gib, "{:.1f}"),
                    _cell(use.sent_mb, "{:.2f}"),
                    _cell(use.inside_mb, "{:.2f}"),
                    f"{one.collectives:.0f}",
                    f"{one.collective_mb:.2f}",
                    _cell(use.gpu, "{:.0%}"),
                    _cell(use.gpu_gib, "{:.1f}"),
                    _cell(use.gpu_w, "{:.0f}"),
                ]
            )
    empty = [i for i in range(len(head)) if rows and all(row[i] == "" for row in rows)]
    return [[cell for i, cell in enumerate(row) if i not in empty] for row in [head, *rows]]


def prediction_table(found: Fit) -> Table:
    """Efficiency at sizes that were not measured."""
    shown = found.predictions
    head = ["ranks", *(str(one.ranks) for one in shown)]
    return [
        head,
        ["efficiency", *(f"{one.efficiency:.2f}" for one in shown)],
        ["5 to 95 %", *(f"{one.low:.2f} to {one.high:.2f}" for one in shown)],
    ]


def fit_words(found: Fit) -> str:
    """The formula with its figures, and what they are worth."""
    figures = ", ".join(f"{name} = {1000 * value:.1f} ms" for name, value in found.coefficients.items())
    return f"Fit: {found.formula}{f', {figures}' if figures else ''}. {found.says}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(rows: Table) -> list[str]:
    head, *rest = rows
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest]]
