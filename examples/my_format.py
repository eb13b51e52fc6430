"""A data format: boxes.csv with a row `split,image,class,x1,y1,x2,y2` per box, and the images in images/ beside it.

dsyolo convert examples/my_format.py:CsvBoxes SRC DST
"""

import csv
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.data.formats.data_format import BAD_OBJECT, DataFormat, Image, Object, SourceDataset
from dsyolo.data.labels import Problem


class CsvBoxes(DataFormat):
    """Made without arguments. An image that no row names is not in the data set."""

    def read(self, src: Path) -> SourceDataset:
        table = src / "boxes.csv"
        if not table.is_file():
            raise UserError(f"{src} cannot be converted", [f"there is no {table}."])
        images: dict[str, dict[str, Image]] = {"train": {}, "val": {}}
        problems: list[Problem] = []
        with table.open(newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                name = row["image"]
                image = images[row["split"]].setdefault(name, Image(src / "images" / name, name, []))
                try:
                    x1, y1, x2, y2 = (float(row[side]) for side in ("x1", "y1", "x2", "y2"))
                    image.objects.append(Object(row["class"], (x1, y1, x2, y2), place=f"{table}:{line}"))
                except (TypeError, ValueError) as error:
                    problems.append(Problem(str(table), line, BAD_OBJECT, str(error)))
        splits = {split: list(of_split.values()) for split, of_split in images.items()}
        every = [one for of_split in splits.values() for image in of_split for one in image.objects]
        return SourceDataset(splits, sorted({one.name for one in every}), problems)
