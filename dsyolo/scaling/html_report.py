"""The report of `dsyolo scale` as one HTML page that needs no other file: tables, text, and matplotlib's plots as SVG."""

import io
from collections.abc import Callable
from html import escape as escape_markup
from string import Template
from typing import Any

import numpy as np

from dsyolo.base.text import escaped
from dsyolo.engine.step_timer import PHASES
from dsyolo.scaling.report import Group, Report, ReportRow
from dsyolo.scaling.results import CaseResult
from dsyolo.scaling.tables import PHASE_HEADS, Section, Table, sections, title

COLOURS = {  # by phase
    **{"data": "#d9822b", "copy": "#b3b3b3", "forward": "#2f6fb5", "backward": "#7fb0e0"},
    **{"communication": "#c8403c", "optimizer": "#5a9e5a", "other": "#8c7fb8"},
}
INK, GRID = "#22272e", "#d8dde3"
STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #22272e; background: #fff;
  max-width: 1180px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .6rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #d8dde3; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 0 1rem; } dt { color: #667; } dd { margin: 0; }
table { border-collapse: collapse; margin: .3rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e6e9ed; } th { color: #556; font-weight: 600; }
th:first-child, td:first-child { text-align: left; } td.reason { text-align: left; color: #a33; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { width: 370px; height: auto; }
.scroll { overflow-x: auto; } .note { color: #445; max-width: 62rem; } li { max-width: 62rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>dsyolo: scaling</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>$style</style></head>
<body>
<h1>How the training scales</h1>
<dl>$settings</dl>
$notes
$groups
</body>
</html>
"""


def escape(text: str) -> str:
    """Return text that is neither markup nor a control of what shows it; lone surrogates could not be written."""
    return escape_markup(escaped(text))


def page(report: Report) -> str:
    """Return the whole page."""
    settings = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in report.settings.items()
    )
    notes = "\n".join(_paragraph(note) for note in report.notes)
    groups = "\n".join(map(_group, report.groups))
    return Template(PAGE).substitute(style=STYLE, settings=settings, notes=notes, groups=groups)


def _group(group: Group) -> str:
    rates, *others = map(_section, sections(group))
    parts = [f"<h2>{escape(title(group))}</h2>", rates]
    if any(row.measured for row in group.rows):
        plots = "".join(_svg(draw, group) for draw in (_rates, _splits, _efficiencies))
        parts.append(f'<div class="plots">{plots}</div>')
    return "\n".join([*parts, *others])


def _section(section: Section) -> str:
    items = "".join(f"<li>{escape(item)}</li>" for item in section.items)
    return (
        (f"<h3>{escape(section.heading)}</h3>" if section.heading else "")
        + (_paragraph(section.text) if section.text else "")
        + (f"<ul>{items}</ul>" if items else "")
        + (_table(section.table) if section.table else "")
    )


def _paragraph(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _table(rows: Table) -> str:
    head, *rest = rows
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{_cells(row)}</tr>" for row in rest)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cells(row: list[str]) -> str:
    if len(row) > 2 and not any(row[2:]):  # the reason why a size did not run spans the row
        return f'<td>{escape(row[0])}</td><td class="reason" colspan="{len(row) - 1}">{escape(row[1])}</td>'
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _svg(draw: Callable[[Any, Group], None], group: Group) -> str:
    import matplotlib  # here: half a second that most commands need not pay
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    salt = f"{group.strategy} {group.scaling} {draw.__name__}"  # so that equal reports are equal files
    look: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10, "font.family": "sans-serif"}
    look |= {"axes.edgecolor": GRID, **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), INK)}
    look |= {"axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes, group)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the XML head


def _measured(group: Group) -> tuple[list[int], list[ReportRow], list[CaseResult]]:
    """Return the sizes that ran, their rows and their results."""
    ran = [(row.wanted.ranks, row, row.measured) for row in group.rows if row.measured]
    ranks, rows, results = map(list, zip(*ran, strict=True))
    return ranks, rows, results


def _rates(axes: Any, group: Group) -> None:
    ranks, rows, results = _measured(group)
    rates = np.array([one.images_per_s for one in results])
    slow, fast = np.array([[one.images_per_step / s for s in one.spread_s[::-1]] for one in results]).T
    errors = np.maximum(0.0, [rates - slow, fast - rates])
    ideal = [n * rate / row.speedup / row.base_ranks for n, rate, row in zip(ranks, rates, rows, strict=True)]
    axes.plot(ranks, ideal, "--", color="#999", label="ideal")
    look = {"color": COLOURS["forward"], "capsize": 4}
    axes.errorbar(ranks, rates, errors, fmt="o-", label="measured, quartiles", **look)
    _sizes(axes, ranks)
    axes.set(title="images/s", xlabel="ranks", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left")


def _splits(axes: Any, group: Group) -> None:
    ranks, _, results = _measured(group)
    places, bottom = range(len(ranks)), np.zeros(len(ranks))
    for name, label in zip(PHASES, PHASE_HEADS, strict=True):
        heights = 1000 * np.array([one.split_s[name] for one in results])
        axes.bar(places, heights, 0.55, bottom, color=COLOURS[name], label=label)
        bottom = bottom + heights
    axes.set(title="a step, ms", xlabel="ranks", xlim=(-0.6, len(ranks) - 0.4))
    axes.set_xticks(list(places), [str(size) for size in ranks])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _efficiencies(axes: Any, group: Group) -> None:
    ranks, rows, _ = _measured(group)
    values = [row.efficiency for row in rows]
    ticks = ranks
    if found := group.fit.predictions:
        x, middle, low, high = zip(*found, strict=True)
        axes.fill_between(x, low, high, color="#c9dcf0", label="5 to 95 %")
        axes.plot(x, middle, color=COLOURS["forward"], linewidth=1.2, label="fit")
        ticks = sorted({*ranks, *x[1::2]})
    axes.plot(ranks, values, "o", color=COLOURS["communication"], label="measured")
    _sizes(axes, ticks)
    axes.set(title="efficiency", xlabel="ranks", ylim=(0, 1.05 * max(1.0, *values)))
    axes.legend(frameon=False, loc="lower left")


def _sizes(axes: Any, ranks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(size) for size in ranks])
    axes.minorticks_off()
