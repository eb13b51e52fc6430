"""Builds a trainer from a resolved run. The order of the hooks is written here."""

import contextlib
import errno
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from dsyolo.base.atomic_file import write_file
from dsyolo.base.batch import EvalBatch
from dsyolo.base.errors import UserError
from dsyolo.base.user_code import load_class, raised
from dsyolo.checkpoint.latest import newest_whole
from dsyolo.checkpoint.manifest import read_manifest
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster import collectives
from dsyolo.cluster.shared_fs import check_shared
from dsyolo.cluster.world import World
from dsyolo.config.resolve import RunSpec
from dsyolo.data.sampler import StepSampler
from dsyolo.detection.postprocess import OomSafePredictor
from dsyolo.detection.validation_loss import PredictBatch, Prediction, predict_with_loss
from dsyolo.engine import device
from dsyolo.engine.memory_profile import peak_memory_gib
from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.tracking.tracker import RunTracker
from dsyolo.tracking.writers import SafeWriter, WandbWriter, Writer
from dsyolo.trainer.data_parts import DataParts, build_data, index_splits
from dsyolo.trainer.engine_parts import EngineParts, build_engine, build_network
from dsyolo.trainer.hooks.artifacts_hook import ArtifactsHook
from dsyolo.trainer.hooks.base import Hook, HookList
from dsyolo.trainer.hooks.checkpoint_hook import CheckpointHook
from dsyolo.trainer.hooks.divergence_hook import DivergenceHook
from dsyolo.trainer.hooks.ema_hook import EmaHook
from dsyolo.trainer.hooks.heartbeat_hook import HeartbeatHook
from dsyolo.trainer.hooks.lost_images_hook import LostImagesHook
from dsyolo.trainer.hooks.memory_profile_hook import MemoryProfileHook
from dsyolo.trainer.hooks.metrics_hook import MetricsHook
from dsyolo.trainer.hooks.other_load_hook import OtherLoadHook
from dsyolo.trainer.hooks.preemption_hook import PreemptionHook
from dsyolo.trainer.hooks.time_profile_hook import TimeProfileHook
from dsyolo.trainer.process_limits import check_process_limits
from dsyolo.trainer.resumption import (
    check_settings,
    raise_if_finished,
    resumed_state,
    resumes_at,
    settings_of,
)
from dsyolo.trainer.run_folder import lock_folder
from dsyolo.trainer.same_settings import check_same_settings
from dsyolo.trainer.session import Session
from dsyolo.trainer.trainer import Trainer

DEEPSPEED_OUTPUT = "steps_per_print", "dump_state", "memory_breakdown", "comms_logger", "wall_clock_breakdown"
log = logging.getLogger(__name__)


def build(spec: RunSpec, world: World, session: Session, closing: ExitStack) -> Trainer:
    """Build all parts of a training, on all ranks together.

    Args:
        closing: gets what must be closed at the end, whatever is raised.

    Raises:
        UserError: the folder, the data, a checkpoint or the weights cannot be used.
        Preempted: a rank was asked to stop.
    """
    watchdog, preemption = session.watchdog, session.preemption
    collectives.all_ranks_or_raise(lambda: check_process_limits(spec, world))
    user_hooks = _user_hooks(spec.config.hook)
    user_writers = _user_classes(spec.config.writer, "writer", Writer)
    watchdog.at("waiting for the run's folder")
    collectives.run_on_rank0_and_broadcast(world, lambda: lock_folder(spec, session.run_lock, preemption))
    check_shared(spec.folder, world)
    session.run_log.open_file(spec.folder)
    check_same_settings(spec, world)
    folder = spec.folder / "checkpoints"
    set_aside = spec.config.resume == "auto"
    checkpoint = newest_whole(folder, world, set_aside=set_aside) if spec.resumes else None
    saved = read_manifest(checkpoint, verify=False).progress if checkpoint else None
    if checkpoint and saved:
        check_settings(spec, saved, checkpoint)
        raise_if_finished(spec, saved, world)
    with contextlib.closing(
        collectives.ClusterCommunicator(world, watchdog.at, preemption.requested_status)
    ) as communicator:
        indexes = index_splits(spec, world, communicator)
    network, taken = build_network(spec, checkpoint)
    data = build_data(spec, world, indexes, network)
    closing.callback(data.close)
    state = new_state(spec, data.sampler)
    if checkpoint and saved:
        check_settings(spec, saved, checkpoint, data.sampler.num_images)
    parts = build_engine(spec, world, network, data.sampler, session.other_load)
    if world.is_main_process and taken:
        log.info("%s", taken)
    preemption.raise_if_requested(wait=True)
    if checkpoint:
        state = resumed_state(spec, parts.checkpointer.load(checkpoint, verified=True), state)
        if world.is_main_process:
            log.info("%s", resumes_at(state, checkpoint))
    tracker, artifacts = collectives.all_ranks_or_raise(
        lambda: _main_process_parts(spec, world, data, state, parts, user_writers)
    )
    if tracker:
        closing.callback(tracker.close)
    if any(spec.ds.source.get(key) for key in DEEPSPEED_OUTPUT):
        session.run_log.show_deepspeed()
    hooks = build_hooks(spec, parts, session, tracker, artifacts, user_hooks)
    return Trainer(spec, world, parts.engine, data, state, hooks, predict=_predictor(spec, parts, data))


def build_hooks(
    spec: RunSpec,
    parts: EngineParts,
    session: Session,
    tracker: RunTracker | None,
    artifacts: RunArtifacts | None,
    user_hooks: Sequence[Hook] = (),
) -> HookList:
    """Return the hooks in the order in which they are called; they are closed in reverse order.

    Args:
        tracker, artifacts: None off the main process.
    """
    config = spec.config
    times = (
        TimeProfileHook(in_detail=config.time_profile == "steps") if config.time_profile != "off" else None
    )
    if tracker and times:
        tracker.mfu = times.mfu
    on_cpu = parts.engine.device.type == "cpu"
    hooks: list[Hook | None] = [
        ArtifactsHook(artifacts) if artifacts else None,
        times,
        EmaHook(parts.ema),
        MemoryProfileHook(parts.load, parts.partitions, parts.ema, config.memory_profile, artifacts, times),
        *user_hooks,  # before the metrics, so that their figures are in the rows
        MetricsHook(tracker) if tracker else None,
        DivergenceHook(config.max_skipped_steps, artifacts),
        LostImagesHook(),  # before a checkpoint can take the weights of grey images for the best
        CheckpointHook(parts.checkpointer, parts.ema, artifacts, config.save_every),
        OtherLoadHook(session.other_load, config.threads) if on_cpu else None,
        PreemptionHook(session.preemption),
        HeartbeatHook(session.watchdog),
    ]
    return HookList([hook for hook in hooks if hook is not None])


def new_state(spec: RunSpec, sampler: StepSampler) -> TrainState:
    """Return the state of a run at its first step."""
    return TrainState(
        total_steps=sampler.epoch_start_step(spec.config.epochs),
        epochs=spec.config.epochs,
        num_images=sampler.num_images,
        global_batch=sampler.global_batch,
        seed=spec.config.seed,
        settings=settings_of(spec),
    )


def _user_classes(references: str | None, option: str, base: type[Any]) -> dict[str, Any]:
    names = [name.strip() for name in (references or "").split(",") if name.strip()]
    return {name: load_class(name, f"--{option}", base, f"docs/{option}.md") for name in names}


def _user_hooks(references: str | None) -> list[Hook]:
    hooks = []
    for name, make in _user_classes(references, "hook", Hook).items():
        try:
            hooks.append(make())
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            rule = (
                f"{raised(error)}. It is called without arguments: give its __init__ none that are required"
            )
            raise UserError("This run cannot start", [f"--hook: {name} given, but {rule}."]) from error
    return hooks


def _predictor(spec: RunSpec, parts: EngineParts, data: DataParts) -> PredictBatch:
    """Return the prediction of a validation, which takes fewer images at a time where memory runs out."""
    engine = parts.engine

    def predict(batch: EvalBatch) -> Prediction:
        if not batch.ground_truths:  # it fills up
            return Prediction(engine.predict(batch.images))
        return predict_with_loss(engine.predict_with_loss, data.train.assign, batch)

    if spec.ds.zero_stage == 3:  # every pass gathers weights from all ranks: none can make more of them
        return predict
    return OomSafePredictor(predict, lambda line: log.warning("%s", line), device.accelerator().empty_cache)


def _main_process_parts(
    spec: RunSpec,
    world: World,
    data: DataParts,
    state: TrainState,
    parts: EngineParts,
    user_writers: Mapping[str, Any],
) -> tuple[RunTracker | None, RunArtifacts | None]:
    """Return what reports and writes on the main process.

    Raises:
        UserError: the run's folder cannot be written to.
    """
    if not world.is_main_process:
        return None, None
    try:
        spec.folder.mkdir(parents=True, exist_ok=True)
        tracker = RunTracker(
            spec.folder,
            state,
            log_every=spec.config.log_every,
            state=state.tracking,
            memory_gib=lambda: peak_memory_gib(parts.engine.device),
            writers=_writers(spec, state, user_writers),
            epoch_start_step=data.sampler.epoch_start_step,
        )
        if spec.is_planned:
            text = json.dumps(dict(spec.ds.source), indent=2) + "\n"
            write_file(spec.folder / "deepspeed_auto.json", text.encode())
        artifacts = RunArtifacts(
            spec.folder,
            config={**spec.config.dump(), "optimizer": parts.optimizer_record},
            deepspeed_json={
                **parts.engine.deepspeed_json,
                **spec.ds.own_blocks(),
                "optimizer": {**spec.ds.optimizer_json(), "_as_it_runs": parts.optimizer_record},
            },
            info=parts.info,
            load_rgb=data.original_rgb,
            draw=tracker.plotter.draw,
            picture=tracker.picture,
        )
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Make room" if is_full else "Move away what is there"
        what = f"{error.filename or spec.folder}: {error.strerror}. {remedy}, or choose another folder with --name."
        raise UserError(f"{spec.folder} cannot be used", [what]) from None
    return tracker, artifacts


def _writers(spec: RunSpec, state: TrainState, user_writers: Mapping[str, Any]) -> list[Writer]:
    """Return W&B's writer and the user's own, none of which can stop the training."""
    config, writers = spec.config, list[Writer]()
    if config.wandb != "disabled":
        make = partial(
            WandbWriter,
            spec.folder,
            mode=config.wandb,
            project=config.wandb_project,
            name=config.wandb_name or config.name,
            config=config.dump(),
            run_id=state.tracking.get("run_id"),
        )
        writers.append(SafeWriter("W&B", make))
    for name, make in user_writers.items():
        writers.append(SafeWriter(name, partial(make, spec.folder), state.tracking))
    return writers
