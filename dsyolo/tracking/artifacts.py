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
from dsyolo.detection.metrics import Metrics
from dsyolo.models.weights import WeightsInfo, save_weights
from dsyolo.tracking.plots import draw, grid, save

log = logging.getLogger(__name__)
GRID_IMAGES, GRID_COLUMNS, CELL_PX = 12, 4, 400
WEIGHTS = ("weights/best.safetensors", "weights/last.safetensors")
REPORTED = (*WEIGHTS, "predictions.jpg", "results.png", "metrics.jsonl")
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
        self._table = ""
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
        self, metrics: Metrics, detections: Sequence[tuple[GroundTruth, Detections]], is_best: bool
    ) -> None:
        """Have predictions.jpg drawn: a grid of the first validation images with their detections."""
        if is_best or not self._table:
            self._table = metrics.table()
        shown = list(detections[:GRID_IMAGES])
        self._draw("predictions.jpg", lambda: self._write_grid(shown))

    def _write_grid(self, pairs: Sequence[tuple[GroundTruth, Detections]]) -> None:
        cells = []
        for ground_truth, detections in pairs:
            shown = detections.scores > SHOWN_SCORE
            detections = Detections(*(values[shown] for values in detections))
            image_rgb = self._load_rgb(ground_truth.image_id)
            cells.append(draw(image_rgb, detections, self._info.names, ground_truth=ground_truth))
        path = self.folder / "predictions.jpg"
        save(path, grid(cells, columns=GRID_COLUMNS, cell_px=CELL_PX))
        self._picture(path)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file that the run can do without: a failure costs a warning."""
        path = self.folder / name
        try:
            write_file(path, (json.dumps(content, indent=1) + "\n").encode())
        except OSError as error:
            warnings.warn(f"{path} could not be written: {error.strerror}. The run goes on.", stacklevel=2)

    def report(self) -> None:
        """Log the best validation and where things are."""
        there = [f"{self.folder / name}" for name in REPORTED if (self.folder / name).exists()]
        log.info("best validation:\n%s\n\n%s", self._table, "\n".join(there))
