"""Loaders: worker processes turn the sampler's keys into batches of training or validation images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dsyolo.base.batch import Batch, EvalBatch, GroundTruth, Sample, Targets
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.sampler import SampleKey, StepSampler
from dsyolo.data.transforms import Augmentation, augment
from dsyolo.data.workers import limit_opencv, of_loader
from dsyolo.detection.boxes import letterbox, xyxy_to_cxcywh

MULTI_SCALE_RANGE = (0.5, 1.5)

Assign = Callable[[np.ndarray, np.ndarray, np.ndarray, int, tuple[int, int]], Targets]


class _TrainSamples(Dataset):
    """Samples by key: pure in (seed, epoch, index), so any worker makes the same one."""

    def __init__(self, dataset: DetectionDataset, how: Augmentation, seed: int) -> None:
        self.dataset, self.how, self.seed = dataset, how, seed

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        return augment(self.dataset.load, key.index, len(self.dataset), key.size_px, rng, self.how)


class TrainLoader:
    """Gives the micro-batches of every step.

    Args:
        dataset: the training split; None for a rank that needs no batches, in the middle of a pipeline.
        stream: which images when.
        how: augmentation.
        assign: labels of a batch to targets; runs in the workers.
        image_size_px: side of the images.
        stride: sizes of multi-scale are multiples of it.
        multi_scale: draw each step's size from [0.5, 1.5] x `image_size_px`.
        num_workers: processes; 0 makes the batches in this one.
        pin_memory: for copies to a device that do not wait.
    """

    def __init__(
        self,
        dataset: DetectionDataset | None,
        stream: StepSampler,
        how: Augmentation,
        assign: Assign,
        *,
        image_size_px: int,
        stride: int,
        multi_scale: bool,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._samples = None if dataset is None else _TrainSamples(dataset, how, stream.seed)
        self._stream = stream
        self._collate = _TrainCollate(assign)
        self._size_px, self._stride, self._multi_scale = image_size_px, stride, multi_scale
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._batches: Iterator[Batch] | None = None
        self._next_step = -1
        self._wait_s = 0.0

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Each step's micro-batches, from step `start` to the end of `epoch`; none of them without a data set.

        Workers go on into the next epoch meanwhile; asking for another step than the next one restarts them.
        """
        for step in range(start, self._stream.epoch_start_step(epoch + 1)):
            if self._samples is None:
                yield []
                continue
            if self._batches is None or step != self._next_step:
                self._batches = self._open(step)
            begin = time.perf_counter()
            batches = [next(self._batches) for _ in range(self._stream.accumulation)]
            self._wait_s += time.perf_counter() - begin
            self._next_step = step + 1
            yield batches

    def take_wait_s(self) -> float:
        """Seconds waited for workers since this was last asked."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None

    def size_px(self, step: int) -> int:
        """Side of the images of a step."""
        if not self._multi_scale:
            return self._size_px
        rng = np.random.default_rng((self._stream.seed, step, 0, 1))  # four numbers: three are a sample's
        low, high = (round(self._size_px * bound / self._stride) for bound in MULTI_SCALE_RANGE)
        low = max(low, 2)  # of a single cell BatchNorm could not tell a deviation
        return int(rng.integers(low, high, endpoint=True)) * self._stride

    def _open(self, step: int) -> Iterator[Batch]:
        limit_opencv()
        # A step takes all its micro-batches at once: while it trains, workers make those of the next.
        ahead = 1 + -(-self._stream.accumulation // max(self._num_workers, 1))
        return iter(
            DataLoader(
                self._samples,
                batch_sampler=_Keys(self, step),
                collate_fn=self._collate,
                pin_memory=self._pin_memory,
                prefetch_factor=ahead if self._num_workers else None,
                **of_loader(self._num_workers),
            )
        )

    def _keys(self, step: int) -> Iterator[list[SampleKey]]:
        size_px = self.size_px(step)
        for group in self._stream.micro_batches(step):
            yield [SampleKey(epoch, index, size_px) for epoch, index in group]


def largest_size_px(size_px: int, stride: int) -> int:
    """The largest side that multi-scale training around `size_px` draws."""
    return round(size_px * MULTI_SCALE_RANGE[1] / stride) * stride


class _Keys:
    """The endless batch sampler, from a step on."""

    def __init__(self, loader: TrainLoader, step: int) -> None:
        self._loader, self._step = loader, step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self._step
        while True:
            yield from self._loader._keys(step)
            step += 1


class _TrainCollate:
    """Samples of one size to a Batch. The images stay in the order H, W, C in memory: channels-last, at no copy."""

    def __init__(self, assign: Assign) -> None:
        self._assign = assign

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        images = _stack([sample.image for sample in samples])
        of_image = np.repeat(np.arange(len(samples)), [len(sample.classes) for sample in samples])
        classes = np.concatenate([sample.classes for sample in samples])
        boxes = xyxy_to_cxcywh(np.concatenate([sample.boxes_xyxy for sample in samples]))
        return Batch(images, self._assign(of_image, classes, boxes, len(samples), tuple(images.shape[2:])))


class _EvalSamples(Dataset):
    """Letterboxed images with their truth, by (index, shape)."""

    def __init__(self, dataset: DetectionDataset, image_size_px: int) -> None:
        self.dataset, self.image_size_px = dataset, image_size_px

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> tuple[np.ndarray, GroundTruth]:
        index, shape_hw = key
        size_hw, boxes_xyxy, classes = self.dataset.ground_truth(index)
        scaled = self.dataset.load(index, self.image_size_px).image
        image, scale, pad_xy = letterbox(scaled, shape_hw)
        scale *= max(scaled.shape[:2]) / max(size_hw)
        return image, GroundTruth(index, size_hw, boxes_xyxy, classes, scale, pad_xy)


class EvalLoader:
    """The batches of a validation split that one rank works on.

    Batches are cut from the images of one shape and then dealt to the ranks, so they are the same batches on any
    number of ranks. All ranks get equally many: where they do not divide, the first one comes again, without truths.

    Args:
        rectangular: each image is padded to multiples of `stride` only, not to a square.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        image_size_px: int,
        stride: int,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        rectangular: bool = True,
    ) -> None:
        shapes = _rectangles(dataset.sizes_hw, image_size_px, stride, rectangular)
        # One shape a batch: else the padding of an image, and so its boxes, would depend on its neighbours.
        of_shape: dict[tuple[int, int], list[int]] = {}
        for i, shape in enumerate(shapes):
            of_shape.setdefault(shape, []).append(i)
        keys = [
            [(i, shape) for i in images[first : first + batch_size]]
            for shape, images in sorted(of_shape.items())
            for first in range(0, len(images), batch_size)
        ]
        rounds = -(-len(keys) // world_size)
        turns = [turn * world_size + rank for turn in range(rounds)]
        batches = [keys[turn] if turn < len(keys) else keys[0] for turn in turns]
        self._is_real = [turn < len(keys) for turn in turns]
        self._loader = DataLoader(
            _EvalSamples(dataset, image_size_px),
            batch_sampler=batches,
            collate_fn=_collate_eval,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            **of_loader(num_workers),
        )

    def close(self) -> None:
        """Ends the workers."""
        self._loader._iterator = None  # where DataLoader keeps its persistent workers

    def __iter__(self) -> Iterator[EvalBatch]:
        limit_opencv()
        for batch, is_real in zip(self._loader, self._is_real, strict=True):
            yield EvalBatch(batch.images, batch.ground_truths if is_real else ())


def _rectangles(sizes_hw: np.ndarray, size_px: int, stride: int, rectangular: bool) -> list[tuple[int, int]]:
    """(height, width) that each image's batch must have at least, in multiples of `stride`."""
    if not rectangular:
        return [(size_px, size_px)] * len(sizes_hw)
    scaled = np.round(sizes_hw * (size_px / sizes_hw.max(1, keepdims=True)))
    return [tuple(row) for row in (np.ceil(scaled / stride) * stride).astype(int).tolist()]


def _collate_eval(items: Sequence[tuple[np.ndarray, GroundTruth]]) -> EvalBatch:
    return EvalBatch(_stack([image for image, _ in items]), tuple(ground_truth for _, ground_truth in items))


def to_batch(image_rgb: np.ndarray) -> torch.Tensor:
    """One (H, W, 3) uint8 image as a batch (1, 3, H, W)."""
    return _stack([image_rgb])


def _stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    """(H, W, 3) uint8 images to (B, 3, H, W), channels-last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
