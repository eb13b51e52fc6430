"""The report of `dsyolo scale` as sections of tables and text, and as Markdown."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from dsyolo.base.text import escaped
from dsyolo.config.messages import counted
from dsyolo.engine.step_timer import PHASES
from dsyolo.scaling.cases import WEAK
from dsyolo.scaling.fit import Fit
from dsyolo.scaling.report import Group, Report

Table = list[list[str]]  # rows of cells, the first is the head
PHASE_HEADS = ["data wait" if name == "data" else name for name in PHASES]
RATE_HEAD = [
    *("ranks", "images a step", "step s (quartiles)", "images/s"),
    *("speedup", "efficiency", "epoch s", "start s", "MFU"),
]
# Heads and formats of the figures of `Use` and of the collectives, by their names.
USE_COLUMNS = {
    "cpu": ("CPU all", "{:.0%}"),
    "cpu_own": ("CPU own", "{:.0%}"),
    "process_gib": ("peak of a rank GiB", "{:.2f}"),
    "activations_gib": ("activations GiB", "{:.2f}"),
    "machine_gib": ("machine GiB", "{:.1f}"),
    "sent_mb": ("sent MB a step", "{:.2f}"),
    "inside_mb": ("loopback MB a step", "{:.2f}"),
    "collectives_a_step": ("collectives a step", "{:.0f}"),
    "collective_mb_a_step": ("tensors MB a step", "{:.2f}"),
    "gpu": ("GPU", "{:.0%}"),
    "gpu_gib": ("GPU GiB", "{:.1f}"),
    "gpu_w": ("GPU W", "{:.0f}"),
}


class Section(NamedTuple):
    """A part of a group's report; what is empty is left out."""

    heading: str = ""
    text: str = ""
    items: Sequence[str] = ()
    table: Table | None = None


def sections(group: Group) -> Iterator[Section]:
    """Yield what the Markdown and the HTML page show of a group, in order."""
    yield Section(table=rate_table(group))
    if any(row.measured for row in group.rows):
        items = [
            f"{counted(row.wanted.ranks, 'rank')}: {row.bottleneck}" for row in group.rows if row.bottleneck
        ]
        yield Section("Bottlenecks", items=items)
        heading = "A step in milliseconds; validation and checkpoint in seconds"
        yield Section(heading, table=_split_table(group))
        yield Section("Use of the machine during steps", table=_use_table(group))
    yield Section("More ranks", _fit_text(group.fit), table=_prediction_table(group.fit))


def to_markdown(report: Report) -> str:
    """Return the report for a README or an issue."""
    settings = "\n".join(f"- {key}: {plain(str(value))}" for key, value in report.settings.items())
    blocks = ["# Scaling", settings, *map(plain, report.notes)]
    for group in report.groups:
        blocks.append(f"## {title(group)}")
        for section in sections(group):
            items = "\n".join(f"- {plain(item)}" for item in section.items)
            heading = f"### {section.heading}" if section.heading else ""
            blocks += [heading, section.text, items, _markdown_table(section.table)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _markdown_table(table: Table | None) -> str:
    if not table:
        return ""
    head, *rows = table
    lines = [list(map(plain, head)), ["---"] * len(head), *(list(map(plain, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Return text that Markdown shows as it is: no markup, and no end of a table's cell."""
    return escaped(escape(text, quote=False)).replace("|", "\\|")


def title(group: Group) -> str:
    """Return the heading of a strategy under one scaling."""
    fixed = "images per rank and step fixed" if group.scaling == WEAK else "images per step fixed"
    return f"{group.strategy}: {group.scaling} scaling, {fixed}"


def rate_table(group: Group) -> Table:
    """Return times, rates, speedups and efficiencies."""
    table = [RATE_HEAD]
    for row in group.rows:
        one, case = row.measured, row.wanted.case
        if one is None or case is None:
            empty = [""] * (len(RATE_HEAD) - 2)
            table.append([str(row.wanted.ranks), f"did not run: {row.why_not}", *empty])
            continue
        low, high = one.spread_s
        is_own_base = row.base_strategy == group.strategy
        base = "" if is_own_base else f" (against {row.base_strategy} on {row.base_ranks})"
        epoch_s = one.about["data_images"] / one.images_per_s if "data_images" in one.about else None
        cells = [
            str(row.wanted.ranks),
            f"{case.micro_batch} x {case.accumulation} x {case.dp_size}",
            f"{one.step_s:.3f} ({low:.3f} to {high:.3f})",
            f"{one.images_per_s:.1f}",
            f"{row.speedup:.2f}",
            f"{row.efficiency:.2f}{base}",
            *(_cell(epoch_s, "{:.1f}"), f"{one.startup_s:.1f}", _cell(one.mfu, "{:.0%}")),
        ]
        table.append(cells)
    return table


def _split_table(group: Group) -> Table:
    """Return the time of each phase of a step, of a validation and of a checkpoint."""
    table = [["ranks", *PHASE_HEADS, "step", "validation s", "checkpoint s"]]
    for row in group.rows:
        if one := row.measured:
            times_s = [*(one.split_s[name] for name in PHASES), one.step_s]
            rest = [f"{one.validation_s:.2f}", f"{one.checkpoint_s:.2f}"]
            table.append([str(row.wanted.ranks), *(f"{1000 * time_s:.1f}" for time_s in times_s), *rest])
    return table


def _use_table(group: Group) -> Table:
    """Return processors, memory, network and GPU, without columns that nothing was measured for."""
    ran = [
        (row.wanted.ranks, {**one._asdict(), **one.use._asdict()})
        for row in group.rows
        if (one := row.measured)
    ]
    shown = [name for name in USE_COLUMNS if any(figures[name] is not None for _, figures in ran)]
    rows = [
        [str(ranks), *(_cell(figures[name], USE_COLUMNS[name][1]) for name in shown)]
        for ranks, figures in ran
    ]
    return [["ranks", *(USE_COLUMNS[name][0] for name in shown)], *rows]


def _prediction_table(found: Fit) -> Table:
    """Return the efficiency at sizes that were not measured; empty where nothing was fitted."""
    if not found.predictions:
        return []
    return [
        ["ranks", *(str(one.ranks) for one in found.predictions)],
        ["efficiency", *(f"{one.efficiency:.2f}" for one in found.predictions)],
        ["5 to 95 %", *(f"{one.low:.2f} to {one.high:.2f}" for one in found.predictions)],
    ]


def _fit_text(found: Fit) -> str:
    """Return the formula with its coefficients, and how far to trust it."""
    figures = ", ".join([found.formula, *(f"{k} = {1000 * v:.1f} ms" for k, v in found.coefficients.items())])
    return f"Fit: {figures}. {found.reliability}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
