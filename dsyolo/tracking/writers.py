"""Where goes what a run tells: the file metrics.jsonl, and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """metrics.jsonl: one strict JSON object per line, written through at once.

    Rows have `kind` (step or epoch), `step` (optimizer steps done), `epoch` (0-based) and figures.

    Args:
        path: of the file; may exist.
        step: that the run starts after; 0 for a new run.
        epoch: that the run starts in. Rows that lie after the start are dropped (they are about to be done
            again), so that the file of a resumed run reads like that of one never interrupted.
    """

    def __init__(self, path: Path, *, step: int, epoch: int) -> None:
        self.path = path
        kept = [
            row
            for row in self.read()
            if (row["epoch"] < epoch if row["kind"] == "epoch" else row["step"] <= step)
        ]
        partial = path.with_name(path.name + ".tmp")
        partial.write_text("".join(_line(row) for row in kept))
        partial.replace(path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""  # of what is told, not yet written: on a full disk
        self._warned = False

    def append(self, row: Mapping[str, Any]) -> None:
        """A disk that is full costs a warning: the row is written with one of the next, when there is room again."""
        self._waiting += _line(row).encode()
        try:
            if not os.fstat(self._file.fileno()).st_nlink:  # it was removed
                self._file.close()
                self._file = self.path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self.path} cannot be written to now: {error.strerror}", stacklevel=3)
            self._warned = True

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that a kill cut short, or that somebody else wrote, is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(errors="replace").splitlines()
        return [row for row in map(_row, lines) if row is not None]

    def close(self) -> None:
        self._file.close()


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter of brackets by the thousands
        return None
    places = [row.get("step"), row.get("epoch")] if isinstance(row, dict) and "kind" in row else [None]
    return row if all(isinstance(place, int) for place in places) else None


def _line(row: Mapping[str, Any]) -> str:
    """What is not finite (a loss that diverged) becomes null: JSON has no NaN."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


class WandbRun:
    """A W&B run that never stops the training: at its first failure it warns and is silent from then on.

    Args:
        folder: W&B's own folder `wandb` is made in it.
        mode: online, offline or disabled.
        run_id: of the W&B run to go on in; None begins one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        run_id: str | None,
    ) -> None:
        self.run_id = run_id
        self._run: Any = None
        self._lock = threading.Lock()
        if mode != "disabled":
            self._guarded(self._init, folder, mode, project, name, dict(config))

    def _init(self, folder: Path, mode: str, project: str, name: str | None, config: dict[str, Any]) -> None:
        import wandb  # here, as it takes a second or two

        self._run = wandb.init(
            project=project,
            name=name,
            config=config,
            dir=str(folder),
            mode=mode,
            id=self.run_id,  # None: W&B draws one
            resume="allow",
            settings=wandb.Settings(console="off", quiet=True, init_timeout=60, login_timeout=30),
        )
        self.run_id = self._run.id
        # An axis of our own: W&B's refuses the steps that a resumed run does a second time.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, Any]) -> None:
        """`values` has `step` among them."""
        if self._run is not None:
            self._guarded(self._run.log, dict(values))

    def picture(self, name: str, path: Path, step: int) -> None:
        if self._run is not None:
            self._guarded(self._log_picture, name, path, step)

    def _log_picture(self, name: str, path: Path, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        if self._run is not None:
            self._guarded(self._run.finish)
            self._run = None

    def _guarded(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            with self._lock:  # pictures come from the thread that draws them
                call(*args)
        except Exception as error:  # W&B's own, requests', OSError, protobuf's: whatever it is
            self._run = None
            warnings.warn(
                f"W&B failed, and the run goes on without it. {type(error).__name__}: {error}", stacklevel=3
            )
