"""Applies the parallel techniques that the DeepSpeed JSON asks for to a network, in one order."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from dsyolo.cluster.world import ParallelDims, World, parallel_dims
from dsyolo.config.deepspeed.config import DeepSpeedConfig
from dsyolo.engine.batchnorm import synchronise_batchnorm
from dsyolo.engine.device import pins_memory
from dsyolo.engine.engine import Engine
from dsyolo.engine.optimizer import Schedule, build_optimizer
from dsyolo.engine.partitions import Partitions
from dsyolo.engine.pipeline import PipelineEngine, StagePartitions
from dsyolo.models.activation_memory import ActivationPlan, count_activations
from dsyolo.models.flops import node_costs
from dsyolo.models.network import Network
from dsyolo.models.partition import ACCELERATOR, CPU, balanced_cuts, stage_table
from dsyolo.models.stage import PipelineStage


class Parallelized(NamedTuple):
    """The engine of this rank, its partitions of the parameters, and lines that describe them."""

    engine: Engine
    partitions: Partitions
    nodes: tuple[str, ...]  # of the network, on this rank
    groups: tuple[tuple[int, ...], ...]  # elements of each parameter on this rank, in the optimizer's groups
    lines: list[str]


def parallelize(
    network: Network,
    loss: nn.Module,
    schedule: Schedule,
    ds: DeepSpeedConfig,
    world: World,
    *,
    image_size_px: int,
    statistics_move: bool,
    sync_batchnorm: bool = False,
    activations: ActivationPlan | None = None,
) -> Parallelized:
    """Apply the parallel techniques to `network`, which all ranks built from the same seed.

    The order:

    1. Activation checkpointing is a flag on nodes (`network.checkpointed`), which the caller has set.
    2. Pipeline: the network is cut into stages, and this rank keeps one. The others go to the meta device.
    3. Optimizer: over what this rank trains, so after the cut.
    4. DeepSpeed: ZeRO, mixed precision and offload to host memory, all in `deepspeed.initialize`; data parallelism
       is its part too. Nothing may replace a parameter after it.
    5. Synchronised BatchNorm: over the replicas, which the engine knows.
    6. Partitions: this rank's fp32 masters. The EMA is made of them, and after it the caller may move both into files
       (`offload.move_to_folders`).

    Args:
        statistics_move: BatchNorm's statistics follow each rank's own batches, and so must be averaged.
        activations: which activations are checkpointed, for the table of stages; counted here if not given.
    """
    place = parallel_dims(world, ds.stages)
    pipeline = _cut_into_stages(network, ds, place, image_size_px, activations) if ds.stages > 1 else None
    module: nn.Module = pipeline.stage if pipeline else network

    optimizer = build_optimizer(module, ds.optimizer.type, ds.optimizer.params)
    groups = _group_sizes(optimizer)  # before ZeRO 3 takes the parameters apart

    num_parameters = sum(p.numel() for p in network.parameters())
    settings: dict[str, Any] = {
        "deepspeed_json": ds.deepspeed_json(num_parameters, cpu=not pins_memory()),
        "world": world,
        "accumulation": ds.accumulation,
        "statistics_move": statistics_move,
    }
    engine: Engine
    if pipeline:
        engine = PipelineEngine(module, pipeline.whole, loss, optimizer, schedule, place=place, **settings)
    else:
        engine = Engine(module, loss, optimizer, schedule, **settings)
    if sync_batchnorm:
        synchronise_batchnorm(engine.network, engine.dp_group)
    partitions = StagePartitions(engine) if isinstance(engine, PipelineEngine) else Partitions(engine)

    nodes, lines = (pipeline.nodes, pipeline.lines) if pipeline else (network.order, [])
    return Parallelized(engine, partitions, nodes, groups, lines)


class _Pipeline(NamedTuple):
    stage: PipelineStage  # this rank's
    whole: nn.Module  # on the meta device
    nodes: tuple[str, ...]  # of the stage
    lines: list[str]  # the table of all stages


def _cut_into_stages(
    network: Network,
    ds: DeepSpeedConfig,
    place: ParallelDims,
    image_size_px: int,
    activations: ActivationPlan | None,
) -> _Pipeline:
    whole = copy.deepcopy(network).to("meta")
    shape = (ds.micro_batch, 3, image_size_px, image_size_px)
    costs = node_costs(whole, shape)
    balance = ACCELERATOR if pins_memory() else CPU
    cuts = (
        balanced_cuts(costs, ds.stages, balance)
        if ds.parallelism.partition == "balanced"
        else ds.parallelism.partition
    )
    bounds = [0, *cuts, len(costs)]
    start, stop = bounds[place.pp_rank : place.pp_rank + 2]
    nodes = network.order[start:stop]
    stage = PipelineStage(network, start, stop, costs[start - 1].boundary if start else ())
    for name in set(network.order) - set(nodes):
        network.get_submodule(name).to("meta")  # other ranks have them
    plan = activations or ActivationPlan(count_activations(whole, shape, ds.precision), network.checkpointed)
    kept = [plan.stage_bytes(network.order[first:last]) for first, last in pairwise(bounds)]
    table = stage_table(costs, cuts, balance, ds.precision.compute_bytes, kept)
    return _Pipeline(stage, whole, nodes, table.splitlines())


def _group_sizes(optimizer: torch.optim.Optimizer) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups)
