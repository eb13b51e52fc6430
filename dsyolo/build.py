"""Builds the parts of a training run from what was read: loaders, engine, records."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch

from dsyolo.assign import Assigner
from dsyolo.config import RunConfig
from dsyolo.data.augment import Augmentation
from dsyolo.data.dataset import DetectionDataset, Scan, refuse_unknown_classes, scan
from dsyolo.data.formats import DataSpec
from dsyolo.data.loader import EvalLoader, Stream, TrainLoader
from dsyolo.ds_config import DsConfig
from dsyolo.loss import DetectionLoss
from dsyolo.model.blocks import freeze_batchnorm
from dsyolo.model.weights import WeightsInfo, describe, load_into
from dsyolo.model.yolov5 import anchors_px, build_yolov5, level_strides
from dsyolo.optim import Schedule
from dsyolo.parallel import dist
from dsyolo.parallel.checkpoint import Checkpoints, Progress
from dsyolo.parallel.dist import World
from dsyolo.parallel.ema import Ema, NoEma
from dsyolo.parallel.engine import Engine
from dsyolo.parallel.memory import peak_memory_gib
from dsyolo.parallel.spread import spread
from dsyolo.record import NullRecord, Record
from dsyolo.track import NullTracker, RunTracker, Tracker


class Run(NamedTuple):
    """What is known before anything is built."""

    config: RunConfig
    ds: DsConfig
    data: DataSpec
    world: World
    folder: Path


class Data(NamedTuple):
    """The splits and this rank's loaders."""

    stream: Stream
    train: TrainLoader
    val: EvalLoader
    val_set: DetectionDataset


def build_data(run: Run) -> Data:
    """Scans both splits and builds their loaders."""
    config, ds, world = run.config, run.ds, run.world
    train_scan, val_scan = dist.first_on_each_machine(world, lambda: scan_splits(run))
    num_workers = dist.num_workers(world, config.workers)
    pin_memory = dist.pins_memory()
    train_set = DetectionDataset(train_scan, config.imgsz, cache=config.cache)
    val_set = DetectionDataset(val_scan, config.imgsz)
    place = dist.place_in(world, ds.stages)
    stream = Stream(
        len(train_set), config.seed, ds.global_batch, ds.micro_batch, place.replica, place.replicas
    )
    strides = level_strides(config.model)
    train_loader = TrainLoader(
        train_set if place.is_first or place.is_last else None,
        stream,
        Augmentation(**{field.name: getattr(config.recipe, field.name) for field in fields(Augmentation)}),
        Assigner(anchors_px(config.model).numpy(), strides, config.recipe.anchor_t),
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
        batch_size=config.val_batch_size or ds.micro_batch,
        rank=world.rank,
        world_size=world.size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        rectangular=config.rect_val,
    )
    return Data(stream, train_loader, val_loader, val_set)


def scan_splits(run: Run) -> tuple[Scan, Scan]:
    """Reads both splits, from the cache where they are there, and says what is in them.

    Raises:
        UserError: no usable image in one, or labels of classes that data.yaml does not name.
    """
    scans = {
        split: scan(getattr(run.data, split), run.data.num_classes, progress=run.world.is_first)
        for split in ("train", "val")
    }
    refuse_unknown_classes(run.data, scans)
    if run.world.is_first:
        print("\n".join(f"{split}: {found.summary()}" for split, found in scans.items()))
    return scans["train"], scans["val"]


def build_engine(run: Run, stream: Stream) -> tuple[Engine, Ema | NoEma, Checkpoints, WeightsInfo]:
    """Builds the network, its engine, and what keeps its state."""
    config, ds, recipe, world = run.config, run.ds, run.config.recipe, run.world
    threads = dist.set_threads(world, config.threads)
    torch.manual_seed(config.seed)  # of the first weights; all ranks then take those of rank 0
    network = build_yolov5(config.model, run.data.num_classes)
    num_parameters = sum(p.numel() for p in network.parameters())
    lines = [f"{config.model}: {num_parameters:,} parameters", *ds.explain()]
    if config.weights and not config.resume:
        lines.append(load_into(network, Path(config.weights)))
    gains = ("box", "obj", "cls", "cls_pw", "obj_pw", "fl_gamma", "label_smoothing")
    loss = DetectionLoss(
        network.anchors, network.num_classes, config.imgsz, **{gain: getattr(recipe, gain) for gain in gains}
    )
    info = describe(network, run.data.names, config.imgsz)
    if config.freeze_batchnorm:
        freeze_batchnorm(network)
    engine, shards, about = spread(
        network,
        loss,
        build_schedule(run, stream),
        ds,
        world,
        image_size_px=config.imgsz,
        statistics_move=not config.freeze_batchnorm,
    )
    ema = (
        Ema(shards, engine.buffers, config.ema_decay, config.ema_tau)
        if config.ema
        else NoEma(shards, engine.buffers)
    )
    checkpoints = Checkpoints(run.folder / "checkpoints", engine, shards, ema, world)
    if world.is_first:
        print("\n".join([*lines, *about, f"device: {engine.device}, {threads} threads a rank"]))
    return engine, ema, checkpoints, info


def build_schedule(run: Run, stream: Stream) -> Schedule:
    """The schedule over the whole run; the warm-up is counted in images, so the batch does not change it."""
    recipe, params = run.config.recipe, run.ds.optimizer_params
    warmup_images = max(recipe.warmup_epochs * stream.num_images, recipe.warmup_min_images)
    return Schedule(
        total_steps=stream.first_step(run.config.epochs),
        warmup_steps=round(warmup_images / stream.global_batch),
        lr=params["lr"],
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
    run: Run, data: Data, progress: Progress, engine: Engine, info: WeightsInfo
) -> tuple[Tracker, Record | NullRecord]:
    """What tells and writes, on the first rank; what does nothing, on the others."""
    if not run.world.is_first:
        return NullTracker(), NullRecord()
    config, val_set = run.config, data.val_set
    run.folder.mkdir(parents=True, exist_ok=True)
    tracker = RunTracker(
        run.folder,
        progress,
        log_every=config.log_every,
        state=progress.tracking,
        memory_gib=lambda: peak_memory_gib(engine.device),
        wandb_mode=config.wandb,
        wandb_project=config.wandb_project,
        wandb_name=config.wandb_name or config.name,
        config=config.dump(),
    )
    record = Record(
        run.folder,
        config=config.dump(),
        deepspeed_json=engine.deepspeed_json,
        info=info,
        load_rgb=lambda index: val_set.load(index, max(val_set.truth(index)[0])).image,
        picture=tracker.pictures,
    )
    return tracker, record
