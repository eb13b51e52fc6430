"""An indexed data set as training reads it: one image, scaled, with its labels in pixels."""

import warnings
from typing import Any

import numpy as np

from dsyolo.base.batch import Sample
from dsyolo.data.images import read_rgb, scaled_hw
from dsyolo.data.index import DatasetIndex
from dsyolo.data.read_counts import ReadCounts
from dsyolo.detection.boxes import PAD_GREY

MAX_WARNED = 3  # images that each process names


class DetectionDataset:
    """The images of an index with their labels.

    It pickles and forks cheaply: it consists of flat arrays, and cached images are not pickled.

    Args:
        image_size: px; images loaded with this long side are those that are cached.
        cache_bytes: keep so much of scaled images in memory once loaded. Every loader worker has its own cache.
    """

    def __init__(self, index: DatasetIndex, image_size: int, cache_bytes: int = 0) -> None:
        self.index = index
        self.sizes_hw = index.sizes_hw  # (N, 2) int32: the size of every image file in px
        self.image_size = image_size
        self._cache_bytes = cache_bytes
        self._kept_bytes = 0
        self._kept: dict[int, np.ndarray] = {}
        self._warned: set[int] = set()
        self.counts = ReadCounts()  # loads, in this process and its workers

    def __len__(self) -> int:
        return len(self.index)

    def load(self, index: int, long_side_px: int | None = None) -> Sample:
        """Return an image with a long side of exactly `long_side_px` (None: the image size), and labels in its pixels.

        An image that can no longer be decoded, or whose size has changed since it was indexed, is replaced by a grey
        one without boxes, and counted in `counts`: the epoch goes on. Each process warns of the first few.
        """
        long_side_px = long_side_px or self.image_size
        image = self._image(index, long_side_px)
        self.counts.add(index, image is not None)
        if image is None:
            if index not in self._warned and len(self._warned) < MAX_WARNED:
                self._warned.add(index)
                fault = "has changed since it was indexed, or cannot be read: a grey image replaces it"
                fault += "; further ones are only counted" * (len(self._warned) == MAX_WARNED)
                warnings.warn(f"{self.index.path(index)} {fault}", stacklevel=2)
            grey = np.full((*scaled_hw(self._size_hw(index), long_side_px), 3), PAD_GREY, np.uint8)
            return Sample(grey, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        labels = self.index.labels(index)
        wh = np.array(image.shape[1::-1], np.float32)
        polygons = tuple(None if polygon is None else polygon * wh for polygon in labels.polygons)
        return Sample(image, labels.boxes_xyxy * np.tile(wh, 2), labels.classes.copy(), polygons)

    def ground_truth(self, index: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        """Return (height, width) of the file in px, boxes_xyxy (N, 4) float32 in its pixels, classes (N,) int64."""
        height, width = self._size_hw(index)
        labels = self.index.labels(index)
        wh = np.array([width, height, width, height], np.float32)
        return (height, width), labels.boxes_xyxy * wh, labels.classes.copy()

    def _size_hw(self, index: int) -> tuple[int, int]:
        height, width = self.sizes_hw[index].tolist()
        return height, width

    def _image(self, index: int, long_side_px: int) -> np.ndarray | None:
        cacheable = long_side_px == self.image_size
        if cacheable and index in self._kept:
            return self._kept[index].copy()  # the caller may write to the result
        image = read_rgb(self.index.path(index), self._size_hw(index), long_side_px)
        if image is not None and cacheable and self._kept_bytes + image.nbytes <= self._cache_bytes:
            self._kept[index] = image.copy()
            self._kept_bytes += image.nbytes
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}
