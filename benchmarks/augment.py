"""Training samples per second of one core, augmented as in preset low, from image files and from memory.

    python benchmarks/augment.py --voc data/bccd_voc

`--voc` is a folder with JPEGImages (Pascal VOC). Labels are random: 12 boxes an image, as many as in BCCD.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import cv2
import numpy as np

from dsyolo.base.batch import Sample
from dsyolo.config.recipe import preset
from dsyolo.data.images import check_image, read_rgb
from dsyolo.data.transforms import LoadImage, augment

LOW = preset("low")
NUM_BOXES = 12


class Images:
    """Loads by index, from the file each time or from memory."""

    def __init__(self, files: list[Path], keep: bool) -> None:
        self.files = files
        self.sizes_hw = [check_image(file)[0] for file in files]
        self.keep = keep
        self.kept: dict[tuple[int, int], Sample] = {}

    def __call__(self, index: int, long_side_px: int) -> Sample:
        if not self.keep:
            return self.read(index, long_side_px)
        key = (index, long_side_px)
        if key not in self.kept:
            self.kept[key] = self.read(index, long_side_px)
        return self.kept[key]

    def read(self, index: int, long_side_px: int) -> Sample:
        image = read_rgb(self.files[index], self.sizes_hw[index], long_side_px)
        corners = np.random.default_rng(index).random((NUM_BOXES, 2, 2)) * (image.shape[1], image.shape[0])
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
        return Sample(image, boxes, np.zeros(NUM_BOXES, np.int64))


def samples_per_s(load: LoadImage, num_images: int, size_px: int, budget_s: float) -> float:
    """The rate per second of processor time, over `budget_s` of it, so that a shared core matters little."""
    started = time.process_time()
    count = 0
    while (spent_s := time.process_time() - started) < budget_s:
        augment(load, count % num_images, num_images, size_px, np.random.default_rng((0, 0, count)), LOW)
        count += 1
    return count / spent_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voc", type=Path, required=True, help="folder with JPEGImages")
    parser.add_argument("--seconds", type=float, default=3.0, help="of processor time per measurement")
    options = parser.parse_args()
    files = sorted((options.voc / "JPEGImages").glob("*.jpg"))
    if not files:
        parser.error(f"--voc {options.voc}: no JPEGImages/*.jpg there")
    cv2.setNumThreads(1)
    for size_px in (320, 640):
        for keep in (False, True):
            load = Images(files, keep)
            for index in range(len(files) if keep else 0):
                load(index, size_px)
            rate = samples_per_s(load, len(files), size_px, options.seconds)
            print(f"{size_px} px, images {'in memory' if keep else 'from files'}: {rate:.0f} samples/s")


if __name__ == "__main__":
    main()
