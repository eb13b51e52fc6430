"""The report of `dsyolo scale` as sections of tables and text, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsyolo.engine.step_timer import PHASES
from dsyolo.scaling.bottleneck import rank_count
from dsyolo.scaling.cases import WEAK
from dsyolo.scaling.fit import Fit
from dsyolo.scaling.report import Group, Report

Table = list[list[str]]  # rows of cells, the first is the head
PHASE_HEADS = ["data wait" if name == "data" else name for name in PHASES]
RATE_HEAD = ["ranks", "images a step", "step s (quartiles)", "images/s", "speedup", "efficiency"]
RATE_HEAD += ["epoch s", "start s", "MFU"]
USE_HEAD = ["ranks", "CPU all", "CPU own", "peak of a rank GiB", "activations GiB", "machine GiB"]
USE_HEAD += ["sent MB a step", "loopback MB a step", "collectives a step", "tensors MB a step"]
USE_HEAD += ["GPU", "GPU GiB", "GPU W"]


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
        items = [f"{rank_count(row.wanted.ranks)}: {row.bottleneck}" for row in group.rows if row.bottleneck]
        yield Section("Bottlenecks", items=items)
        yield Section(
            "A step in milliseconds; validation and checkpoint in seconds", table=split_table(group)
        )
        yield Section("Use of the machine during steps", table=use_table(group))
    yield Section("More ranks", fit_text(group.fit), table=prediction_table(group.fit))


def to_markdown(report: Report) -> str:
    """Return the report for a README or an issue."""
    settings = "\n".join(f"- {key}: {value}" for key, value in report.settings.items())
    blocks = ["# Scaling", settings, *report.notes]
    for group in report.groups:
        blocks.append(f"## {title(group)}")
        for section in sections(group):
            items = "\n".join(f"- {item}" for item in section.items)
            heading = f"### {section.heading}" if section.heading else ""
            blocks += [heading, section.text, items, _markdown_table(section.table)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def title(group: Group) -> str:
    """Return the heading of a strategy under one scaling."""
    fixed = "images per rank and step fixed" if group.scaling == WEAK else "images per step fixed"
    return f"{group.strategy}: {group.scaling} scaling, {fixed}"


def rate_table(group: Group) -> Table:
    """Return times, rates, speedups and efficiencies."""
    rows = []
    for row in group.rows:
        one, case = row.measured, row.wanted.case
        if one is None or case is None:
            empty = [""] * (len(RATE_HEAD) - 2)
            rows.append([str(row.wanted.ranks), f"did not run: {row.why_not}", *empty])
            continue
        low, high = one.spread_s
        is_own_base = row.base_strategy == group.strategy
        base = "" if is_own_base else f" (against {row.base_strategy} on {row.base_ranks})"
        cells = [
            str(row.wanted.ranks),
            f"{case.micro_batch} x {case.accumulation} x {case.dp_size}",
            f"{one.step_s:.3f} ({low:.3f} to {high:.3f})",
            f"{one.images_per_s:.1f}",
            f"{row.speedup:.2f}",
            f"{row.efficiency:.2f}{base}",
            f"{one.about['data_images'] / one.images_per_s:.1f}" if "data_images" in one.about else "",
            f"{one.startup_s:.1f}",
            _cell(one.mfu, "{:.0%}"),
        ]
        rows.append(cells)
    return [RATE_HEAD, *rows]


def split_table(group: Group) -> Table:
    """Return the time of each phase of a step, of a validation and of a checkpoint."""
    table = [["ranks", *PHASE_HEADS, "step", "validation s", "checkpoint s"]]
    for row in group.rows:
        if one := row.measured:
            phases = [f"{1000 * one.split[name]:.1f}" for name in PHASES]
            rest = [f"{1000 * one.step_s:.1f}", f"{one.validation_s:.2f}", f"{one.checkpoint_s:.2f}"]
            table.append([str(row.wanted.ranks), *phases, *rest])
    return table


def use_table(group: Group) -> Table:
    """Return processors, memory, network and GPU, without columns that nothing was measured for."""
    rows = []
    for row in group.rows:
        if one := row.measured:
            use = one.use
            cells = [
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
            rows.append(cells)
    shown = [i for i in range(len(USE_HEAD)) if not rows or any(row[i] for row in rows)]
    return [[row[i] for i in shown] for row in [USE_HEAD, *rows]]


def prediction_table(found: Fit) -> Table:
    """Return the efficiency at sizes that were not measured; empty where nothing was fitted."""
    if not found.predictions:
        return []
    return [
        ["ranks", *(str(one.ranks) for one in found.predictions)],
        ["efficiency", *(f"{one.efficiency:.2f}" for one in found.predictions)],
        ["5 to 95 %", *(f"{one.low:.2f} to {one.high:.2f}" for one in found.predictions)],
    ]


def fit_text(found: Fit) -> str:
    """Return the formula with its coefficients, and how far to trust it."""
    figures = ", ".join(f"{name} = {1000 * value:.1f} ms" for name, value in found.coefficients.items())
    return f"Fit: {found.formula}{f', {figures}' if figures else ''}. {found.reliability}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _markdown_table(table: Table | None) -> str:
    if not table:
        return ""
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
