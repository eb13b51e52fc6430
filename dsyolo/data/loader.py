"""Loaders: worker processes turn the sampler's keys into batches of training or validation images."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dsyolo.base.batch import Batch, EvalBatch, GroundTruth, Sample, Targets
from dsyolo.config.recipe import Recipe
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.prefetch import VAL_AHEAD, train_ahead
from dsyolo.data.sampler import SampleKey, StepSampler
from dsyolo.data.transforms import augment
from dsyolo.data.workers import worker_options
from dsyolo.detection.boxes import letterbox, xyxy_to_cxcywh

MULTI_SCALE_RANGE = (0.5, 1.5)

Assign = Callable[[np.ndarray, np.ndarray, np.ndarray, int, tuple[int, int]], Targets]


@dataclass
class _TrainSamples(Dataset[Sample]):
    """Samples by key: a pure function of (seed, epoch, index), so every worker makes the same one."""

    dataset: DetectionDataset
    recipe: Recipe
    seed: int
    num_epochs: int | None  # of the run; None: mosaic never ends

    def __post_init__(self) -> None:
        self._last_recipe = self.recipe.model_copy(update={"mosaic": 0.0})  # mixup is of mosaics

    def __getitem__(self, key: SampleKey) -> Sample:
        rng = np.random.default_rng((self.seed, key.epoch, key.image_index))
        recipe = self.recipe
        if self.num_epochs is not None and key.epoch >= self.num_epochs - recipe.close_mosaic:
            recipe = self._last_recipe
        return augment(self.dataset.load, key.image_index, len(self.dataset), key.size_px, rng, recipe)


@dataclass(eq=False)
class TrainLoader:
    """Yields the micro-batches of every step."""

    dataset: DetectionDataset | None  # None: a rank in the middle of a pipeline, which needs no batches
    sampler: StepSampler
    recipe: Recipe
    assign: Assign  # turns the labels of a batch into targets, in the workers
    _: KW_ONLY
    image_size_px: int
    stride: int  # sizes of multi-scale are multiples of it
    num_workers: int  # processes; 0: batches are made in this one
    pin_memory: bool  # so that copies to the device do not block
    num_epochs: int | None = None  # of the run, for what its recipe leaves out at its end
    _batches: Iterator[Batch] | None = field(default=None, init=False)
    _next_step: int = field(default=-1, init=False)
    _wait_s: float = field(default=0.0, init=False)

    def steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Yield each step's micro-batches, from step `start` to the end of `epoch`; empty lists without a data set.

        Workers run ahead into the next epoch; any other step than the next one restarts them.
        """
        for step in range(start, self.sampler.epoch_start_step(epoch + 1)):
            if self.dataset is None:
                yield []
                continue
            if self._batches is None or step != self._next_step:
                self._batches = self._open(step)
            begin = time.perf_counter()
            batches = [next(self._batches) for _ in range(self.sampler.accumulation)]
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
        if not self.recipe.multi_scale:
            return self.image_size_px
        # Four numbers: a sample's seed has three.
        rng = np.random.default_rng((self.sampler.seed, step, 0, 1))
        low, high = (round(self.image_size_px * bound / self.stride) for bound in MULTI_SCALE_RANGE)
        low = max(low, 2)  # BatchNorm needs more than one cell
        return int(rng.integers(low, high, endpoint=True)) * self.stride

    def _open(self, step: int) -> Iterator[Batch]:
        assert self.dataset is not None
        ahead = train_ahead(self.num_workers, self.sampler.accumulation)
        return iter(
            DataLoader(
                _TrainSamples(self.dataset, self.recipe, self.sampler.seed, self.num_epochs),
                batch_sampler=self._keys(step),
                collate_fn=partial(_collate_train, assign=self.assign),
                pin_memory=self.pin_memory,
                prefetch_factor=ahead if self.num_workers else None,
                **worker_options(self.num_workers),
            )
        )

    def _keys(self, start: int) -> Iterator[list[SampleKey]]:
        """Yield the keys of each micro-batch from step `start` on, without end."""
        for step in itertools.count(start):
            size_px = self.size_px(step)
            for group in self.sampler.micro_batches(step):
                yield [SampleKey(epoch, index, size_px) for epoch, index in group]


def largest_size_px(size_px: int, stride: int) -> int:
    """Return the largest side that multi-scale training around `size_px` draws."""
    return round(size_px * MULTI_SCALE_RANGE[1] / stride) * stride


def _collate_train(samples: Sequence[Sample], assign: Assign) -> Batch:
    """Collate samples of one size. Images stay H, W, C in memory: channels-last without a copy."""
    images = stack_images([sample.image for sample in samples])
    of_image = np.repeat(np.arange(len(samples)), [len(sample.classes) for sample in samples])
    classes = np.concatenate([sample.classes for sample in samples])
    boxes = xyxy_to_cxcywh(np.concatenate([sample.boxes_xyxy for sample in samples]))
    height, width = images.shape[2:]
    return Batch(images, assign(of_image, classes, boxes, len(samples), (height, width)))


@dataclass
class _EvalSamples(Dataset[tuple[np.ndarray, GroundTruth]]):
    """Letterboxed images with their ground truth, by (index, shape)."""

    dataset: DetectionDataset
    image_size_px: int

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
        shapes = _rectangles(dataset.sizes_hw, image_size_px, stride if rectangular else image_size_px)
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
            prefetch_factor=VAL_AHEAD if num_workers else None,
            persistent_workers=num_workers > 0,
            **worker_options(num_workers),
        )

    def close(self) -> None:
        """End the workers."""
        self._loader._iterator = None  # where DataLoader keeps its persistent workers

    def __len__(self) -> int:
        """Return the number of batches, with those that fill up."""
        return len(self._is_real)

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch, is_real in zip(self._loader, self._is_real, strict=True):
            yield EvalBatch(batch.images, batch.ground_truths if is_real else ())


def _rectangles(sizes_hw: np.ndarray, size_px: int, stride: int) -> list[tuple[int, int]]:
    """Return the (height, width) that each image needs, in multiples of `stride`."""
    scaled = np.round(sizes_hw * (size_px / sizes_hw.max(1, keepdims=True))).clip(1)
    return [tuple(row) for row in (np.ceil(scaled / stride) * stride).astype(int).tolist()]


def _collate_eval(items: Sequence[tuple[np.ndarray, GroundTruth]]) -> EvalBatch:
    images, ground_truths = zip(*items, strict=True)
    return EvalBatch(stack_images(images), ground_truths)


def stack_images(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack (H, W, 3) uint8 images into (B, 3, H, W), channels-last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
