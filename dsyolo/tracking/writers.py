"""Writers, which take the figures of a run: metrics.jsonl and Weights & Biases. --writer adds a user's own."""

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from dsyolo.base.atomic_file import open_appending, write_file
from dsyolo.base.environment import without_wandb_variables

PLACE = ("kind", "step", "epoch")
VALIDATION_LOSSES = ("val_box", "val_obj", "val_cls")
VALIDATION_FIGURES = ("precision", "recall", "map50", "map75", "map50_95", "fitness", *VALIDATION_LOSSES)


class Writer:
    """Base class: override what you need.

    A row has `kind` (step or epoch), `step` (optimizer steps done), `epoch` (0-based) and figures by name.
    """

    def __init__(self, folder: Path) -> None:
        """Begin on the main process; `folder` is the run's."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take the figures of a logged step or of an epoch."""

    def picture(self, name: str, path: Path, step: int) -> None:
        """Take a picture that was drawn; called by the thread that draws."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run's writer needs; it is kept in the checkpoint's JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what the writers of the resumed run returned, all keys in one; called before the first row."""

    def close(self) -> None:
        """Write out what waits; called once."""


class SafeWriter(Writer):
    """A writer that never stops the training: at its first failure it warns, and is off from then on."""

    def __init__(self, name: str, make: Callable[[], Writer], saved: Mapping[str, Any] | None = None) -> None:
        self._name, self._lock = name, threading.Lock()
        self._writer: Writer | None = None
        self._state: dict[str, Any] = {}
        self._writer = self._call(make)
        if self._writer and saved:
            self._call(self._writer.load_state_dict, saved)
        self.state_dict()

    def write(self, row: Mapping[str, Any]) -> None:
        if self._writer:
            self._call(self._writer.write, row)

    def picture(self, name: str, path: Path, step: int) -> None:
        if self._writer:
            self._call(self._writer.picture, name, path, step)

    def state_dict(self) -> dict[str, Any]:
        if writer := self._writer:  # what is no dict of JSON is its failure, and not the checkpoint's
            self._state = self._call(lambda: dict(json.loads(json.dumps(writer.state_dict())))) or self._state
        return self._state

    def close(self) -> None:
        if self._writer:
            self._call(self._writer.close)
        self._writer = None

    def _call(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            with self._lock:  # pictures come from the thread that draws them
                return call(*args)
        except (Exception, SystemExit) as error:  # whatever the service raises
            self._writer = None
            what = f"{type(error).__name__}: {error}"
            warnings.warn(f"{self._name} failed, and the run goes on without it. {what}", stacklevel=3)
            return None


class JsonlWriter(Writer):
    """metrics.jsonl: one strict JSON object per line, written through at once.

    Args:
        path: of the file; may exist.
        step: that the run starts after; 0 for a new run.
        epoch: that the run starts in. Later rows are dropped, as they are about to be written again: the file of a
            resumed run reads like that of one never interrupted.
    """

    def __init__(self, path: Path, *, step: int, epoch: int) -> None:
        self.path = path
        rows = self.read()
        kept = [r for r in rows if (r["epoch"] < epoch if r["kind"] == "epoch" else r["step"] <= step)]
        write_file(path, "".join(map(_line, kept)).encode())
        self._file = open_appending(path)
        self._waiting = b""  # rows that a full disk did not take yet
        self._warned = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row. A full disk costs a warning: the row is written with a later one, once there is room."""
        self._waiting += _line(row).encode()
        try:
            if not os.fstat(self._file.fileno()).st_nlink:  # it was removed
                self._file.close()
                self._file = open_appending(self.path)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self.path} cannot be written to now: {error.strerror}", stacklevel=3)
            self._warned = True

    def read(self) -> list[dict[str, Any]]:
        """Return all rows, without lines that a kill cut short or that somebody else wrote."""
        lines = (
            self.path.read_text(errors="replace", encoding="utf-8").splitlines()
            if self.path.is_file()
            else []
        )
        return [row for row in map(_row, lines) if row is not None]

    def close(self) -> None:
        self._file.close()


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # the latter for brackets by the thousands
        return None
    is_row = isinstance(row, dict) and "kind" in row
    return row if is_row and all(isinstance(row.get(key), int) for key in ("step", "epoch")) else None


def _line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON, with null for what is not finite, as JSON has no NaN."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


class WandbWriter(Writer):
    """A W&B run.

    Args:
        folder: W&B's own folder `wandb` is made in it.
        mode: online or offline.
        run_id: of the W&B run to continue; None begins one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Literal["online", "offline", "disabled"],
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        run_id: str | None,
    ) -> None:
        import wandb  # here, as it takes a second or two

        self._image = wandb.Image
        settings = {"console": "off", "quiet": True, "init_timeout": 60, "login_timeout": 30}
        options: dict[str, Any] = without_wandb_variables({"dir": str(folder), "resume": "allow"})
        if run_id:  # the run goes on in its own, whatever new ones do
            options["resume"] = "allow"
        self._run = wandb.init(
            project=project,
            name=name,
            config=dict(config),
            mode=mode,
            id=run_id,  # None: W&B draws one
            settings=without_wandb_variables(settings),
            **options,
        )
        # Our own axis: W&B's refuses the steps that a resumed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        other = "train" if row["kind"] == "step" else "epoch"
        figures = {key: value for key, value in row.items() if key not in PLACE}
        named = {
            f"val/{key.removeprefix('val_')}" if key in VALIDATION_FIGURES else f"{other}/{key}": value
            for key, value in figures.items()
        }
        self._run.log({"step": row["step"], "epoch": row["epoch"], **named})

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._image(str(path)), "step": step})

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run.id}

    def close(self) -> None:
        self._run.finish()
