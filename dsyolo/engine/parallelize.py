"""Applies the parallel techniques that the DeepSpeed JSON asks for to a network, in one order."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from dsyolo.cluster.world import ParallelDims, World, parallel_dims
from dsyolo.config.deepspeed.config import DeepSpeedConfig
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine.batchnorm import synchronise_batchnorm
from dsyolo.engine.device import pins_memory
from dsyolo.engine.engine import Engine
from dsyolo.engine.optimizer import build_optimizer
from dsyolo.engine.partitions import Partitions
from dsyolo.engine.pipeline import PipelineEngine, StagePartitions
from dsyolo.engine.warmup_schedule import AnySchedule
from dsyolo.models.activation_memory import ActivationPlan, count_activations
from dsyolo.models.flops import node_costs
from dsyolo.models.network import Network, PipelineStage
from dsyolo.models.pipeline_cuts import ACCELERATOR, CPU, balanced_cuts, stage_table


class Parallelized(NamedTuple):
    """The engine of this rank, its partitions of the parameters, and lines that describe the stages."""

    engine: Engine
    partitions: Partitions
    nodes: tuple[str, ...]  # the network's nodes on this rank
    groups: tuple[tuple[int, ...], ...]  # elements of each parameter on this rank, in the optimizer's groups
    lines: list[str]


def parallelize(
    network: Network,
    loss: DetectionLoss,
    schedule: AnySchedule,
    ds: DeepSpeedConfig,
    world: World,
    *,
    image_size_px: int,
    statistics_move: bool,
    sync_batchnorm: bool = False,
    activations: ActivationPlan | None = None,
) -> Parallelized:
    """Apply the parallel techniques, in this order, to `network`, which all ranks built from the same seed.

    1. Activation checkpointing is a flag on nodes (`network.checkpointed`), which the caller has set.
    2. Pipeline: the network is cut into stages, and this rank keeps one. The others go to the meta device.
    3. Optimizer: over what this rank trains, so after the cut.
    4. DeepSpeed: ZeRO, data parallelism, mixed precision and offload to host memory, all in `deepspeed.initialize`.
       Nothing may replace a parameter after it.
    5. Synchronised BatchNorm: over the data-parallel ranks, which the engine knows.
    6. Partitions: this rank's fp32 masters. The caller makes the EMA of them, and may move both into files
       (`offload.move_to_folders`).

    Args:
        statistics_move: BatchNorm's statistics follow each rank's own batches, and so must be averaged.
        activations: which activations are checkpointed, for the table of stages; counted here if not given.
    """
    place = parallel_dims(world, ds.stages)
    module: nn.Module = network
    make_engine: Callable[..., Engine] = partial(Engine, network)
    nodes = network.order
    lines: list[str] = []
    if ds.stages > 1:
        module, whole, lines = _cut_into_stages(network, ds, place, image_size_px, activations)
        make_engine = partial(PipelineEngine, module, whole)
        nodes = network.order[module.start : module.stop]

    optimizer = build_optimizer(module, ds.optimizer.type, ds.optimizer.params)
    # Before ZeRO 3 takes the parameters apart:
    groups = tuple(tuple(p.numel() for p in group["params"]) for group in optimizer.param_groups)

    num_parameters = sum(p.numel() for p in network.parameters())
    engine = make_engine(
        loss,
        optimizer,
        schedule,
        deepspeed_json=ds.deepspeed_json(num_parameters, cpu=not pins_memory()),
        world=world,
        place=place,
        accumulation=ds.accumulation,
        statistics_move=statistics_move,
    )
    if sync_batchnorm:
        synchronise_batchnorm(engine.network, engine.dp_group)
    partitions = StagePartitions(engine) if isinstance(engine, PipelineEngine) else Partitions(engine)
    return Parallelized(engine, partitions, nodes, groups, lines)


def _cut_into_stages(
    network: Network,
    ds: DeepSpeedConfig,
    place: ParallelDims,
    image_size_px: int,
    activations: ActivationPlan | None,
) -> tuple[PipelineStage, nn.Module, list[str]]:
    """Return this rank's stage, the whole network on the meta device, and the table of all stages."""
    whole = copy.deepcopy(network).to("meta")
    shape = (ds.micro_batch, 3, image_size_px, image_size_px)
    costs = node_costs(whole, shape)
    balance = ACCELERATOR if pins_memory() else CPU
    partition = ds.parallelism.partition
    cuts = balanced_cuts(costs, ds.stages, balance) if isinstance(partition, str) else partition
    bounds = [0, *cuts, len(costs)]
    start, stop = bounds[place.pp_rank : place.pp_rank + 2]
    stage = PipelineStage(network, start, stop, costs[start - 1].boundary if start else ())
    for name in (*network.order[:start], *network.order[stop:]):
        network.get_submodule(name).to("meta")  # other ranks have them
    plan = activations or ActivationPlan(count_activations(whole, shape, ds.precision), network.checkpointed)
    kept = [plan.stage_bytes(network.order[first:last]) for first, last in pairwise(bounds)]
    table = stage_table(costs, cuts, balance, ds.precision.compute_bytes, kept)
    return stage, whole, table.splitlines()
