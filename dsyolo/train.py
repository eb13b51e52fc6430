"""Trains a YOLOv5 detector under DeepSpeed: parse, build, loop.

deepspeed dsyolo/train.py --deepspeed_config ds_configs/zero2.json --data data.yaml
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsyolo import config as run_config
from dsyolo import ds_config
from dsyolo.assign import Assigner
from dsyolo.config import RunConfig
from dsyolo.data.augment import Augmentation
from dsyolo.data.dataset import DetectionDataset, Scan, scan
from dsyolo.data.formats import DataSpec, read_data_yaml
from dsyolo.data.loader import EvalLoader, Stream, TrainLoader
from dsyolo.ds_config import DsConfig
from dsyolo.errors import UserError
from dsyolo.loss import DetectionLoss
from dsyolo.model.weights import WeightsInfo, describe, load_into, read_weights
from dsyolo.model.yolov5 import anchors_px, build_yolov5, level_strides
from dsyolo.optim import Schedule, build_optimizer
from dsyolo.parallel import dist
from dsyolo.parallel.checkpoint import Checkpoints, Progress, all_checkpoints
from dsyolo.parallel.dist import World
from dsyolo.parallel.ema import Ema, NoEma
from dsyolo.parallel.engine import Engine
from dsyolo.parallel.shards import Shards
from dsyolo.record import NullRecord, Record
from dsyolo.track import NullTracker, RunTracker, Tracker
from dsyolo.validate import Finder, validate

# The launcher kills all ranks once one has failed: the others leave the first one time to say why.
GRACE_S = 10


class Run(NamedTuple):
    """What is known before anything is built."""

    config: RunConfig
    ds: DsConfig
    data: DataSpec
    world: World
    folder: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 for a mistake of the user's."""
    world = dist.world_from_environment()
    try:
        train(read(argv, world))
    except UserError as error:
        if not world.is_first:
            time.sleep(GRACE_S)
            return 2
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    return 0


def read(argv: Sequence[str] | None, world: World) -> Run:
    """Reads and checks all that the user gave, before any rank builds a model.

    Raises:
        UserError: something in it cannot be used.
    """
    run = run_config.parse(argv)
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(run.project, run.name)
    ds, data, *_ = all_of(
        lambda: ds_config.check(run.deepspeed_config, world_size=world.size, accelerator=accelerator),
        lambda: read_data_yaml(run.data),
        lambda: check_folder(run, folder),
        lambda: run.weights and not run.resume and read_weights(Path(run.weights)),
    )
    return Run(run, ds, data, world, folder)


def all_of(*readers: Callable[[], Any]) -> list[Any]:
    """What each reader gives; where some fail, all of their problems in one error."""
    results, errors = [], []
    for reader in readers:
        try:
            results.append(reader())
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise UserError("This run cannot start", [str(error).replace("\n", "\n  ") for error in errors])
    if errors:
        raise errors[0]
    return results


def check_folder(run: RunConfig, folder: Path) -> None:
    """A new run needs a folder of its own; one that goes on needs its checkpoint and its settings.

    Raises:
        UserError: it is not so.
    """
    if not run.resume:
        if (folder / "config.yaml").exists():
            rule = "it holds a run already. Go on with it by --resume, or name another by --name."
            raise UserError(f"{folder} cannot be used", [rule])
        return
    if not all_checkpoints(folder / "checkpoints"):
        rule = "it has no checkpoint yet. Remove it, and start without --resume."
        raise UserError(f"{folder} cannot be resumed", [rule])
    changed = run_config.differences(RunConfig.load(folder / "config.yaml"), run)
    if changed:
        rule = "Leave it out, or start another run by --name."
        raise UserError(
            f"{folder} cannot be resumed with other settings", [f"{line}. {rule}" for line in changed]
        )


def train(run: Run) -> None:
    """Builds everything and trains to the end of the last epoch."""
    config, world = run.config, dist.join()
    data = build_data(run)
    engine, ema, checkpoints, info = build_engine(run, data.stream)
    progress = start(run, data.stream, engine, checkpoints)
    tracker, record = build_record(run, data, progress, engine, info)
    finder = Finder(config.score_threshold, config.iou_threshold, config.max_detections)

    for epoch in range(progress.epoch, progress.epoch if progress.stopped_early else config.epochs):
        progress.epoch = epoch
        tracker.begin(progress)
        for batches in data.train.steps(epoch, start=progress.step):
            stats, lr = engine.train_step(batches, progress.step)
            ema.update()
            tracker.step(progress.advance(stats.num_images), stats, lr, data.train.take_wait_s())
        metrics, is_best, is_last = None, False, epoch + 1 == config.epochs
        if (epoch + 1) % config.val_every == 0 or is_last:
            with ema.swapped():
                metrics, found = validate(engine.predict, data.val, finder, run.data.names, engine.all_gather)
            is_best = progress.judge(metrics.fitness, config.patience)
            record.validated(metrics, found, is_best)
        tracker.epoch(progress, metrics)
        is_last = is_last or progress.stopped_early
        progress.epoch, progress.tracking = epoch + 1, tracker.state()
        if is_best or is_last or (epoch + 1) % config.save_every == 0:
            record.weights(ema.state_dict(keep=record.keeps_weights), is_best)
            checkpoints.save(progress)
        if is_last:
            break

    tracker.close()
    record.finish()
    data.train.close()
    dist.leave(world)


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
    stream = Stream(len(train_set), config.seed, ds.global_batch, ds.micro_batch, world.rank, world.size)
    strides = level_strides(config.model)
    train_loader = TrainLoader(
        train_set,
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
    scans = []
    for split in ("train", "val"):
        found = scan(getattr(run.data, split), run.data.num_classes, progress=run.world.is_first)
        unknown = found.unknown_classes()
        if unknown:
            raise UserError(
                f"The {split} split of {run.data.path} cannot be used",
                [f"{detail} ({count} rows)" for detail, count in unknown.items()],
            )
        if run.world.is_first:
            print(f"{split}: {found.summary()}")
        scans.append(found)
    return scans[0], scans[1]


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
    engine = Engine(
        network,
        loss,
        build_optimizer(network, ds.optimizer, ds.optimizer_params),
        build_schedule(run, stream),
        deepspeed_json=ds.deepspeed_json(num_parameters, cpu=not dist.pins_memory()),
        world=world,
        accumulation=ds.accumulation,
        freeze_batchnorm=config.freeze_batchnorm,
    )
    shards = Shards(engine.deepspeed)
    ema = (
        Ema(shards, engine.buffers, config.ema_decay, config.ema_tau)
        if config.ema
        else NoEma(shards, engine.buffers)
    )
    checkpoints = Checkpoints(run.folder / "checkpoints", engine, shards, ema, world)
    if world.is_first:
        print("\n".join([*lines, f"device: {engine.device}, {threads} threads a rank"]))
    return engine, ema, checkpoints, describe(network, run.data.names, config.imgsz)


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


def start(run: Run, stream: Stream, engine: Engine, checkpoints: Checkpoints) -> Progress:
    """Where the run begins: at its first step, or at the newest checkpoint."""
    fresh = Progress(
        total_steps=stream.first_step(run.config.epochs),
        epochs=run.config.epochs,
        num_images=stream.num_images,
        global_batch=stream.global_batch,
        seed=run.config.seed,
    )
    if not run.config.resume:
        return fresh
    path = all_checkpoints(run.folder / "checkpoints")[-1]
    progress = checkpoints.load(path)
    changed = [
        f"{key}: {getattr(fresh, key)} now, but {getattr(progress, key)} when it was saved. Give what was given then."
        for key in ("epochs", "num_images", "global_batch", "seed")
        if getattr(fresh, key) != getattr(progress, key)
    ]
    if changed:
        raise UserError(f"{path} cannot be resumed from", changed)
    return progress


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
        memory_gib=engine.peak_memory_gib,
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


if __name__ == "__main__":
    sys.exit(main())
