"""A writer: keeps the figures of every epoch in epochs.csv of the run's folder.

python dsyolo/train.py --data data.yaml --writer examples/my_writer.py:CsvWriter
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsyolo.tracking.writers import Writer


class CsvWriter(Writer):
    """Made on the main process with the run's folder. What it raises costs a warning, never the training."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "epochs.csv").open("a", newline="", encoding="utf-8")
        self._csv = csv.writer(self._file)

    def write(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "epoch":
            self._csv.writerow([row["epoch"] + 1, row["step"], row["loss"], row.get("map50", "")])
            self._file.flush()

    def close(self) -> None:
        self._file.close()
