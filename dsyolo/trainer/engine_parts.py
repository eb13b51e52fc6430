"""Builds what trains on a rank: network, schedule, engine, average of the weights, checkpointer."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsyolo.checkpoint.checkpointer import Checkpointer
from dsyolo.checkpoint.manifest import read_buffers
from dsyolo.cluster.world import World, cores_of_rank, parallel_dims, set_threads
from dsyolo.config.messages import counted
from dsyolo.config.resolve import RunSpec
from dsyolo.config.spec import OptimizerSpec, SchedulerSpec
from dsyolo.data.sampler import StepSampler
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine.buffers import named_buffers
from dsyolo.engine.device import pins_memory
from dsyolo.engine.ema import Ema, NoEma
from dsyolo.engine.engine import Engine
from dsyolo.engine.offload import move_to_folders
from dsyolo.engine.optimizer import Schedule, lr_factor, optimizer_record, parameter_groups
from dsyolo.engine.parallelize import Parallelized, parallelize
from dsyolo.engine.partitions import Partitions
from dsyolo.engine.warmup_schedule import AnySchedule, WarmupSchedule
from dsyolo.models.blocks import freeze_batchnorm
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.registry import build_model
from dsyolo.models.weights import WeightsInfo, describe, load_into
from dsyolo.planner.local_hardware import bf16_warning
from dsyolo.planner.memory_estimate import RankLoad
from dsyolo.tracking.other_load import OtherLoad, threads_beside

log = logging.getLogger(__name__)


class EngineParts(NamedTuple):
    """The parts that train on this rank, and the load that it was given."""

    engine: Engine
    partitions: Partitions
    ema: Ema
    checkpointer: Checkpointer
    info: WeightsInfo
    load: RankLoad
    optimizer_record: dict[str, Any]  # the optimizer as it runs


def build_network(spec: RunSpec, checkpoint: Path | None = None) -> tuple[DetectionNetwork, str]:
    """Build the network with its first weights; return it and what was taken from a weights file.

    A resumed run gets its weights from the checkpoint later, but its anchors now: targets and loss need them.
    """
    config = spec.config
    torch.manual_seed(config.seed)  # for the first weights; all ranks then take those of rank 0
    network = build_model(config.model, spec.data.num_classes)
    taken = ""
    if checkpoint:
        saved = named_buffers(network, read_buffers(checkpoint))
        network.anchors.copy_(saved[f"{network.head}.anchors"])
    elif config.weights:
        names = spec.data.names if config.transfer_classes else ()
        taken = load_into(network, Path(config.weights), spec.weights, names)
    return network, taken


def build_engine(
    spec: RunSpec, world: World, network: DetectionNetwork, sampler: StepSampler, other_load: OtherLoad
) -> EngineParts:
    """Build the engine around the network, and what keeps its state."""
    config, ds = spec.config, spec.ds
    threads = _set_threads(world, config.threads, other_load)
    network.checkpointed = spec.activations.checkpointed
    network.offload_inputs = ds.parallelism.offload.activations
    num_parameters = sum(p.numel() for p in network.parameters())
    loss = DetectionLoss(network.anchors, network.num_classes, config.imgsz, config.recipe)
    schedule = build_schedule(spec, sampler)
    record = optimizer_record(ds.optimizer, schedule.lr, schedule.weight_decay, parameter_groups(network))
    info = describe(network, spec.data.names, config.imgsz)
    if config.freeze_batchnorm:
        freeze_batchnorm(network)
    parallelized = parallelize(
        network,
        loss,
        schedule,
        ds,
        world,
        image_size_px=config.imgsz,
        statistics_move=not (config.freeze_batchnorm or config.sync_batchnorm),
        sync_batchnorm=config.sync_batchnorm,
        activations=spec.activations,
    )
    engine, partitions = parallelized.engine, parallelized.partitions
    ema: Ema = NoEma(partitions, engine.buffers)
    if config.ema:
        ema = Ema(partitions, engine.buffers, config.ema_decay, config.ema_tau)
    if any(ds.parallelism.offload.folders):
        move_to_folders(ds.parallelism.offload.folders, engine.ds_engine, partitions, ema.tensors, world)
    checkpoints = spec.folder / "checkpoints"
    checkpointer = Checkpointer(checkpoints, engine, partitions, ema, world, keep=config.keep_checkpoints)
    if world.is_main_process:
        lines = [
            *spec.notes,
            f"{config.model}: {num_parameters:,} parameters",
            *_explain(spec, schedule, sampler.epoch_start_step(config.epochs)),
            *parallelized.lines,
            f"device: {engine.device}, {threads}",
            *idle_gpus(world, torch.cuda.device_count() if engine.device.type == "cuda" else 0),
        ]
        log.info("%s", "\n".join(lines))
        slow = bf16_warning(ds.precision, ds.zero_stage, engine.device.type, world.local_rank)
        for warning in filter(None, (slow, schedule_warning(spec, schedule, sampler))):
            log.warning("%s", warning)
    load = _rank_load(spec, world, parallelized)
    return EngineParts(engine, partitions, ema, checkpointer, info, load, record)


def idle_gpus(world: World, num_gpus: int) -> list[str]:
    """Return the line on GPUs that a run without a launcher leaves idle; `num_gpus`: those that it sees."""
    if world.size > 1 or num_gpus < 2:
        return []
    all_of_them = f"all: deepspeed --num_gpus {num_gpus} dsyolo/train.py with the same options"
    return [f"1 of {num_gpus} GPUs is used ({all_of_them}; CUDA_VISIBLE_DEVICES=N chooses one)"]


def _set_threads(world: World, chosen: int | None, other_load: OtherLoad) -> str:
    """Set the threads of this rank, on a CPU beside the load of others since the start; return a line about them."""
    load = 0.0 if pins_memory() else other_load.take() or 0.0
    threads = set_threads(world, chosen or threads_beside(load, world))
    text = f"{counted(threads, 'thread')} a rank"
    if chosen or threads == cores_of_rank(world):
        return text
    busy = f"other programs keep {load:.1f} of {other_load.num_cores} cores busy"
    return f"{text}, as {busy} (--threads N fixes them)"


def build_schedule(spec: RunSpec, sampler: StepSampler) -> AnySchedule:
    """Build the schedule over the whole run; the warm-up is counted in images, so the batch does not change it."""
    recipe, optimizer = spec.config.recipe, spec.ds.optimizer
    is_scaled = recipe.lr_scaling != "none"
    warmup_images = max(recipe.warmup_epochs * sampler.num_images, recipe.warmup_min_images)
    total_steps = sampler.epoch_start_step(spec.schedule_epochs)
    warmup_steps = max(round(warmup_images / sampler.global_batch), int(is_scaled))
    if spec.ds.scheduler:
        return warmup_schedule(spec.ds.scheduler, optimizer, total_steps, warmup_steps, sampler.global_batch)
    return Schedule(
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        lr=optimizer.lr * lr_factor(recipe.lr_scaling, sampler.global_batch),
        lrf=recipe.lrf,
        shape=recipe.schedule,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay_at(sampler.global_batch),
        warmup_bias_lr=recipe.warmup_bias_lr,
        warmup_momentum=recipe.warmup_momentum,
        is_adam=optimizer.is_adam,
    )


def schedule_warning(spec: RunSpec, schedule: AnySchedule, sampler: StepSampler) -> str:
    """Return what part of the run cannot learn. An extended run has more steps than its schedule."""
    return replace(schedule, total_steps=sampler.epoch_start_step(spec.config.epochs)).warning()


def warmup_schedule(
    given: SchedulerSpec, optimizer: OptimizerSpec, total_steps: int, warmup_steps: int, global_batch: int
) -> WarmupSchedule:
    """Return the JSON's schedule; `warmup_steps` and `total_steps` are taken where it leaves them open."""
    params = given.params
    lr = params.get("warmup_max_lr") or optimizer.lr
    return WarmupSchedule(
        given.type,
        total_steps=total_steps,
        warmup_steps=params["warmup_num_steps"] or max(1, warmup_steps),
        decay_steps=params.get("total_num_steps") or total_steps,
        lr=lr,
        min_lr=params.get("warmup_min_lr", lr * params.get("warmup_min_ratio", 0.0)),
        floor=params.get("cos_min_ratio", 0.0),
        is_log=params["warmup_type"] == "log",
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay_at(global_batch),
        is_adam=optimizer.is_adam,
    )


def _explain(spec: RunSpec, schedule: AnySchedule, total_steps: int) -> list[str]:
    """Return the lines for the start of a run: how it runs, what is learned at which rate. An extended one has more steps."""
    ds, scaling = spec.ds, spec.config.recipe.lr_scaling
    lines = [*ds.explain(), spec.activations.explain(), replace(schedule, total_steps=total_steps).explain()]
    if scaling != "none" and not ds.scheduler:
        times = schedule.lr / ds.optimizer.lr
        what = f"{times:g} times the JSON's for {ds.global_batch} images ({scaling})"
        lines.append(f"lr: {schedule.lr:g}, {what}")
    lines += extension(spec, schedule, total_steps)
    if spec.config.sync_batchnorm:
        lines.append(f"BatchNorm: synchronised, over {ds.micro_batch * ds.dp_size} images")
    return lines


def extension(spec: RunSpec, schedule: AnySchedule, total_steps: int) -> list[str]:
    """Return the line of an extended run, with the rates that it trains at after its schedule; none for other runs."""
    if spec.schedule_epochs >= spec.config.epochs:
        return []
    first, last = (f"{schedule.warmed_lr_at(step):.3g}" for step in (schedule.total_steps, total_steps - 1))
    lr = first if first == last else f"{first} to {last}, as the warm-up goes on"
    end = f"the end of its schedule over {spec.schedule_epochs} epochs"
    return [f"extended to {spec.config.epochs} epochs: lr {lr}, {end}"]


def _rank_load(spec: RunSpec, world: World, parallelized: Parallelized) -> RankLoad:
    """Return what this rank trains, for the memory estimate."""
    ds, plan, nodes = spec.ds, spec.activations, parallelized.nodes
    place = parallel_dims(world, ds.stages)
    in_flight = min(ds.stages - place.pp_rank, ds.accumulation)
    kept, plain, least = (
        plan.stage_bytes(nodes, in_flight, names) for names in (None, frozenset[str](), plan.counted.blocks)
    )
    on_host = plan.host_bytes(nodes, in_flight)
    return RankLoad(
        parallelized.groups, kept, plain, least, place.dp_rank, place.dp_size, spec.config.ema, on_host
    )
