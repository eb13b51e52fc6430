"""The report as one HTML page that needs nothing beside it: tables, words, and plots as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from html import escape
from typing import Any

from dsyolo.engine.step_timer import PHASES
from dsyolo.scaling.report import Group, Report
from dsyolo.scaling.tables import (
    Table,
    fit_words,
    prediction_table,
    ranks_words,
    rate_table,
    split_table,
    title,
    use_table,
)

COLOURS = {
    "data": "#d9822b",
    "copy": "#b3b3b3",
    "forward": "#2f6fb5",
    "backward": "#7fb0e0",
    "communication": "#c8403c",
    "optimizer": "#5a9e5a",
    "other": "#8c7fb8",
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
th:first-child, td:first-child { text-align: left; } td.words { text-align: left; color: #a33; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } .plots svg { width: 370px; height: auto; }
.scroll { overflow-x: auto; } .note { color: #445; max-width: 62rem; } li { max-width: 62rem; }
"""


def page(report: Report) -> str:
    """The whole page."""
    settings = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in report.settings.items()
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    groups = "".join(map(_group, report.groups))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>dsyolo: scaling</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>How the training scales</h1>\n<dl>{settings}</dl>\n{notes}\n"
        f"{groups}\n</body>\n</html>\n"
    )


def _group(group: Group) -> str:
    plots = "".join(_svg(draw, group) for draw in (_rates, _splits, _efficiencies)) if _has_run(group) else ""
    said = "".join(
        f"<li><b>{ranks_words(row.wanted.ranks)}</b>: {escape(row.bottleneck)}</li>"
        for row in group.rows
        if row.bottleneck
    )
    parts = [
        f"<h2>{escape(title(group))}</h2>",
        _table(rate_table(group)),
        f'<div class="plots">{plots}</div>',
        f"<h3>What holds it back</h3><ul>{said}</ul>" if said else "",
    ]
    if _has_run(group):
        parts += [
            "<h3>A step in milliseconds; validation and checkpoint in seconds</h3>",
            _table(split_table(group)),
        ]
        parts += ["<h3>Use of the machine while steps ran</h3>", _table(use_table(group))]
    parts += ["<h3>More ranks</h3>", f'<p class="note">{escape(fit_words(group.fit))}</p>']
    if group.fit.predictions:
        parts.append(_table(prediction_table(group.fit)))
    return "\n".join(filter(None, parts))


def _has_run(group: Group) -> bool:
    return any(row.measured for row in group.rows)


def _table(rows: Table) -> str:
    head, *rest = rows
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{_cells(row)}</tr>" for row in rest)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cells(row: list[str]) -> str:
    if len(row) > 2 and not any(row[2:]):  # a size that did not run says why over the whole row
        return f'<td>{escape(row[0])}</td><td class="words" colspan="{len(row) - 1}">{escape(row[1])}</td>'
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _svg(draw: Callable[[Any, Group], None], group: Group) -> str:
    import matplotlib  # here: half a second that most commands need not pay
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{group.strategy} {group.scaling} {draw.__name__}",
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes, group)
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            file, metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    text = file.getvalue()
    return text[text.index("<svg") :]  # without the XML head


def _rates(axes: Any, group: Group) -> None:
    rows = [row for row in group.rows if row.measured]
    ranks = [row.wanted.ranks for row in rows]
    rates = [row.measured.images_per_s for row in rows]  # type: ignore[union-attr]
    bounds = [[row.measured.images_per_step / s for s in row.measured.spread_s] for row in rows]  # type: ignore[union-attr]
    errors = [
        [max(0.0, rate - low) for rate, (_, low) in zip(rates, bounds, strict=True)],
        [max(0.0, high - rate) for rate, (high, _) in zip(rates, bounds, strict=True)],
    ]
    per_rank = [rate / row.speedup / row.base_ranks for rate, row in zip(rates, rows, strict=True)]  # type: ignore[operator]
    axes.plot(
        ranks, [n * one for n, one in zip(ranks, per_rank, strict=True)], "--", color="#999", label="ideal"
    )
    axes.errorbar(
        ranks, rates, errors, fmt="o-", color=COLOURS["forward"], capsize=4, label="measured, quartiles"
    )
    _sizes(axes, ranks)
    axes.set(title="images/s", xlabel="ranks", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left")


def _splits(axes: Any, group: Group) -> None:
    rows = [row for row in group.rows if row.measured]
    places = range(len(rows))
    below = [0.0] * len(rows)
    for name in PHASES:
        heights = [1000 * row.measured.split[name] for row in rows]  # type: ignore[union-attr]
        axes.bar(
            places, heights, 0.55, below, color=COLOURS[name], label="data wait" if name == "data" else name
        )
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set(title="a step, ms", xlabel="ranks", xlim=(-0.6, len(rows) - 0.4))
    axes.set_xticks(list(places), [str(row.wanted.ranks) for row in rows])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _efficiencies(axes: Any, group: Group) -> None:
    rows = [row for row in group.rows if row.measured]
    found = group.fit.predictions
    sizes = [row.wanted.ranks for row in rows]
    if found:
        x = [one.ranks for one in found]
        axes.fill_between(
            x, [one.low for one in found], [one.high for one in found], color="#c9dcf0", label="5 to 95 %"
        )
        axes.plot(x, [one.efficiency for one in found], color=COLOURS["forward"], linewidth=1.2, label="fit")
        sizes = sorted({*sizes, *x[1::2]})
    axes.plot(
        [row.wanted.ranks for row in rows],
        [row.efficiency for row in rows],
        "o",
        color=COLOURS["communication"],
        label="measured",
    )
    top = max([1.05, *(1.05 * row.efficiency for row in rows if row.efficiency)])
    _sizes(axes, sizes)
    axes.set(title="efficiency", xlabel="ranks", ylim=(0, top))
    axes.legend(frameon=False, loc="lower left")


def _sizes(axes: Any, ranks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(size) for size in ranks])
    axes.minorticks_off()
