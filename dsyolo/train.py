"""Trains a YOLOv5 detector under DeepSpeed: parse, build, loop.

deepspeed dsyolo/train.py --deepspeed_config ds_configs/zero2.json --data data.yaml
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsyolo import config as run_config
from dsyolo import ds_config
from dsyolo.build import (
    Run,
    build_data,
    build_engine,
    build_network,
    build_record,
    plan_activations,
    scan_splits,
)
from dsyolo.config import RunConfig
from dsyolo.data.formats import read_data_yaml
from dsyolo.data.loader import Stream
from dsyolo.errors import UserError
from dsyolo.model.weights import read_weights
from dsyolo.model.yolov5 import has_parameters
from dsyolo.parallel import dist
from dsyolo.parallel.checkpoint import Checkpoints, Progress, all_checkpoints, read_manifest
from dsyolo.parallel.dist import World
from dsyolo.parallel.engine import Engine
from dsyolo.problems import cannot_hold_files
from dsyolo.validate import Finder, validate

# The launcher kills all ranks once one has failed: the others leave the first one time to say why.
GRACE_S = 10
SAME = ("epochs", "num_images", "global_batch", "seed")  # of Progress, when a run goes on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    world = dist.world_from_environment()
    try:
        train(read(argv, world))
    except UserError as error:
        if not world.is_first:
            time.sleep(GRACE_S)
            return 2
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if world.is_first:
            print(
                "\nInterrupted. --resume goes on from the run's last checkpoint, if it has one.",
                file=sys.stderr,
            )
        return 130
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
        lambda: ds_config.check(
            run.deepspeed_config,
            world_size=world.size,
            accelerator=accelerator,
            layers=has_parameters(run.model),
            recompute=run.recompute,
        ),
        lambda: read_data_yaml(run.data),
        lambda: check_folder(run, folder),
        lambda: run.weights and not run.resume and read_weights(Path(run.weights)),
    )
    if ds.stages > 1 and run.recipe.multi_scale:
        rule = "the stages of a pipeline agree on one size. Leave it out, or set pipeline.stages to 1."
        raise UserError("This run cannot start", [f"multi_scale: true given, but {rule}"])
    return Run(run, ds, data, world, folder, plan_activations(run, ds, data.num_classes))


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
    """A run needs a folder to write to: a new one of its own; one that goes on its checkpoint and settings.

    Raises:
        UserError: it is not so.
    """
    if problem := cannot_hold_files(folder):
        raise UserError(f"{folder} cannot be used", [f"--project: {problem}"])
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
    scans = dist.first_on_each_machine(world, lambda: scan_splits(run))
    network, taken = build_network(run)
    data = build_data(run, scans, network)
    engine, ema, checkpoints, info = build_engine(run, network, data.stream)
    if world.is_first and taken:
        print(taken)
    progress = start(run, data.stream, engine, checkpoints)
    tracker, record = build_record(run, data, progress, engine, info)
    finder = Finder(config.score_threshold, config.iou_threshold, config.max_detections)

    for epoch in range(progress.epoch, progress.epoch if progress.stopped_early else config.epochs):
        progress.epoch = epoch
        if data.stream.first_step(epoch + 1) == progress.step and epoch + 1 < config.epochs:
            continue  # of a data set smaller than a batch: an earlier step has trained its images
        tracker.begin(progress)
        for batches in data.train.steps(epoch, start=progress.step):
            stats, lr = engine.train_step(batches, progress.step)
            if stats.was_applied:
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


def start(run: Run, stream: Stream, engine: Engine, checkpoints: Checkpoints) -> Progress:
    """Where the run begins: at its first step, or at the newest checkpoint.

    Raises:
        UserError: the checkpoint cannot be read, or is of a run with other settings.
    """
    fresh = Progress(
        total_steps=stream.first_step(run.config.epochs),
        epochs=run.config.epochs,
        num_images=stream.num_images,
        global_batch=stream.global_batch,
        seed=run.config.seed,
        settings={
            "optimizer.type": run.ds.optimizer,
            **{f"optimizer.params.{key}": value for key, value in run.ds.optimizer_params.items()},
            "gradient_clipping": run.ds.gradient_clipping,
            "names": list(run.data.names),
        },
    )
    if not run.config.resume:
        return fresh
    path = all_checkpoints(run.folder / "checkpoints")[-1]
    saved = read_manifest(path, verify=False).progress
    before, now = ({**p.settings, **{key: getattr(p, key) for key in SAME}} for p in (saved, fresh))
    changed = [
        f"{key}: {now.get(key)} now, but {before.get(key)} when it was saved. Give what was given then."
        for key in {**before, **now}
        if now.get(key) != before.get(key)
    ]
    if changed:
        raise UserError(f"{path} cannot be resumed from", changed)
    return checkpoints.load(path)


if __name__ == "__main__":
    sys.exit(main())
