"""Spreads a network over the ranks as the DeepSpeed JSON says: whole on each, or cut into stages."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from dsyolo.cluster.world import World, parallel_dims
from dsyolo.config.deepspeed.config import DeepSpeedConfig
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
    """The engine of this rank, what it owns of the parameters, and what there is to say about it."""

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
    activations: ActivationPlan | None = None,
) -> Parallelized:
    """Builds optimizer and engine around `network`, which all ranks built from the same seed.

    Args:
        activations: what is recomputed, for the table of stages; counted here where it is not given.
    """
    settings = {
        "deepspeed_json": ds.deepspeed_json(
            sum(p.numel() for p in network.parameters()), cpu=not pins_memory()
        ),
        "world": world,
        "accumulation": ds.accumulation,
        "statistics_move": statistics_move,
    }
    if ds.stages == 1:
        optimizer = build_optimizer(network, ds.optimizer.type, ds.optimizer.params)
        groups = _sizes(optimizer)  # ZeRO 3 takes the parameters apart
        engine = Engine(network, loss, optimizer, schedule, **settings)
        return Parallelized(engine, Partitions(engine), network.order, groups, [])
    whole = copy.deepcopy(network).to("meta")
    shape = (ds.micro_batch, 3, image_size_px, image_size_px)
    costs = node_costs(whole, shape)
    balance = ACCELERATOR if pins_memory() else CPU
    cuts = (
        balanced_cuts(costs, ds.stages, balance)
        if ds.parallelism.partition == "balanced"
        else ds.parallelism.partition
    )
    place = parallel_dims(world, ds.stages)
    bounds = [0, *cuts, len(costs)]
    start, stop = bounds[place.pp_rank : place.pp_rank + 2]
    stage = PipelineStage(network, start, stop, costs[start - 1].boundary if start else ())
    for name in set(network.order) - set(network.order[start:stop]):
        network.get_submodule(name).to("meta")  # other ranks have them
    optimizer = build_optimizer(stage, ds.optimizer.type, ds.optimizer.params)
    groups = _sizes(optimizer)
    pipeline = PipelineEngine(stage, whole, loss, optimizer, schedule, place=place, **settings)
    plan = activations or ActivationPlan(count_activations(whole, shape, ds.precision), network.recompute)
    kept = [plan.stage_bytes(network.order[first:last]) for first, last in pairwise(bounds)]
    table = stage_table(costs, cuts, balance, ds.precision.compute_bytes, kept)
    nodes = network.order[start:stop]
    return Parallelized(pipeline, StagePartitions(pipeline), nodes, groups, table.splitlines())


def _sizes(optimizer: torch.optim.Optimizer) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups)
