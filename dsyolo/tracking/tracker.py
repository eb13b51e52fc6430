"""What a run tells: progress bar, one line per epoch, metrics.jsonl, results.png, Weights & Biases.

One rank has a `RunTracker`, the others a `NullTracker`; nobody asks which. The tracker alone decides when a
step is read back from the device: every `log_every` steps, since each reading waits for the device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from dsyolo.base.batch import StepStats
from dsyolo.detection.metrics import Metrics
from dsyolo.engine.memory_profile import process_memory_gib
from dsyolo.tracking.background_plotter import BackgroundPlotter
from dsyolo.tracking.plots import save_curves
from dsyolo.tracking.throughput import describe as describe_pace
from dsyolo.tracking.writers import MetricsFile, WandbRun

LOSSES = ("box", "obj", "cls")
FIGURES = ("precision", "recall", "map50", "map75", "map50_95", "fitness")
PANELS = {  # of results.png: by title the lines, each a name and its key in an epoch's row
    "box loss": {"box": "box"},
    "objectness loss": {"objectness": "obj"},
    "class loss": {"class": "cls"},
    "mAP": {"mAP50": "map50", "mAP50-95": "map50_95"},
    "precision and recall": {"precision": "precision", "recall": "recall"},
    "learning rate": {"lr": "lr"},
    "images/s": {"images/s": "images_per_s"},
    "peak memory (GiB)": {"memory": "memory_gib"},
}
PLOT_SHARE = (
    0.01  # of the run's time that drawing results.png may take: it takes it from the training's cores
)


class TrainStateLike(Protocol):
    """Where a run is. `epoch` is 0-based and the current one, also in `Tracker.epoch`, which ends it."""

    step: int  # optimizer steps done
    total_steps: int
    epoch: int
    epochs: int
    images_seen: int


class Tracker(Protocol):
    """What the loop tells. No method fails for what lies outside the run, such as the network."""

    def begin(self, progress: TrainStateLike) -> None:
        """Training (again) starts here: the time since the last call, as for a checkpoint, is not training's."""

    def step(self, progress: TrainStateLike, stats: StepStats, lr: float, data_wait_s: float) -> None:
        """After each optimizer step; `data_wait_s` is how long it waited for its batches."""

    def epoch(
        self, progress: TrainStateLike, metrics: Metrics | None, pace: Mapping[str, float] | None = None
    ) -> None:
        """After each epoch and its validation; `metrics` is None where there was none. `pace`: where its time went."""

    def say(self, text: str) -> None:
        """Lines for whoever watches."""

    def pictures(self, path: Path) -> None:
        """A picture of predictions was written there."""

    def state(self) -> dict[str, Any]:
        """For the checkpoint's JSON: give it to the tracker of the resumed run."""

    def close(self) -> None:
        """The run is over, or broke. Further calls of `close` do nothing."""


class NullTracker:
    """Of the ranks that tell nothing."""

    def begin(self, progress: TrainStateLike) -> None: ...

    def step(self, progress: TrainStateLike, stats: StepStats, lr: float, data_wait_s: float) -> None: ...

    def epoch(
        self, progress: TrainStateLike, metrics: Metrics | None, pace: Mapping[str, float] | None = None
    ) -> None: ...

    def say(self, text: str) -> None: ...

    def pictures(self, path: Path) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


class RunTracker:
    """Of the one rank that tells.

    Attributes:
        painter: draws pictures of the run; what it has to draw is there once the tracker is closed.

    Args:
        folder: of the run; exists.
        start: where the run starts. In `metrics.jsonl` what lies after it is dropped, so that the file of a
            resumed run reads like that of one never interrupted.
        log_every: optimizer steps between two readings of the losses; the first and the last step are always read.
        state: what `state()` gave when the checkpoint that is resumed from was written.
        memory_gib: tells the peak memory to report.
        wandb_mode: online, offline or disabled.
        config: of the run, as W&B shows it.
    """

    def __init__(
        self,
        folder: Path,
        start: TrainStateLike,
        *,
        log_every: int = 10,
        state: Mapping[str, Any] | None = None,
        memory_gib: Callable[[], float] = process_memory_gib,
        wandb_mode: str = "disabled",
        wandb_project: str = "dsyolo",
        wandb_name: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        state = dict(state or {})
        self.folder = Path(folder)
        self.log_every = log_every
        self.memory_gib = memory_gib
        self._rows = MetricsFile(self.folder / "metrics.jsonl", step=start.step, epoch=start.epoch)
        self._wandb = WandbRun(
            self.folder,
            mode=wandb_mode,
            project=wandb_project,
            name=wandb_name,
            config=config or {},
            run_id=state.get("run_id"),
        )
        self._bar = tqdm(
            total=start.total_steps,
            initial=start.step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._loss_sum: torch.Tensor | None = None  # (3,) on the device, of this epoch's steps
        self._num_summed = 0
        if state.get("num_summed"):
            self._loss_sum, self._num_summed = torch.tensor(state["loss_sum"]), state["num_summed"]
        self._lr, self._step = 0.0, start.step
        self.plotter = BackgroundPlotter()
        self._next_plot = 0.0
        self._num_skipped = 0  # since the last logged step
        self._closed = False
        self.begin(start)

    @property
    def run_id(self) -> str | None:
        """Of W&B; None without it."""
        return self._wandb.run_id

    def begin(self, progress: TrainStateLike) -> None:
        self._in_epoch = _Window(progress)
        self._since_log = _Window(progress)

    def step(self, progress: TrainStateLike, stats: StepStats, lr: float, data_wait_s: float) -> None:
        self._lr, self._step = lr, progress.step
        if stats.was_applied:  # else they may be NaN, and with them the epoch's
            self._sum(stats.losses.detach())
        self._in_epoch.step(progress, data_wait_s)
        self._since_log.step(progress, data_wait_s)
        self._num_skipped += not stats.was_applied
        self._bar.update()
        if progress.step == 1 or progress.step % self.log_every == 0 or progress.step == progress.total_steps:
            self._log_step(progress, stats)

    def _log_step(self, progress: TrainStateLike, stats: StepStats) -> None:
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
        self._tell("step", progress, row)
        self._bar.set_description(f"epoch {progress.epoch + 1}/{progress.epochs}", refresh=False)
        self._bar.set_postfix_str(_describe(row), refresh=False)

    def epoch(
        self, progress: TrainStateLike, metrics: Metrics | None, pace: Mapping[str, float] | None = None
    ) -> None:
        now = time.perf_counter()
        row = _losses((self._loss_sum / self._num_summed).tolist()) if self._num_summed else {}
        row |= {"lr": self._lr, **self._in_epoch.rates(), "memory_gib": self.memory_gib()}
        row |= {"train_s": self._in_epoch.seconds, "val_s": now - self._in_epoch.last, **(pace or {})}
        if metrics is not None:
            figures = metrics.to_json()
            row |= {name: figures[name] for name in FIGURES}
        self._tell("epoch", progress, row)
        width = len(str(progress.epochs))
        line = f"epoch {progress.epoch + 1:>{width}}/{progress.epochs}  {_describe(row)}"
        account = describe_pace(row)
        self.say(f"{line}\n{' ' * (7 + 2 * width)}  {account}" if account else line)
        self._loss_sum, self._num_summed = None, 0
        if now >= self._next_plot:
            self.plotter.draw("results.png", self._plot)
        self.begin(progress)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)  # above the bar, where there is one
        sys.stdout.flush()  # a log file is read while the run goes on

    def _tell(self, kind: str, progress: TrainStateLike, row: dict[str, Any]) -> None:
        place = {"step": progress.step, "epoch": progress.epoch}
        self._rows.append({"kind": kind, **place, **row})
        group = {name: "val" if name in FIGURES else "train" if kind == "step" else "epoch" for name in row}
        self._wandb.log({**place, **{f"{group[name]}/{name}": value for name, value in row.items()}})

    def pictures(self, path: Path) -> None:
        self._wandb.picture("predictions", path, self._step)

    def state(self) -> dict[str, Any]:
        loss_sum = self._loss_sum.tolist() if self._loss_sum is not None else [0.0] * 3
        return {"run_id": self.run_id, "loss_sum": loss_sum, "num_summed": self._num_summed}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bar.close()
        self.plotter.draw("results.png", self._plot)
        self.plotter.close()
        self._rows.close()
        self._wandb.close()

    def _sum(self, losses: torch.Tensor) -> None:
        """On the device: one small kernel a step, no waiting."""
        previous = torch.zeros_like(losses) if self._loss_sum is None else self._loss_sum.to(losses.device)
        self._loss_sum = previous + losses
        self._num_summed += 1

    def _plot(self) -> None:
        start = time.perf_counter()
        rows = [row for row in self._rows.read() if row["kind"] == "epoch"]
        if rows:
            save_curves(
                self.folder / "results.png", {title: _curves(rows, names) for title, names in PANELS.items()}
            )
        took_s = time.perf_counter() - start
        self._next_plot = time.perf_counter() + took_s / PLOT_SHARE


class _Window:
    """Images, seconds and waiting between two moments of training."""

    def __init__(self, progress: TrainStateLike) -> None:
        self.start = self.last = time.perf_counter()
        self._images_before = self._images = progress.images_seen
        self._data_wait_s = 0.0

    def step(self, progress: TrainStateLike, data_wait_s: float) -> None:
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
    """By name x (1-based epochs) and y, without the epochs that lack the value."""
    curves = {}
    for name, key in names.items():
        points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
        curves[name] = ([x for x, _ in points], [y for _, y in points])
    return curves


def _describe(row: Mapping[str, float]) -> str:
    parts = [f"{name} {row[name]:.4f}" for name in LOSSES if name in row]
    if "map50" in row:
        parts.append(f"mAP50 {row['map50']:.4f}  mAP50-95 {row['map50_95']:.4f}")
    if not describe_pace(row):  # which tells it with more
        parts.append(f"{row['images_per_s']:.1f} images/s  data wait {row['data_wait_share']:.0%}")
    parts.append(f"{row['memory_gib']:.2f} GiB")
    if "skipped_steps" in row:
        parts.append(f"{row['skipped_steps']} steps skipped")
    if "train_s" in row:
        parts.append(f"{row['train_s'] + row['val_s']:.1f} s")
    return "  ".join(parts)
