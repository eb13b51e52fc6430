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
from dsyolo.data.workers import limit_opencv, worker_options
from dsyolo.detection.boxes import letterbox, xyxy_to_cxcywh

MULTI_SCALE_RANGE = (0.5, 1.5)

Assign = Callable[[np.ndarray, np.ndarray, np.ndarray, int, tuple[int, int]], Targets]


class _TrainSamples(Dataset):
    """Samples by key: a pure function of (seed, epoch, index), so every worker makes the same one."""

    def __init__(self, dataset: DetectionDataset, how: Augmentation, seed: int) -> None:
        self.dataset, self.how, self.seed = dataset, how, seed

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        return augment(self.dataset.load, key.index, len(self.dataset), key.size_px, rng, self.how)


class TrainLoader:
    """Yields the micro-batches of every step.

    Args:
        dataset: the training split; None for a rank in the middle of a pipeline, which needs no batches.
        sampler: which images come when.
        how: augmentation.
        assign: turns the labels of a batch into targets, in the workers.
        image_size_px: side of the images.
        stride: sizes of multi-scale are multiples of it.
        multi_scale: draw each step's size from [0.5, 1.5] x `image_size_px`.
        num_workers: worker processes; 0: none, batches are made in this process.
        pin_memory: so that copies to the device do not block.
    """

    def __init__(
        self,
        dataset: DetectionDataset | None,
        sampler: StepSampler,
        how: Augmentation,
        assign: Assign,
        *,
        image_size_px: int,
        stride: int,
        multi_scale: bool,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self._samples = None if dataset is None else _TrainSamples(dataset, how, sampler.seed)
        self._sampler = sampler
        self._collate = _TrainCollate(assign)
        self._size_px, self._stride, self._multi_scale = image_size_px, stride, multi_scale
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._batches: Iterator[Batch] | None = None
        self._next_step = -1
        self._wait_s = 0.0

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yield each step's micro-batches, from step `start` to the end of `epoch`; empty lists without a data set.

        Workers run ahead into the next epoch; any other step than the next one restarts them.
        """
        for step in range(start, self._sampler.epoch_start_step(epoch + 1)):
            if self._samples is None:
                yield []
                continue
            if self._batches is None or step != self._next_step:
                self._batches = self._open(step)
            begin = time.perf_counter()
            batches = [next(self._batches) for _ in range(self._sampler.accumulation)]
            self._wait_s += time.perf_counter() - begin
            self._next_step = step + 1
            yield batches

    def take_wait_s(self) -> float:
        """Return the seconds waited for workers since the last call."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def close(self) -> None:
        """End the workers."""
        self._batches = None

    def size_px(self, step: int) -> int:
        """Return the side of a step's images."""
        if not self._multi_scale:
            return self._size_px
        rng = np.random.default_rng(
            (self._sampler.seed, step, 0, 1)
        )  # four numbers: a sample's seed has three
        low, high = (round(self._size_px * bound / self._stride) for bound in MULTI_SCALE_RANGE)
        low = max(low, 2)  # BatchNorm needs more than one cell
        return int(rng.integers(low, high, endpoint=True)) * self._stride

    def _open(self, step: int) -> Iterator[Batch]:
        limit_opencv()
        # A step takes all its micro-batches at once; workers make those of the next one meanwhile.
        ahead = 1 + -(-self._sampler.accumulation // max(self._num_workers, 1))
        return iter(
            DataLoader(
                self._samples,
                batch_sampler=_Keys(self, step),
                collate_fn=self._collate,
                pin_memory=self._pin_memory,
                prefetch_factor=ahead if self._num_workers else None,
                **worker_options(self._num_workers),
            )
        )

    def _keys(self, step: int) -> Iterator[list[SampleKey]]:
        size_px = self.size_px(step)
        for group in self._sampler.micro_batches(step):
            yield [SampleKey(epoch, index, size_px) for epoch, index in group]


def largest_size_px(size_px: int, stride: int) -> int:
    """Return the largest side that multi-scale training around `size_px` draws."""
    return round(size_px * MULTI_SCALE_RANGE[1] / stride) * stride


class _Keys:
    """The endless batch sampler, from a step on: lists of keys, one per micro-batch."""

    def __init__(self, loader: TrainLoader, step: int) -> None:
        self._loader, self._step = loader, step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        step = self._step
        while True:
            yield from self._loader._keys(step)
            step += 1


class _TrainCollate:
    """Collates samples of one size into a Batch. Images stay H, W, C in memory: channels-last without a copy."""

    def __init__(self, assign: Assign) -> None:
        self._assign = assign

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        images = _stack([sample.image for sample in samples])
        of_image = np.repeat(np.arange(len(samples)), [len(sample.classes) for sample in samples])
        classes = np.concatenate([sample.classes for sample in samples])
        boxes = xyxy_to_cxcywh(np.concatenate([sample.boxes_xyxy for sample in samples]))
        return Batch(images, self._assign(of_image, classes, boxes, len(samples), tuple(images.shape[2:])))


class _EvalSamples(Dataset):
    """Letterboxed images with their ground truth, by (index, shape)."""

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

    Batches are cut from the images of one shape and then dealt to the ranks, so they are the same on any number of
    ranks. All ranks get equally many: if necessary the first batch is repeated, without ground truths.

    Args:
        rectangular: pad each image to multiples of `stride` only, not to a square.
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
        # One shape per batch: else the padding of an image, and so its boxes, would depend on its neighbours.
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
            **worker_options(num_workers),
        )

    def close(self) -> None:
        """End the workers."""
        self._loader._iterator = None  # where DataLoader keeps its persistent workers

    def __iter__(self) -> Iterator[EvalBatch]:
        limit_opencv()
        for batch, is_real in zip(self._loader, self._is_real, strict=True):
            yield EvalBatch(batch.images, batch.ground_truths if is_real else ())


def _rectangles(sizes_hw: np.ndarray, size_px: int, stride: int, rectangular: bool) -> list[tuple[int, int]]:
    """Return the (height, width) that each image needs, in multiples of `stride`."""
    if not rectangular:
        return [(size_px, size_px)] * len(sizes_hw)
    scaled = np.round(sizes_hw * (size_px / sizes_hw.max(1, keepdims=True)))
    return [tuple(row) for row in (np.ceil(scaled / stride) * stride).astype(int).tolist()]


def _collate_eval(items: Sequence[tuple[np.ndarray, GroundTruth]]) -> EvalBatch:
    return EvalBatch(_stack([image for image, _ in items]), tuple(ground_truth for _, ground_truth in items))


def to_batch(image_rgb: np.ndarray) -> torch.Tensor:
    """Return one (H, W, 3) uint8 image as a batch (1, 3, H, W)."""
    return _stack([image_rgb])


def _stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack (H, W, 3) uint8 images into (B, 3, H, W), channels-last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
