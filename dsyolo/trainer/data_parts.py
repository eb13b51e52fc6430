"""The data of a run: its two splits, and this rank's loaders."""

import logging
from typing import NamedTuple

import numpy as np
import torch

from dsyolo.cluster.world import World, num_readers, parallel_dims
from dsyolo.config.resolve import RunSpec
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.index import DatasetIndex
from dsyolo.data.index_builder import build_index
from dsyolo.data.loader import EvalLoader, TrainLoader
from dsyolo.data.parallel_map import Communicator
from dsyolo.data.sampler import StepSampler
from dsyolo.data.split_checks import refuse_lost_objects
from dsyolo.detection.anchor_fit import fit_anchors
from dsyolo.detection.assigner import Assigner
from dsyolo.engine import device
from dsyolo.models.detection_network import DetectionNetwork

log = logging.getLogger(__name__)
RAM_CACHE_BYTES = 2 << 30  # for each loader worker


class DataParts(NamedTuple):
    """The splits and this rank's loaders."""

    sampler: StepSampler
    train: TrainLoader
    val: EvalLoader
    train_set: DetectionDataset
    val_set: DetectionDataset

    def close(self) -> None:
        """End the loaders' workers."""
        self.train.close()
        self.val.close()

    def original_rgb(self, index: int) -> np.ndarray:
        """Return a validation image as it is in its file, RGB (H, W, 3)."""
        return self.val_set.load(index, max(self.val_set.ground_truth(index)[0])).image

    def image_names(self, start: int, stop: int) -> dict[int, list[str]]:
        """Return the image files of steps `start` + 1 .. `stop`, of all ranks; mosaic and mixup drew others beside them."""
        batch, path, at = self.sampler.global_batch, self.train_set.index.path, self.sampler.at
        return {
            step + 1: [path(at(step * batch + place)[1]) for place in range(batch)]
            for step in range(start, stop)
        }


def index_splits(
    run: RunSpec, world: World, communicator: Communicator | None = None
) -> tuple[DatasetIndex, DatasetIndex]:
    """Read both splits, from the cache if possible, and log what is in them.

    Args:
        communicator: the ranks, each of which reads its share; None: this process reads all.

    Raises:
        UserError: no usable image in one, no object in the training split, or labels of classes that data.yaml does
            not name.
    """
    indexes = {
        split: build_index(
            getattr(run.data, split),
            run.data.num_classes,
            workers=num_readers(world),
            progress=world.is_main_process,
            num_keypoint_values=run.data.num_keypoint_values,
            communicator=communicator,
        )
        for split in ("train", "val")
    }
    if world.is_main_process:
        for split, found in indexes.items():
            log.info("%s: %s", split, found.summary())
    for line in refuse_lost_objects(run.data, indexes, with_warnings=world.is_main_process):
        log.warning("%s", line)
    return indexes["train"], indexes["val"]


def build_data(
    run: RunSpec, world: World, indexes: tuple[DatasetIndex, DatasetIndex], network: DetectionNetwork
) -> DataParts:
    """Build the loaders of both splits."""
    config, ds = run.config, run.ds
    train_index, val_index = indexes
    num_workers = device.num_workers(world, config.workers)
    pin_memory = device.pins_memory()
    train_set = DetectionDataset(train_index, config.imgsz, RAM_CACHE_BYTES if config.cache == "ram" else 0)
    val_set = DetectionDataset(val_index, config.imgsz)
    place = parallel_dims(world, ds.stages)
    sampler = StepSampler(
        len(train_set), config.seed, ds.global_batch, ds.micro_batch, place.dp_rank, place.dp_size
    )
    strides = network.strides
    anchors_px = network.anchors * torch.tensor(strides).view(-1, 1, 1)
    if world.is_main_process:
        _log_anchor_fit(train_index, anchors_px.numpy(), config.imgsz, config.recipe.anchor_t)
    train_loader = TrainLoader(
        train_set if place.is_first_stage or place.is_last_stage else None,
        sampler,
        config.recipe,
        Assigner(anchors_px.numpy(), strides, config.recipe.anchor_t),
        image_size_px=config.imgsz,
        stride=network.size_multiple_px,
        num_workers=num_workers,
        pin_memory=pin_memory,
        num_epochs=config.epochs,
    )
    val_loader = EvalLoader(
        val_set,
        image_size_px=config.imgsz,
        stride=network.size_multiple_px,
        batch_size=config.val_batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        rectangular=config.rect_val,
    )
    return DataParts(sampler, train_loader, val_loader, train_set, val_set)


def _log_anchor_fit(index: DatasetIndex, anchors_px: np.ndarray, image_size_px: int, anchor_t: float) -> None:
    """Log the labels that no anchor can match. All ranks have the same index and anchors, so one speaks for all."""
    image_wh = np.repeat(index.sizes_hw[:, ::-1], np.diff(index.offsets), axis=0)
    boxes_wh = index.boxes[:, 2:] - index.boxes[:, :2]
    fit = fit_anchors(anchors_px, boxes_wh, image_wh, image_size_px, anchor_t)
    log.log(logging.WARNING if fit.needs_warning else logging.INFO, "%s", fit.summary())
