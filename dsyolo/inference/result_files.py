"""Files of detections beside the pictures: labels, COCO results, a table, and the objects cut out."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from dsyolo.base.atomic_file import write_file
from dsyolo.base.batch import Detections
from dsyolo.base.errors import UserError

LABELS, CROPS, JSON, TABLE = "labels", "crops", "predictions.json", "predictions.csv"
MOST_SHOWN = 3


@dataclass
class ResultFiles:
    """Writes what was asked for into `folder`, image by image; the files of all images when it is closed.

    Attributes:
        txt: labels/<image>.txt with a row `class cx cy w h` per object, in shares of the image's sides.
        conf: the score as a sixth column of these rows.
        json: predictions.json, COCO's results: image_id is the file's stem, as a number where it is one.
        csv: predictions.csv with a row per object, in pixels.
        crop: crops/<class>/<image>_<number>.jpg.
    """

    folder: Path
    class_names: Sequence[str]
    txt: bool = False
    conf: bool = False
    json: bool = False
    csv: bool = False
    crop: bool = False
    _results: list[dict[str, object]] = field(default_factory=list, init=False)
    _rows: list[list[object]] = field(default_factory=list, init=False)

    def refuse_existing(self, pictures: Sequence[Path]) -> None:
        """Raise UserError where labels of these pictures exist: they may be a data set's own."""
        if self.txt:
            there = [path for path in map(self._label_path, pictures) if path.exists()]
            if there:
                rule = (
                    f"{len(there):,} label files exist there ({', '.join(map(str, there[:MOST_SHOWN]))} ...)"
                )
                raise UserError(
                    "No picture was written", [f"--save_txt: {rule}. Name another folder by --out."]
                )

    def add(self, image: Path, picture: Path, image_rgb: np.ndarray, found: Detections) -> None:
        """Take the objects of an image, in its own pixels. Raise OSError where a file cannot be written."""
        height, width = image_rgb.shape[:2]
        boxes, scores, classes = found.boxes_xyxy, found.scores, found.classes
        if self.txt and len(boxes):
            sides = np.array([width, height, width, height])
            corners = boxes / sides
            rows = np.concatenate(
                [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1
            )
            lines = [
                " ".join(
                    [str(klass), *(f"{value:.6f}" for value in row), *([f"{score:.6f}"] if self.conf else [])]
                )
                for klass, row, score in zip(classes.tolist(), rows.tolist(), scores.tolist(), strict=True)
            ]
            self._write(self._label_path(picture), "".join(f"{line}\n" for line in lines).encode())
        for number, (box, score, klass) in enumerate(
            zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True)
        ):
            x1, y1, x2, y2 = box
            if self.json:
                stem = image.stem
                self._results.append(
                    {
                        "image_id": int(stem) if stem.isascii() and stem.isdecimal() else stem,
                        "file_name": image.name,
                        "category_id": klass,
                        "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                        "score": round(score, 5),
                    }
                )
            if self.csv:
                self._rows.append(
                    [str(image), self.class_names[klass], klass, f"{score:.5f}", *(f"{v:.2f}" for v in box)]
                )
            if self.crop:
                left, top, right, bottom = (round(value) for value in box)
                cut = image_rgb[top : max(bottom, top + 1), left : max(right, left + 1)]
                if cut.size:
                    _, data = cv2.imencode(".jpg", cv2.cvtColor(cut, cv2.COLOR_RGB2BGR))
                    name = re.sub(r"[^\w.-]+", "_", self.class_names[klass]).strip(".") or f"class{klass}"
                    self._write(self.folder / CROPS / name / f"{picture.stem}_{number}.jpg", data.tobytes())

    def close(self) -> list[Path]:
        """Write the files of all images; return what was written, folders as such."""
        written = []
        if self.json:
            self._write(self.folder / JSON, json.dumps(self._results).encode())
            written.append(self.folder / JSON)
        if self.csv:
            text = io.StringIO()
            table = csv.writer(text)
            table.writerow(["image", "name", "class", "score", "x1", "y1", "x2", "y2"])
            table.writerows(self._rows)
            self._write(self.folder / TABLE, text.getvalue().encode("utf-8", "surrogateescape"))
            written.append(self.folder / TABLE)
        for is_asked, name in ((self.txt, LABELS), (self.crop, CROPS)):
            if is_asked and (self.folder / name).is_dir():
                written.append(self.folder / name)
        return written

    def _label_path(self, picture: Path) -> Path:
        return self.folder / LABELS / f"{picture.stem}.txt"

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
