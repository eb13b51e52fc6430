"""A training on many ranks, on paper: the samples, memory, traffic and checkpoints of every rank.

Each figure comes from the code that trains: `StepSampler`, `DeepSpeedConfig`, `predict`, `comm_bytes`, `balanced_owners`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsyolo.cluster.world import balanced_owners
from dsyolo.config.deepspeed.config import check
from dsyolo.data.sampler import StepSampler
from dsyolo.engine.optimizer import parameter_groups
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.registry import meta_network
from dsyolo.planner.comm_volume import comm_bytes
from dsyolo.planner.memory_estimate import RankLoad, predict

STATES_SAVED = 3  # fp32 weights, momentum and EMA of every parameter


class Coverage(NamedTuple):
    """How often the samplers of all ranks give an image in the steps that touch the first epoch."""

    steps: int
    least: int
    most: int


class SimulatedScale(NamedTuple):
    """A ZeRO stage on a number of ranks, in bytes.

    Attributes:
        states: of parameters, gradients, optimizer and EMA: of the least and the most loaded rank.
        formula: the ZeRO paper's states, plus the EMA and the vectors that ZeRO 3 keeps whole.
        sent: in a step.
        saved: of a checkpoint, written by the least and the most loaded rank.
    """

    ranks: int
    zero_stage: int
    global_batch: int
    coverage: Coverage
    states: tuple[int, int]
    formula: float
    buckets: int
    sent: int
    sent_formula: float
    saved: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "coverage": self.coverage._asdict()}


def simulate(
    model: str, num_classes: int, num_images: int, ranks: Sequence[int], global_batch: int, micro_batch: int
) -> list[SimulatedScale]:
    """Simulate ZeRO 0 to 3 with fp32 weights on each number of ranks. Round the batch up to whole micro-batches."""
    network = meta_network(model, num_classes)
    found = []
    for num in ranks:
        batch = math.ceil(global_batch / (num * micro_batch)) * num * micro_batch
        coverage = cover(num_images, batch, micro_batch, num)
        saved = _saved(network, num)
        found += [_simulate(network, stage, num, batch, micro_batch, coverage, saved) for stage in range(4)]
    return found


def cover(num_images: int, global_batch: int, micro_batch: int, ranks: int) -> Coverage:
    """Count how often each image of epoch 0 comes, over the samplers of all ranks."""
    counts = np.zeros(num_images, np.int64)
    samplers = [StepSampler(num_images, 0, global_batch, micro_batch, rank, ranks) for rank in range(ranks)]
    steps = samplers[0].epoch_start_step(1)
    for sampler in samplers:
        groups = (group for step in range(steps) for group in sampler.micro_batches(step))
        np.add.at(counts, [index for group in groups for epoch, index in group if epoch == 0], 1)
    return Coverage(steps, int(counts.min()), int(counts.max()))


def _simulate(
    network: DetectionNetwork,
    stage: int,
    ranks: int,
    batch: int,
    micro_batch: int,
    coverage: Coverage,
    saved: tuple[int, int],
) -> SimulatedScale:
    source = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": stage},
    }
    ds = check(source, world_size=ranks, accelerator="cuda")
    numels = [p.numel() for p in network.parameters()]
    elements = sum(numels)
    zero = ds.deepspeed_json(elements, cpu=False)["zero_optimization"]
    groups = tuple(tuple(p.numel() for p in group) for group in parameter_groups(network).values() if group)
    loads = [RankLoad(groups, 0, 0, 0, dp_rank, ranks, True) for dp_rank in (0, ranks // 2, ranks - 1)]
    estimates = [predict(load, ds, zero) for load in loads]
    states = [estimate.combined.states for estimate in estimates]
    passes = {2: 1 + ds.accumulation, 3: 3 * ds.accumulation}.get(stage, 2)
    return SimulatedScale(
        ranks,
        stage,
        batch,
        coverage,
        (min(states), max(states)),
        _formula(stage, numels, ranks, zero),
        estimates[0].device.buckets,
        int(comm_bytes(zero, numels, ranks, ds.accumulation)),
        passes * (ranks - 1) / ranks * 4 * elements,
        saved,
    )


def _formula(stage: int, numels: Sequence[int], ranks: int, zero: dict[str, Any]) -> float:
    """Return the bytes of states with SGD's momentum in fp32 and a sharded EMA.

    ZeRO 3 adds the vectors that stay whole, each padded to a multiple of the ranks.
    """
    elements = sum(numels)
    whole = (12, 8, 4, 0)[stage] * elements
    sharded = (4, 12, 16, 20)[stage] * elements / ranks
    if stage == 3:
        threshold = zero["stage3_param_persistence_threshold"]
        whole = 4 * sum(math.ceil(numel / ranks) * ranks for numel in numels if numel <= threshold)
    return whole + sharded


def _saved(network: DetectionNetwork, ranks: int) -> tuple[int, int]:
    """Return the least and the most bytes of a checkpoint's tensors that a rank writes."""
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    loads: Counter[int] = Counter()
    for name, rank in balanced_owners(list(sizes.items()), ranks).items():
        loads[rank] += 4 * STATES_SAVED * sizes[name]
    return min(loads.values()) if len(loads) == ranks else 0, max(loads.values())
