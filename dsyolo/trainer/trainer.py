"""The loop of a training, from where it is to its end."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster import collectives
from dsyolo.cluster import preemption as stop
from dsyolo.cluster.preemption import Preempted, PreemptionHandler
from dsyolo.cluster.watchdog import Watchdog
from dsyolo.config.resolve import RunSpec
from dsyolo.detection.evaluator import OomSafePredictor, PostProcessor, validate
from dsyolo.engine import device
from dsyolo.engine.memory_profile import MemoryProfiler, NoMemoryProfiler
from dsyolo.tracking.artifacts import NullArtifacts, RunArtifacts
from dsyolo.tracking.throughput import NoTimeProfile, TimeProfile
from dsyolo.tracking.tracker import Tracker
from dsyolo.trainer.build import DataParts, Parts
from dsyolo.trainer.profiles import build_memory, build_time_profile

VALIDATING = "validating"  # where a rank is
DIVERGED, NOT_SAVED = 65, 74  # exit statuses: EX_DATAERR and EX_IOERR of sysexits.h


class Training(NamedTuple):
    """All that the loop works with."""

    run: RunSpec
    data: DataParts
    parts: Parts
    progress: TrainState
    tracker: Tracker
    record: RunArtifacts | NullArtifacts
    watch: Watchdog
    request: PreemptionHandler


class End(NamedTuple):
    """Of a training: the exit status, and what there is to say."""

    status: int = 0
    said: str = ""


def loop(training: Training) -> End:
    """Trains to the end of the last epoch.

    Raises:
        Preempted: after a step or in a validation, with the weights of the last step in place.
    """
    run, data, parts, progress, tracker, record, *_ = training
    times = build_time_profile(run, data, parts, progress.step)
    memory = build_memory(run, parts, tracker, record, times)
    try:
        end = _epochs(training, times, memory)
    except Preempted:
        times.finish()
        raise
    times.finish()
    return end


def _epochs(
    training: Training, times: TimeProfile | NoTimeProfile, memory: MemoryProfiler | NoMemoryProfiler
) -> End:
    run, data, parts, progress, tracker, record, watch, request = training
    config, engine, ema, checkpoints = run.config, parts.engine, parts.ema, parts.checkpoints
    finder = PostProcessor(config.score_threshold, config.iou_threshold, config.max_detections)

    # Under ZeRO 3 every pass gathers weights from all ranks, and none can pass through more often.
    def tell(line: str) -> None:
        print(f"rank {run.world.rank}: {line}", flush=True)

    inferred = (
        engine.predict
        if run.ds.zero_stage == 3
        else OomSafePredictor(engine.predict, tell, device.empty_cache)
    )

    def predict(images: torch.Tensor) -> torch.Tensor:
        watch.at(VALIDATING)
        request.raise_if_requested()
        return inferred(images)

    for epoch in range(progress.epoch, progress.epoch if progress.stopped_early else config.epochs):
        progress.epoch = epoch
        if (
            data.stream.epoch_start_step(epoch) == data.stream.epoch_start_step(epoch + 1)
            and epoch + 1 < config.epochs
        ):
            continue  # of a data set smaller than a batch: an earlier step has trained its images
        tracker.begin(progress)
        memory.begin_epoch()
        for batches in times.steps(data.train.steps(epoch, progress.step), progress.step):
            watch.at(f"training step {progress.step + 1}")
            with memory.step():
                stats, lr = engine.train_step(batches, progress.step)
            if stats.was_applied:
                ema.update()
            tracker.step(progress.advance(stats), stats, lr, data.train.take_wait_s())
            if progress.skipped_in_a_row == config.max_skipped_steps:
                record.skipped(data.names_of(progress.step - progress.skipped_in_a_row, progress.step))
                return End(DIVERGED, diverged(progress, run))
            request.raise_if_requested()
            watch.at(f"loading step {progress.step + 1}")
        metrics, is_best, is_last = None, False, epoch + 1 == config.epochs
        if (epoch + 1) % config.val_every == 0 or is_last:
            with times.outside("validation"), ema.swapped():
                metrics, found = validate(predict, data.val, finder, run.data.names, engine.all_gather)
            is_best = progress.judge(metrics.fitness, config.patience)
            record.validated(metrics, found, is_best)
        tracker.epoch(progress, metrics, times.epoch())
        is_last = is_last or progress.stopped_early
        progress.epoch, progress.tracking = epoch + 1, tracker.state()
        if is_best or is_last or (epoch + 1) % config.save_every == 0:
            watch.at("saving")
            with times.outside("checkpoint"):
                state = ema.state_dict(keep=record.keeps_weights)
                problem = collectives.first_problem_of_any_rank(record.weights(state, is_best))
                problem = checkpoints.save(progress, is_best=is_best) or problem
            if problem and is_last:
                return End(NOT_SAVED, f"{problem} Make room: --resume auto does the end again.")
            if problem:
                tracker.say(f"WARNING: {problem} The run goes on, and saves again later.")
        if is_last:
            break
    return End()


def stopped(training: Training) -> End:
    """Saves, after a step or in the midst of the validation behind it, which comes again."""
    progress = training.progress
    progress.tracking = training.tracker.state()
    problem = training.parts.checkpoints.save(progress)
    said = problem or f"Stopped as asked after step {progress.step}, and saved."
    return End(NOT_SAVED if problem else stop.STATUS, f"{said} --resume auto goes on.")


def diverged(progress: TrainState, run: RunSpec) -> str:
    """What there is to say where too many steps in a row had to be skipped."""
    what = f"loss or gradients of the last {progress.skipped_in_a_row} steps were not finite, so none changed the weights"
    where = f"The images of these steps are named in {run.folder / 'skipped_steps.json'}"
    remedy = "Lower optimizer.params.lr, or look at their labels; --max_skipped_steps allows more"
    return f"The training stops at step {progress.step}: {what}. {where}. {remedy}."
