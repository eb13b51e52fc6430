"""The report of `dsyolo scale` as tables, and as Markdown."""

from __future__ import annotations

from dsyolo.engine.step_timer import PHASES
from dsyolo.scaling.cases import WEAK
from dsyolo.scaling.fit import Fit
from dsyolo.scaling.report import Group, Report


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
                f"{case.micro_batch} x {case.accumulation} x {case.dp_size}",
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
