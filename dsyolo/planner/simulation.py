"""A training on many ranks, on paper: the stream of samples, shares of memory, traffic and checkpoints of every rank.

Each figure comes out of the code that trains: `StepSampler`, `DeepSpeedConfig`, `predict`, `comm_bytes`, `balanced_owners`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dsyolo.cluster.world import balanced_owners
from dsyolo.config.deepspeed.config import check
from dsyolo.data.sampler import StepSampler
from dsyolo.engine.optimizer import parameter_groups
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.registry import build_model
from dsyolo.planner.comm_volume import comm_bytes
from dsyolo.planner.memory_estimate import RankLoad, predict

KINDS_SAVED = 3  # fp32 weights, momentum and EMA of every parameter


class Coverage(NamedTuple):
    """What the ranks' samplers give in the steps that touch the first epoch."""

    steps: int
    least: int  # times that an image of the epoch came
    most: int


class Scale(NamedTuple):
    """A ZeRO stage on a number of ranks."""

    ranks: int
    zero_stage: int
    global_batch: int
    coverage: Coverage
    states: tuple[
        int, int
    ]  # bytes of parameters, gradients, optimizer and EMA: of the least and most loaded rank
    formula: float  # the ZeRO paper's, with the average, and the vectors that ZeRO 3 keeps whole
    buckets: int
    sent: int  # bytes of a step
    sent_formula: float
    saved: tuple[int, int]  # bytes of a checkpoint that the least and the most loaded rank write

    def to_json(self) -> dict[str, Any]:
        """Flat, in bytes."""
        return {**self._asdict(), "coverage": self.coverage._asdict()}


def simulate(
    model: str, num_classes: int, num_images: int, ranks: Sequence[int], global_batch: int, micro_batch: int
) -> list[Scale]:
    """Of every number of ranks, ZeRO 0 to 3 in fp32 weights.

    Args:
        global_batch: rounded up to a micro-batch for each rank, or several.
    """
    with torch.device("meta"):
        network = build_model(model, num_classes)
    found = []
    for num in ranks:
        batch = -(-global_batch // (num * micro_batch)) * num * micro_batch
        coverage = cover(num_images, batch, micro_batch, num)
        saved = _saved(network, num)
        found += [_scale(network, stage, num, batch, micro_batch, coverage, saved) for stage in range(4)]
    return found


def cover(num_images: int, global_batch: int, micro_batch: int, ranks: int) -> Coverage:
    """Asks the sampler of every rank what it gives, and counts how often each image of epoch 0 comes."""
    counts = np.zeros(num_images, np.int64)
    steps = StepSampler(num_images, 0, global_batch, micro_batch, 0, ranks).epoch_start_step(1)
    for rank in range(ranks):
        stream = StepSampler(num_images, 0, global_batch, micro_batch, rank, ranks)
        drawn = [
            index
            for step in range(steps)
            for group in stream.micro_batches(step)
            for epoch, index in group
            if epoch == 0
        ]
        np.add.at(counts, drawn, 1)
    return Coverage(steps, int(counts.min()), int(counts.max()))


def _scale(
    network: DetectionNetwork,
    stage: int,
    ranks: int,
    batch: int,
    micro_batch: int,
    coverage: Coverage,
    saved: tuple[int, int],
) -> Scale:
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
    accounts = [
        predict(RankLoad(groups, 0, 0, 0, dp_rank, ranks, True), ds, zero)
        for dp_rank in (0, ranks // 2, ranks - 1)
    ]
    states = [account.together.states for account in accounts]
    sent = comm_bytes(zero, numels, ranks, ds.accumulation)
    ring = (ranks - 1) / ranks * 4 * elements
    times = {2: 1 + ds.accumulation, 3: 3 * ds.accumulation}.get(stage, 2)
    return Scale(
        ranks,
        stage,
        batch,
        coverage,
        (min(states), max(states)),
        _formula(stage, numels, ranks, zero),
        accounts[0].device.buckets,
        int(sent),
        times * ring,
        saved,
    )


def _formula(stage: int, numels: Sequence[int], ranks: int, zero: dict[str, Any]) -> float:
    """Bytes of states: SGD with momentum, fp32, the average shared.

    Of ZeRO 3 with the vectors that stay whole, each filled up to a multiple of the ranks.
    """
    elements = sum(numels)
    whole = {0: 12, 1: 8, 2: 4, 3: 0}[stage] * elements
    shared = {0: 4, 1: 12, 2: 16, 3: 20}[stage] * elements / ranks
    if stage == 3:
        threshold = zero["stage3_param_persistence_threshold"]
        whole = 4 * sum(math.ceil(numel / ranks) * ranks for numel in numels if numel <= threshold)
    return whole + shared


def _saved(network: DetectionNetwork, ranks: int) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors by the rank that writes them: whole names go to the rank with the least."""
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    loads: Counter[int] = Counter()
    for name, rank in balanced_owners(list(sizes.items()), ranks).items():
        loads[rank] += 4 * KINDS_SAVED * sizes[name]
    return min(loads.values()) if len(loads) == ranks else 0, max(loads.values())
