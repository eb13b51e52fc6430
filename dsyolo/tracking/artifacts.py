"""Artifacts in a run's folder: settings, weights files, pictures, memory.json, skipped_steps.json."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError

from dsyolo.base.atomic_file import refuse_planted_link, write_file
from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.base.text import escaped
from dsyolo.detection.metrics import Metrics
from dsyolo.models.weights import WeightsInfo, save_weights
from dsyolo.tracking.plots import save
from dsyolo.tracking.predictions import draw_pair, draw_sheet
from dsyolo.tracking.progress_bar import duration

log = logging.getLogger(__name__)
SHOWN_IMAGES = 12
WEIGHTS = ("weights/best.safetensors", "weights/last.safetensors")
REPORTED = {
    WEIGHTS[0]: "best weights",
    WEIGHTS[1]: "last weights",
    "predictions.jpg": "predictions",
    "results.png": "curves",
    "metrics.jsonl": "figures",
}
SHOWN_SCORE = 0.25  # detections below it would only cover the picture


class RunArtifacts:
    """Writes a run's artifacts, on the main process.

    Args:
        folder: of the run; made when missing.
        config: everything resolved, for config.yaml.
        deepspeed_json: as used, for deepspeed.json.
        info: goes into the weights files.
        load_rgb: the original (H, W, 3) image of a validation image's index.
        draw: runs a drawing function soon (`BackgroundPlotter.draw`).
        picture: called with the path of each picture that is written, on the drawing thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        deepspeed_json: Mapping[str, Any],
        info: WeightsInfo,
        load_rgb: Callable[[int], np.ndarray],
        draw: Callable[[str, Callable[[], None]], None],
        picture: Callable[[Path], None],
    ) -> None:
        self.folder = folder
        self._info, self._load_rgb = info, load_rgb
        self._draw, self._picture = draw, picture
        self._best: dict[str, Any] = {}  # report of the best validation; all of it is in checkpoints
        self._settings = {
            "config.yaml": yaml.safe_dump(dict(config), sort_keys=False),
            "deepspeed.json": json.dumps(deepspeed_json, indent=2) + "\n",
        }
        self._begin()

    def _begin(self) -> None:
        (self.folder / "weights").mkdir(parents=True, exist_ok=True)
        refuse_planted_link(self.folder / "weights")
        for name, text in self._settings.items():
            write_file(self.folder / name, text.encode())

    def save_weights(self, state: Mapping[str, torch.Tensor], is_best: bool) -> str | None:
        """Write weights/last.safetensors, and best.safetensors if it is; return the problem if that fails."""
        if not (self.folder / "config.yaml").exists():
            warnings.warn(f"{self.folder} was removed during the run, and is made again.", stacklevel=2)
            with contextlib.suppress(OSError):  # reported below
                self._begin()
        for name in ("last", "best") if is_best else ("last",):
            path = self.folder / "weights" / f"{name}.safetensors"
            try:
                save_weights(path, state, self._info)
            except (OSError, SafetensorError) as error:
                why = getattr(error, "strerror", None) or error
                return f"{path} could not be written: {why}. The file that was there is kept."
        return None

    def validated(
        self,
        metrics: Metrics,
        detections: Sequence[tuple[GroundTruth, Detections]],
        is_best: bool,
        epoch: int = 0,
    ) -> None:
        """Have predictions.jpg drawn: the first validation images with their labels, beside their detections."""
        if is_best:
            figures = f"mAP50 {metrics.map50:.4f}, mAP50-95 {metrics.map50_95:.4f}"
            text = "\n".join((metrics.table(), *metrics.notes()))
            self._best = {"epoch": epoch + 1, "figures": figures, "text": text}
        shown = list(detections[:SHOWN_IMAGES])
        self._draw("predictions.jpg", lambda: self._write_grid(shown))

    def _write_grid(self, pairs: Sequence[tuple[GroundTruth, Detections]]) -> None:
        cells = []
        for ground_truth, detections in pairs:
            shown = detections.scores > SHOWN_SCORE
            detections = Detections(*(values[shown] for values in detections))
            image_rgb = self._load_rgb(ground_truth.image_id)
            cells.append(draw_pair(image_rgb, ground_truth, detections, self._info.names))
        path = self.folder / "predictions.jpg"
        save(path, draw_sheet(cells, SHOWN_SCORE))
        self._picture(path)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file that the run can do without: a failure costs a warning."""
        path = self.folder / name
        try:
            write_file(path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            warnings.warn(f"{path} could not be written: {error.strerror}. The run goes on.", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return the report of the best validation, for the checkpoint's JSON."""
        return {"best_report": self._best} if self._best else {}

    def load_state_dict(self, tracking: Mapping[str, Any]) -> None:
        """Take what a resumed run's checkpoint has."""
        saved = tracking.get("best_report")
        if isinstance(saved, dict) and isinstance(saved.get("epoch"), int):
            self._best = {key: saved.get(key, "") for key in ("epoch", "figures", "text")}

    def report(self, num_epochs: int, seconds: float) -> None:
        """Log how long the run took, its best validation, and where things are."""
        lines = [f"{num_epochs} epochs in {duration(seconds)}"]
        best = self._best
        if best:
            lines[0] += f"; the best was epoch {best['epoch']}: {best['figures']}"
            lines += [
                f"validation of the best weights ({WEIGHTS[0]}, of epoch {best['epoch']}):",
                best["text"],
            ]
        there = {name: what for name, what in REPORTED.items() if (self.folder / name).exists()}
        lines += [
            "",
            *(escaped(f"{what:14}{self.folder / name}", lines=False) for name, what in there.items()),
        ]
        log.info("%s", "\n".join(lines))
