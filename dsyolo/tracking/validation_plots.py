"""Pictures of a validation: the confusion matrix, and precision, recall and F1 by confidence."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsyolo.base.atomic_file import write_file
from dsyolo.base.text import escaped, within
from dsyolo.detection.confusion import IOU, SCORE
from dsyolo.detection.curves import Curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMED = 40  # classes: beyond, their numbers would not be legible beside the matrix
MOST_COUNTED = 20  # classes: beyond, counts would not fit into the cells
MOST_LINES = 10  # classes with a line of their own; the mean is always drawn
NAME_COLUMNS = 20


def save_confusion(path: Path, counts: np.ndarray, class_names: Sequence[str]) -> None:
    """Write a PNG of a confusion matrix (K + 1, K + 1): shares of each column, with the counts where they fit."""
    names = [within(escaped(name, lines=False), NAME_COLUMNS) for name in class_names]
    side = 3.2 + 0.42 * min(len(counts), MOST_NAMED)
    figure = _figure(side + 1.2, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= MOST_COUNTED:
        for row, column in np.argwhere(counts).tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=8, color=colour
            )
    if len(counts) <= MOST_NAMED:
        places = range(len(counts))
        axes.set_xticks(places, [*names, "nothing"], rotation=90 if len(counts) > 4 else 0, fontsize=8)
        axes.set_yticks(places, [*names, "nothing"], fontsize=8)
    axes.set_xlabel("what is there")
    axes.set_ylabel("what was found")
    axes.set_title(f"at score {SCORE} and IoU {IOU}; colours: share of the column", fontsize=9)
    figure.colorbar(image, fraction=0.046, pad=0.04)
    _write(path, figure)


def save_validation_curves(folder: Path, found: Curves, class_names: Sequence[str]) -> list[Path]:
    """Write P_curve.png, R_curve.png, F1_curve.png and PR_curve.png into `folder`; return their paths."""
    by_confidence = {"P": found.precision, "R": found.recall, "F1": found.f1}
    titles = {"P": "precision", "R": "recall", "F1": "F1"}
    paths = []
    for name, values in by_confidence.items():
        paths.append(folder / f"{name}_curve.png")
        _save_lines(paths[-1], found, found.confidences, values, class_names, ("confidence", titles[name]))
    paths.append(folder / "PR_curve.png")
    _save_lines(
        paths[-1], found, found.recalls, found.precision_at_recall, class_names, ("recall", "precision")
    )
    return paths


def _save_lines(
    path: Path,
    found: Curves,
    x: np.ndarray,
    values: np.ndarray,
    class_names: Sequence[str],
    labels: tuple[str, str],
) -> None:
    figure = _figure(7.2, 4.6)
    axes = figure.subplots()
    if len(values) <= MOST_LINES:
        for klass, y in zip(found.classes.tolist(), values, strict=True):
            axes.plot(
                x, y, linewidth=1.0, label=within(escaped(class_names[klass], lines=False), NAME_COLUMNS)
            )
    if len(values):
        axes.plot(x, values.mean(axis=0), linewidth=2.4, color="black", label="mean of the classes")
        axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=labels[0], ylabel=labels[1])
    axes.set_title(f"{labels[1]} by {labels[0]}, at IoU 0.5", fontsize=10)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    _write(path, figure)


def _figure(width_inches: float, height_inches: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(path: Path, figure: Any) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_file(path, buffer.getvalue())
