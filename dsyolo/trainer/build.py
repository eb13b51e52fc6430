"""Builds the parts of a training run from what was read: loaders, engine, records."""

from __future__ import annotations

import errno
import json
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.checkpointer import Checkpointer
from dsyolo.checkpoint.reader import read_buffers
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.world import num_readers, parallel_dims, set_threads
from dsyolo.config.resolve import RunSpec
from dsyolo.data.dataset import DetectionDataset, refuse_unknown_classes
from dsyolo.data.index import DatasetIndex
from dsyolo.data.index_builder import build_index
from dsyolo.data.loader import EvalLoader, StepSampler, TrainLoader
from dsyolo.data.parallel_map import Communicator
from dsyolo.data.transforms import Augmentation
from dsyolo.detection.assigner import Assigner
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine import device
from dsyolo.engine.batchnorm import synchronise_batchnorm
from dsyolo.engine.buffers import named_buffers
from dsyolo.engine.ema import Ema, NoEma
from dsyolo.engine.engine import Engine
from dsyolo.engine.memory_profile import peak_memory_gib
from dsyolo.engine.offload import OffloadFolders, move_to_folders
from dsyolo.engine.optimizer import Schedule, lr_factor
from dsyolo.engine.parallelize import parallelize
from dsyolo.engine.partitions import Partitions
from dsyolo.models.blocks import freeze_batchnorm
from dsyolo.models.weights import WeightsInfo, describe, load_into
from dsyolo.models.yolov5 import YOLOv5, build_yolov5
from dsyolo.planner.memory_estimate import RankLoad
from dsyolo.tracking.artifacts import NullArtifacts, RunArtifacts
from dsyolo.tracking.tracker import NullTracker, RunTracker, Tracker


class Parts(NamedTuple):
    """What trains on this rank, and what it was given to hold."""

    engine: Engine
    partitions: Partitions
    ema: Ema | NoEma
    checkpoints: Checkpointer
    info: WeightsInfo
    load: RankLoad


class DataParts(NamedTuple):
    """The splits and this rank's loaders."""

    stream: StepSampler
    train: TrainLoader
    val: EvalLoader
    train_set: DetectionDataset
    val_set: DetectionDataset

    def names_of(self, start: int, stop: int) -> dict[int, list[str]]:
        """The image files of steps `start` + 1 .. `stop`, of all ranks; mosaic and mixup drew others beside them."""
        positions = {
            step: range(step * self.stream.global_batch, (step + 1) * self.stream.global_batch)
            for step in range(start, stop)
        }
        return {
            step + 1: [self.train_set.build_index.path(self.stream.at(position)[1]) for position in places]
            for step, places in positions.items()
        }


def build_network(run: RunSpec, checkpoint: Path | None = None) -> tuple[YOLOv5, str]:
    """The network with its first weights, and what was taken from a file of weights.

    A run that goes on gets its weights from the checkpoint later, but its anchors now: targets and loss need them.
    """
    config = run.config
    torch.manual_seed(config.seed)  # of the first weights; all ranks then take those of rank 0
    network = build_yolov5(config.model, run.data.num_classes)
    taken = ""
    if checkpoint:
        saved = named_buffers(network, read_buffers(checkpoint))
        network.anchors.copy_(saved["detect.anchors"])
    elif config.weights:
        taken = load_into(network, Path(config.weights))
    return network, taken


def build_data(run: RunSpec, scans: tuple[DatasetIndex, DatasetIndex], network: YOLOv5) -> DataParts:
    """The loaders of both splits."""
    config, ds, world = run.config, run.ds, run.world
    train_index, val_index = scans
    num_workers = device.num_workers(world, config.workers)
    pin_memory = device.pins_memory()
    train_set = DetectionDataset(train_index, config.imgsz, cache=config.cache)
    val_set = DetectionDataset(val_index, config.imgsz)
    place = parallel_dims(world, ds.stages)
    stream = StepSampler(
        len(train_set), config.seed, ds.global_batch, ds.micro_batch, place.dp_rank, place.dp_size
    )
    strides = network.strides
    anchors_px = network.anchors * torch.tensor(strides).view(-1, 1, 1)
    train_loader = TrainLoader(
        train_set if place.is_first_stage or place.is_last_stage else None,
        stream,
        Augmentation(**{field.name: getattr(config.recipe, field.name) for field in fields(Augmentation)}),
        Assigner(anchors_px.numpy(), strides, config.recipe.anchor_t),
        image_size_px=config.imgsz,
        stride=strides[-1],
        multi_scale=config.recipe.multi_scale,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
    val_loader = EvalLoader(
        val_set,
        image_size_px=config.imgsz,
        stride=strides[-1],
        batch_size=config.val_batch_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        rectangular=config.rect_val,
    )
    return DataParts(stream, train_loader, val_loader, train_set, val_set)


def scan_splits(run: RunSpec, communicator: Communicator | None = None) -> tuple[DatasetIndex, DatasetIndex]:
    """Reads both splits, from the cache where they are there, and says what is in them.

    Args:
        crew: the ranks, each of which reads its share; None: this process reads all.

    Raises:
        UserError: no usable image in one, or labels of classes that data.yaml does not name.
    """
    scans = {
        split: build_index(
            getattr(run.data, split),
            run.data.num_classes,
            workers=num_readers(run.world),
            progress=run.world.is_main_process,
            communicator=communicator,
        )
        for split in ("train", "val")
    }
    refuse_unknown_classes(run.data, scans)
    if run.world.is_main_process:
        print("\n".join(f"{split}: {found.summary()}" for split, found in scans.items()))
    return scans["train"], scans["val"]


def build_engine(run: RunSpec, network: YOLOv5, stream: StepSampler) -> Parts:
    """Builds the engine around the network, and what keeps its state."""
    config, ds, recipe, world = run.config, run.ds, run.config.recipe, run.world
    threads = set_threads(world, config.threads)
    network.recompute = run.activations.recomputed
    network.offload_inputs = ds.offload_activations
    num_parameters = sum(p.numel() for p in network.parameters())
    gains = ("box", "obj", "cls", "cls_pw", "obj_pw", "fl_gamma", "label_smoothing")
    loss = DetectionLoss(
        network.anchors, network.num_classes, config.imgsz, **{gain: getattr(recipe, gain) for gain in gains}
    )
    schedule = build_schedule(run, stream)
    lines = [
        f"{config.model}: {num_parameters:,} parameters",
        *ds.explain(),
        run.activations.explain(),
        *schedule.explain(),
    ]
    if recipe.lr_scaling != "none":
        factor = schedule.lr / ds.optimizer_params["lr"]
        lines.append(
            f"lr: {schedule.lr:g}, {factor:g} times the JSON's for {ds.global_batch} images ({recipe.lr_scaling})"
        )
    info = describe(network, run.data.names, config.imgsz)
    if config.freeze_batchnorm:
        freeze_batchnorm(network)
    engine, partitions, nodes, groups, about = parallelize(
        network,
        loss,
        schedule,
        ds,
        world,
        image_size_px=config.imgsz,
        statistics_move=not (config.freeze_batchnorm or config.sync_batchnorm),
        activations=run.activations,
    )
    if config.sync_batchnorm:
        synchronise_batchnorm(engine.network, engine.dp_group)
        lines.append(f"BatchNorm: synchronised, over {ds.micro_batch * ds.data_parallel_size} images")
    ema = (
        Ema(partitions, engine.buffers, config.ema_decay, config.ema_tau)
        if config.ema
        else NoEma(partitions, engine.buffers)
    )
    if any(ds.offload_folders):
        move_to_folders(OffloadFolders(*ds.offload_folders), engine.deepspeed, partitions, ema.tensors, world)
    checkpoints = Checkpointer(
        run.folder / "checkpoints", engine, partitions, ema, world, keep=config.keep_checkpoints
    )
    if world.is_main_process:
        print("\n".join([*run.planned, *lines, *about, f"device: {engine.device}, {threads} threads a rank"]))
    place, plan = parallel_dims(world, ds.stages), run.activations
    in_flight = min(ds.stages - place.pp_rank, ds.accumulation)
    kept = [
        plan.stage_bytes(nodes, in_flight, names) for names in (None, frozenset[str](), plan.counted.blocks)
    ]
    on_host = plan.host_bytes(nodes, in_flight)
    load = RankLoad(groups, *kept, place.dp_rank, place.dp_size, config.ema, on_host)
    return Parts(engine, partitions, ema, checkpoints, info, load)


def build_schedule(run: RunSpec, stream: StepSampler) -> Schedule:
    """The schedule over the whole run; the warm-up is counted in images, so the batch does not change it."""
    recipe, params = run.config.recipe, run.ds.optimizer_params
    is_scaled = recipe.lr_scaling != "none"
    warmup_images = max(recipe.warmup_epochs * stream.num_images, recipe.warmup_min_images)
    return Schedule(
        total_steps=stream.epoch_start_step(run.config.epochs),
        warmup_steps=max(round(warmup_images / stream.global_batch), int(is_scaled)),
        lr=params["lr"] * lr_factor(recipe.lr_scaling, stream.global_batch),
        lrf=recipe.lrf,
        shape=recipe.schedule,
        momentum=params.get("momentum", 0.0),
        weight_decay=params.get("weight_decay", 0.0),
        global_batch=stream.global_batch,
        warmup_bias_lr=recipe.warmup_bias_lr,
        warmup_momentum=recipe.warmup_momentum,
        is_adam=run.ds.optimizer != "SGD",
    )


def build_record(
    run: RunSpec, data: DataParts, progress: TrainState, parts: Parts
) -> tuple[Tracker, RunArtifacts | NullArtifacts]:
    """What tells and writes, on the first rank; what does nothing, on the others.

    Raises:
        UserError: the run's folder cannot be written to.
    """
    if not run.world.is_main_process:
        return NullTracker(), NullArtifacts()
    try:
        return _build_record(run, data, progress, parts)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Make room" if is_full else "Move away what is there"
        fault = (
            f"{error.filename or run.folder}: {error.strerror}. {remedy}, or name another folder by --name."
        )
        raise UserError(f"{run.folder} cannot be used", [fault]) from None


def _build_record(
    run: RunSpec, data: DataParts, progress: TrainState, parts: Parts
) -> tuple[Tracker, RunArtifacts]:
    config, val_set = run.config, data.val_set
    run.folder.mkdir(parents=True, exist_ok=True)
    tracker = RunTracker(
        run.folder,
        progress,
        log_every=config.log_every,
        state=progress.tracking,
        memory_gib=lambda: peak_memory_gib(parts.engine.device),
        wandb_mode=config.wandb,
        wandb_project=config.wandb_project,
        wandb_name=config.wandb_name or config.name,
        config=config.dump(),
    )
    if run.planned:
        text = json.dumps(dict(run.ds.source), indent=2) + "\n"
        (run.folder / "deepspeed_auto.json").write_text(text)
    record = RunArtifacts(
        run.folder,
        config=config.dump(),
        deepspeed_json=parts.engine.deepspeed_json,
        info=parts.info,
        load_rgb=lambda index: val_set.load(index, max(val_set.ground_truth(index)[0])).image,
        draw=tracker.plotter.draw,
        picture=tracker.pictures,
    )
    return tracker, record
