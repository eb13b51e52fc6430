"""The display of a run: the live bar of steps, validations and checkpoints, and the lines of steps and epochs."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from dsyolo.checkpoint.train_state import TrainState
from dsyolo.tracking.progress_bar import Eta, ProgressBar, duration
from dsyolo.tracking.throughput import describe as describe_throughput

LOSSES = ("box", "obj", "cls")


class RunDisplay:
    """Shows where a run is.

    Args:
        epoch_start_step: returns the first step of an epoch.
    """

    def __init__(self, start: TrainState, epoch_start_step: Callable[[int], int]) -> None:
        self._bar, self._eta = ProgressBar(), Eta()
        self.has_bar = self._bar.is_on
        self._epoch_start, self._num_epochs = epoch_start_step, start.epochs
        self._title = ""
        self._figures: list[str] = []  # of the last logged step
        self._best = ""
        self._step_began = time.perf_counter()
        self._last_step: float | None = (
            None  # when it ended, while its epoch's validation and checkpoint go on
        )

    def begin(self, progress: TrainState) -> None:
        """Start the clock of an epoch, or of its rest after a resume."""
        now = time.perf_counter()
        if self._last_step is not None and progress.step == self._epoch_start(progress.epoch):
            self._eta.between(now - self._last_step)
        self._step_began = now
        self._show(progress, at_once=True)

    def step(self, progress: TrainState) -> None:
        """Count a step that has just ended."""
        now = time.perf_counter()
        self._eta.step(now - self._step_began)
        self._step_began = self._last_step = now
        self._show(progress)

    def logged(self, row: Mapping[str, float], mfu: float | None) -> None:
        """Take the figures of a logged step."""
        self._figures = [
            f"{row['images_per_s']:.1f} images/s",
            " ".join(f"{name} {row[name]:.4f}" for name in LOSSES),
            *([f"MFU {100 * mfu:.0f} %"] if mfu is not None else []),
            f"{row['memory_gib']:.2f} GiB",
            f"lr {row['lr']:.3g}",
        ]

    def best_is(self, row: Mapping[str, Any]) -> None:
        """Take the row of the best epoch so far."""
        self._best = f"best mAP50-95 {row['map50_95']:.4f} (epoch {row['epoch'] + 1})"

    def part(self, title: str, total: int = 0) -> AbstractContextManager[None]:
        """Show a validation of so many batches, or a checkpoint, with its own bar."""
        return self._bar.part(f"{self._title} {title}", total)

    def advance(self) -> None:
        """Count the batches of a validation: another one begins."""
        self._bar.advance()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def eta_s(self, progress: TrainState) -> float | None:
        """Return the seconds to the end of the run; None before the first step."""
        return self._eta.left_s(progress.total_steps - progress.step, self._num_epochs - progress.epoch)

    def _show(self, progress: TrainState, at_once: bool = False) -> None:
        if not self.has_bar:
            return
        self._title = f"epoch {progress.epoch + 1}/{self._num_epochs}"
        first, end = (self._epoch_start(progress.epoch + i) for i in (0, 1))
        of_epoch, of_run = self._eta.left_s(end - progress.step), self.eta_s(progress)
        parts = [*self._figures, *([self._best] if self._best else [])]
        if of_epoch is not None and of_run is not None:
            parts.insert(0, f"ETA epoch {duration(of_epoch)} run {duration(of_run)}")
        if self._best:  # before what matters less
            parts.insert(3, parts.pop())
        self._bar.show(self._title, progress.step - first, end - first, parts, at_once=at_once)


def step_line(progress: TrainState, row: Mapping[str, float], eta_s: float | None, mfu: float | None) -> str:
    """Return the line of a logged step, for files and where there is no terminal."""
    parts = [
        f"epoch {progress.epoch + 1}",
        f"step {progress.step}/{progress.total_steps}",
        *([f"ETA {_clock(eta_s)}"] if eta_s is not None else []),
        f"{row['images_per_s']:.1f} images/s",
        *([f"MFU {100 * mfu:.0f} %"] if mfu is not None else []),
        *_losses(row),
        f"lr {row['lr']:.3g}",
        f"{row['memory_gib']:.2f} GiB",
        *([f"{row['skipped_steps']} steps skipped"] if "skipped_steps" in row else []),
    ]
    return "  ".join(parts)


def epoch_lines(progress: TrainState, row: Mapping[str, Any], is_best: bool) -> str:
    """Return the lines of an epoch: training, validation with a mark if it is the best so far, throughput."""
    width = len(str(progress.epochs))
    throughput = describe_throughput(row)
    parts = list(_losses(row))
    if not throughput:  # that line says more of it
        rate = f"{row['images_per_s']:.1f} images/s  data {100 * row['data_wait_share']:.0f} %"
        parts.append(rate if row["images_per_s"] else "trained before the run was stopped")
    parts += [f"{row['memory_gib']:.2f} GiB", f"{row['train_s'] + row['val_s']:.1f} s"]
    lines = [f"epoch {progress.epoch + 1:>{width}}/{progress.epochs}  {'  '.join(parts)}"]
    indent = " " * (7 + 2 * width)
    if "map50" in row:
        losses = [*_losses(row, "val_"), ""] if row.get("val_box") is not None else []
        mark = "  * best" if is_best else ""
        map_ = f"mAP50 {row['map50']:.4f}  mAP50-95 {row['map50_95']:.4f}"
        lines.append(f"{indent}  {'  '.join(losses)}{map_}{mark}")
    if throughput:
        lines.append(f"{indent}  {throughput}")
    return "\n".join(lines)


def _losses(row: Mapping[str, float], prefix: str = "") -> list[str]:
    return [f"{prefix}{name} {row[prefix + name]:.4f}" for name in LOSSES if prefix + name in row]


def _clock(seconds: float) -> str:
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
