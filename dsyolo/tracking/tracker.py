"""The figures of a run on its main process: rows for writers, log lines, a progress bar, curves."""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsyolo.base.batch import StepStats
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.detection.metrics import Metrics
from dsyolo.engine.memory_profile import process_memory_gib
from dsyolo.tracking.background_plotter import BackgroundPlotter
from dsyolo.tracking.plots import save_curves
from dsyolo.tracking.run_display import LOSSES, RunDisplay, epoch_lines, step_line
from dsyolo.tracking.writers import VALIDATION_FIGURES, JsonlWriter, Writer

PANELS = {  # panels of results.png: by title the lines, each a name and its key in an epoch's row
    "box loss": {"training": "box", "validation": "val_box"},
    "objectness loss": {"training": "obj", "validation": "val_obj"},
    "class loss": {"training": "cls", "validation": "val_cls"},
    "mAP": {"mAP50": "map50", "mAP50-95": "map50_95"},
    "precision and recall": {"precision": "precision", "recall": "recall"},
    "learning rate": {"lr": "lr"},
    "images/s": {"images/s": "images_per_s"},
    "peak memory (GiB)": {"memory": "memory_gib"},
}
PLOT_SHARE = 0.01  # share of the run's time for drawing results.png, which takes the training's cores
log = logging.getLogger(__name__)


class RunTracker:
    """Passes the figures of a run to writers, log, progress bar and curves.

    It alone decides when a step is read back from the device: every `log_every` steps, since each reading waits for it.

    Attributes:
        plotter: draws pictures of the run; all are there once the tracker is closed.
        mfu: the share of the peak FLOP/s that so many images/s use, None if it is not known.

    Args:
        folder: of the run; exists.
        start: where the run starts. Later rows of `metrics.jsonl` are dropped: see `JsonlWriter`.
        log_every: optimizer steps between two readings of the losses; the first and the last step are always read.
        state: what `state()` returned for the checkpoint of a resumed run.
        memory_gib: returns the peak memory to report.
        writers: get every row, as metrics.jsonl does.
        epoch_start_step: returns the first step of an epoch; by default all epochs have equally many.
    """

    def __init__(
        self,
        folder: Path,
        start: TrainState,
        *,
        log_every: int = 10,
        state: Mapping[str, Any] | None = None,
        memory_gib: Callable[[], float] = process_memory_gib,
        writers: Sequence[Writer] = (),
        epoch_start_step: Callable[[int], int] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.log_every = log_every
        self.memory_gib = memory_gib
        self.mfu: Callable[[float], float | None] = lambda images_per_s: None
        self.plotter = BackgroundPlotter()
        self._rows = JsonlWriter(self.folder / "metrics.jsonl", step=start.step, epoch=start.epoch)
        self._writers: list[Writer] = [self._rows, *writers]
        steps = epoch_start_step or (lambda epoch: epoch * start.total_steps // start.epochs)
        self.display = RunDisplay(start, steps)
        # On a terminal the bar shows a step, and its line is for files alone.
        self._step_level = logging.DEBUG if self.display.has_bar and sys.stdout.isatty() else logging.INFO
        self._loss_sum: torch.Tensor | None = None  # (3,) on the device, of this epoch's steps
        self._num_summed = 0
        if state and state.get("num_summed"):
            self._loss_sum, self._num_summed = torch.tensor(state["loss_sum"]), state["num_summed"]
        self._lr, self._step = 0.0, start.step
        self._next_plot = 0.0
        self._num_skipped = 0  # since the last logged step
        self._closed = False
        self._best = -1.0  # fitness
        for row in self._epoch_rows():
            self._is_best(row)
        self.begin(start)

    def begin(self, progress: TrainState) -> None:
        """Start the clock: what came before, such as a checkpoint, is not training time."""
        self.display.begin(progress)
        self._start_clock(progress)

    def _start_clock(self, progress: TrainState) -> None:
        self._in_epoch = _Window(progress)
        self._since_log = _Window(progress)

    def step(self, progress: TrainState, stats: StepStats, lr: float, data_wait_s: float) -> None:
        """Record an optimizer step, which waited `data_wait_s` for its batches."""
        self._lr, self._step = lr, progress.step
        if stats.was_applied:  # a skipped step's may be NaN
            losses = stats.losses.detach()  # summed on the device: one small kernel, no wait
            before = torch.zeros_like(losses) if self._loss_sum is None else self._loss_sum.to(losses.device)
            self._loss_sum = before + losses
            self._num_summed += 1
        self._in_epoch.step(progress, data_wait_s)
        self._since_log.step(progress, data_wait_s)
        self._num_skipped += not stats.was_applied
        self.display.step(progress)
        if progress.step == 1 or progress.step % self.log_every == 0 or progress.step == progress.total_steps:
            self._log_step(progress, stats)

    def _log_step(self, progress: TrainState, stats: StepStats) -> None:
        losses = _losses(stats.losses.tolist())  # waits for the device
        self._in_epoch.stop()  # only now is the step done
        self._since_log.stop()
        row = {**losses, "lr": self._lr, **self._since_log.rates(), "memory_gib": self.memory_gib()}
        if stats.grad_norm is not None:
            row["grad_norm"] = float(stats.grad_norm)
        if self._num_skipped:
            row["skipped_steps"] = self._num_skipped
            self._num_skipped = 0
        self._since_log = _Window(progress)
        self._write("step", progress, row)
        mfu = self.mfu(row["images_per_s"])
        self.display.logged(row, mfu)
        log.log(self._step_level, "%s", step_line(progress, row, self.display.eta_s(progress), mfu))

    def epoch(
        self, progress: TrainState, metrics: Metrics | None, figures: Mapping[str, float] | None = None
    ) -> None:
        """Record the end of `progress.epoch` and its validation, if any; `figures` are others' for its row."""
        now = time.perf_counter()
        row: dict[str, Any] = {}
        if self._loss_sum is not None and self._num_summed:
            row = _losses((self._loss_sum / self._num_summed).tolist())
        row |= {"lr": self._lr, **self._in_epoch.rates(), "memory_gib": self.memory_gib()}
        row |= {"train_s": self._in_epoch.seconds, "val_s": now - self._in_epoch.last}
        row |= {name: float(value) for name, value in (figures or {}).items()}  # a hook's may be tensors
        if metrics is not None:
            validated = metrics.to_json()
            row |= {name: validated[name] for name in VALIDATION_FIGURES}
        self._write("epoch", progress, row)
        log.info("%s", epoch_lines(progress, row, self._is_best({**row, "epoch": progress.epoch})))
        self._loss_sum, self._num_summed = None, 0
        if now >= self._next_plot:
            self.plotter.draw("results.png", self._plot)
        self._start_clock(progress)

    def _is_best(self, row: Mapping[str, Any]) -> bool:
        """Return whether an epoch's row is the best so far, as `TrainState.judge` does."""
        fitness = row.get("fitness")
        if fitness is None or fitness <= self._best:
            return False
        self._best = fitness
        self.display.best_is(row)
        return True

    def _epoch_rows(self) -> list[dict[str, Any]]:
        return [row for row in self._rows.read() if row["kind"] == "epoch"]

    def _write(self, kind: str, progress: TrainState, row: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write({**row, "kind": kind, "step": progress.step, "epoch": progress.epoch})

    def picture(self, path: Path) -> None:
        """Hand a picture of predictions to the writers."""
        for writer in self._writers:
            writer.picture("predictions", path, self._step)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run's tracker needs, for the checkpoint's JSON."""
        loss_sum = self._loss_sum.tolist() if self._loss_sum is not None else [0.0] * 3
        state: dict[str, Any] = {"loss_sum": loss_sum, "num_summed": self._num_summed}
        for writer in self._writers:
            for key, value in writer.state_dict().items():
                if state.setdefault(key, value) != value:
                    log.warning("A writer's state has the key %r, which is another's: it is not kept.", key)
        return {"run_id": None, **state}

    def close(self) -> None:
        """Draw what waits, and close the writers. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self.display.close()
        self.plotter.draw("results.png", self._plot)
        self.plotter.close()
        for writer in self._writers:
            writer.close()

    def _plot(self) -> None:
        start = time.perf_counter()
        rows = self._epoch_rows()
        if rows:
            panels = {title: _curves(rows, names) for title, names in PANELS.items()}
            validated = [row for row in rows if row.get("fitness") is not None]
            best = max(validated, key=lambda row: row["fitness"], default=None)  # the first of equals
            save_curves(self.folder / "results.png", panels, best["epoch"] + 1 if best else None)
        now = time.perf_counter()
        self._next_plot = now + (now - start) / PLOT_SHARE


class _Window:
    """Counts images, steps, seconds and data waits since its construction."""

    def __init__(self, progress: TrainState) -> None:
        self.start = self.last = time.perf_counter()
        self.steps = 0
        self._images_before = self._images = progress.images_seen
        self._data_wait_s = 0.0

    def step(self, progress: TrainState, data_wait_s: float) -> None:
        self.steps += 1
        self._images = progress.images_seen
        self._data_wait_s += data_wait_s
        self.stop()

    def stop(self) -> None:
        self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.last - self.start

    def rates(self) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        return {
            "images_per_s": (self._images - self._images_before) / seconds,
            "data_wait_share": min(self._data_wait_s / seconds, 1.0),
        }


def _losses(values: list[float]) -> dict[str, float]:
    return {**dict(zip(LOSSES, values, strict=True)), "loss": sum(values)}


def _curves(rows: list[dict[str, Any]], names: Mapping[str, str]) -> dict[str, tuple[list, list]]:
    """Return x (1-based epochs) and y by line, without the epochs that lack the value."""
    curves = {}
    for name, key in names.items():
        points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
        curves[name] = ([x for x, _ in points], [y for _, y in points])
    return curves
