"""Trains a YOLOv5 detector under DeepSpeed: parse, build, loop.

deepspeed dsyolo/train.py --deepspeed_config ds_configs/zero2.json --data data.yaml
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from dsyolo.base.environment import read_environment
from dsyolo.base.errors import UserError
from dsyolo.base.out_of_memory import is_out_of_memory
from dsyolo.base.stdio import outlive_readers
from dsyolo.checkpoint.checkpointer import Checkpointer
from dsyolo.checkpoint.latest import newest_whole
from dsyolo.checkpoint.manifest import read_manifest, saved_progress
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster import collectives
from dsyolo.cluster import preemption as stop
from dsyolo.cluster.communicator import ClusterCommunicator
from dsyolo.cluster.preemption import Preempted, PreemptionHandler
from dsyolo.cluster.run_lock import RunLock
from dsyolo.cluster.shared_fs import check_shared
from dsyolo.cluster.watchdog import Watchdog
from dsyolo.cluster.world import World, world_from_environment
from dsyolo.config.resolve import RunSpec, resolve
from dsyolo.config.run_config import AUTO, RunConfig
from dsyolo.data.loader import StepSampler
from dsyolo.engine import process_group
from dsyolo.planner.auto import PlannedConfig, plan_config
from dsyolo.planner.local_hardware import hardware_here
from dsyolo.trainer.build import (
    build_data,
    build_engine,
    build_network,
    build_record,
    scan_splits,
)
from dsyolo.trainer.run_folder import check_folder, claim_folder
from dsyolo.trainer.trainer import VALIDATING, Training, loop, stopped

# The launcher kills all ranks once one has failed: the others leave the first one time to say why.
GRACE_S = 10
SAME = ("epochs", "num_images", "global_batch", "seed")  # of TrainState, when a run goes on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0; 2 for a mistake of the user's; 65 where the training diverges; 74 where its end could not be saved; 75 after
    SIGTERM, with all saved, and where another run is in its folder; 130 for Ctrl-C. A rank that is lost ends all of them with 70 (cluster/watchdog.py).
    """
    try:
        world = world_from_environment()
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    try:
        with stop.ends_at_once(world):
            run = read(argv, world)
            request, watch = join(run)
        return train(run, request, watch)
    except UserError as error:
        if not world.is_main_process:
            time.sleep(GRACE_S)
            return error.status
        print(f"\n{error}\n", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        if world.is_main_process:
            print(
                "\nInterrupted. --resume goes on from the run's last checkpoint, if it has one.",
                file=sys.stderr,
            )
        return 130


def read(argv: Sequence[str] | None, world: World) -> RunSpec:
    """Resolves the run, with all that it needs to know of this machine and of the run's folder.

    Raises:
        UserError: something that the user gave cannot be used.
    """
    accelerator = read_environment().accelerator or ("cuda" if torch.cuda.is_available() else "cpu")

    def plan(config: RunConfig, num_classes: int, saved_batch: int | None) -> PlannedConfig:
        return plan_config(config, lambda: hardware_here(world, accelerator), num_classes, saved_batch)

    return resolve(argv, world, accelerator, plan=plan, saved_state=saved_progress, check_folder=check_folder)


def join(run: RunSpec) -> tuple[PreemptionHandler, Watchdog]:
    """Waits for all ranks. From then on all hear what one of them is asked, and that one is lost."""
    with process_group.started(run.config.rendezvous_timeout_s):
        return PreemptionHandler(run.world), Watchdog(run.world, late_s=run.config.hang_timeout_s)


def train(run: RunSpec, request: PreemptionHandler, watch: Watchdog) -> int:
    """Trains; returns the exit status."""
    claim = RunLock(run.folder)
    try:
        return learn(run, watch, request, claim)
    except UserError:
        claim.leave()
        raise
    except Preempted:  # before the first step
        request.close()
        watch.close()
        process_group.destroy_process_group(run.world)
        stop.leave_at_once(run.world)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            end_or_halve(run, watch)
        watch.wait_for_verdict()  # of a collective, likely: another rank has gone
        raise
    finally:
        watch.close()


def end_or_halve(run: RunSpec, watch: Watchdog) -> NoReturn:
    """After this rank ran out of memory: once, all ranks go on with half the micro-batch and the same global batch.

    Where it validated under ZeRO 3, they go on with half as many images at a time there, as often as they have to.
    """
    if watch.where == VALIDATING:
        size = run.config.val_batch_size
        if size > 1 and run.ds.zero_stage == 3:
            watch.end_all(
                f"ran out of memory with {size} images to validate at a time: from now on {size // 2}. What was trained since "
                "the last checkpoint is trained again.",
                again=("--val_batch_size", str(size // 2), "--resume", "auto"),
            )
        watch.end_all("ran out of memory in validation. Take a smaller --val_batch_size, --imgsz or --model.")
    ds, again = run.ds, run.config.halve_micro_batch
    what = f"ran out of memory with {ds.micro_batch} images in a micro-batch"
    is_planned = run.config.deepspeed_config == AUTO
    if again or (ds.micro_batch % 2 and not is_planned):
        rule = "which was halved once already" if again else "which cannot be halved"
        remedy = "Lower train_micro_batch_size_per_gpu, or save memory by --recompute blocks or a higher ZeRO stage"
        if is_planned:
            remedy = (
                "Save memory by a smaller --imgsz or --model, or by a JSON of your own with a smaller batch"
            )
        watch.end_all(f"{what}, {rule}. {remedy}.")
    halved = f"{ds.micro_batch // 2} and {2 * ds.accumulation} accumulation steps"
    if is_planned:
        halved = "another plan, for less memory"
    watch.end_all(
        f"{what}: from now on {halved}; the global batch stays {ds.global_batch}.",
        again=("--halve_micro_batch", "--resume", "auto"),
    )


def learn(run: RunSpec, watch: Watchdog, request: PreemptionHandler, claim: RunLock) -> int:
    """Builds everything, trains, and ends with all that was told written down; returns the exit status."""
    world = run.world
    watch.at("waiting for the run's folder")
    collectives.run_on_rank0_and_broadcast(world, lambda: claim_folder(run, claim, request))
    check_shared(run.folder, world)
    collectives.check_same(
        run.ds.source if run.planned else None,
        "the plan of --deepspeed_config auto",
        "write one by dsyolo plan",
    )
    communicator = ClusterCommunicator(world, watch.at, request.asked)
    scans = scan_splits(run, communicator)
    communicator.close()
    checkpoint = choose_checkpoint(run)
    network, taken = build_network(run, checkpoint)
    data = build_data(run, scans, network)
    parts = build_engine(run, network, data.stream)
    if world.is_main_process and taken:
        print(taken)
    request.raise_if_requested(wait=True)
    progress = start(run, data.stream, parts.checkpoints, checkpoint)
    tracker, record = collectives.all_ranks_or_raise(lambda: build_record(run, data, progress, parts))
    training = Training(run, data, parts, progress, tracker, record, watch, request)
    try:
        end = loop(training)
    except Preempted:
        end = stopped(training)
    tracker.close()
    if not end.status:
        record.finish()
    data.train.close()
    data.val.close()
    request.close()
    watch.close()
    process_group.destroy_process_group(world)
    if end.said and world.is_main_process:
        print(f"\n{end.said}", file=sys.stderr)
    return end.status


def choose_checkpoint(run: RunSpec) -> Path | None:
    """Where the run goes on from; None: it begins.

    Raises:
        UserError: the newest checkpoint is damaged; with `--resume auto`, all are.
    """
    folder = run.folder / "checkpoints"
    return newest_whole(folder, run.world, set_aside=run.config.resume == "auto") if run.resumes else None


def start(run: RunSpec, stream: StepSampler, checkpoints: Checkpointer, path: Path | None) -> TrainState:
    """Where the run is: at its first step, or at the checkpoint `path`.

    Raises:
        UserError: the checkpoint cannot be read, or is of a run with other settings.
    """
    fresh = TrainState(
        total_steps=stream.epoch_start_step(run.config.epochs),
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
    if path is None:
        return fresh
    saved = read_manifest(path, verify=False).progress
    before, now = ({**p.settings, **{key: getattr(p, key) for key in SAME}} for p in (saved, fresh))
    changed = [
        f"{key}: {now.get(key)} now, but {before.get(key)} when it was saved. Give what was given then."
        for key in {**before, **now}
        if now.get(key) != before.get(key)
    ]
    if changed:
        raise UserError(f"{path} cannot be resumed from", changed)
    return checkpoints.load(path, verified=True)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
