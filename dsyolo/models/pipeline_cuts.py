"""Cuts a network into pipeline stages, balanced by counted work and communication.

Not by parameters: a detector has those at stride 32, and its work at strides 2 to 8.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from dsyolo.models.flops import NodeCost


class Balance(NamedTuple):
    """The cost of memory and communication on a kind of device, in FLOPs of a forward pass."""

    per_element: float  # reading or writing an element
    per_boundary: float  # sending an element to the next stage, and its gradient back


# Fitted to forward and backward of every node of yolov5s, 4 x 320 px, one thread of an AMD EPYC, 2026-11-23:
# 20.4 in fp32, 20.1 in bf16 autocast (benchmarks/pipeline.py); boundaries by gloo at 1.5 GB/s, 28 GFLOP/s.
CPU = Balance(20, 150)
# From data sheets, not measured: H100 SXM at 400 TFLOP/s of 990, 3.35 TB/s, NVLink at 300 GB/s, bf16.
ACCELERATOR = Balance(200, 1800)


def balanced_cuts(costs: Sequence[NodeCost], stages: int, balance: Balance) -> tuple[int, ...]:
    """Return the cuts that make the slowest stage fastest; among equals, those with the least communication.

    Args:
        costs: of the network's nodes, at the size and batch that will be trained.
        stages: at least 1, at most as many as there are nodes with parameters.

    Returns:
        The index of the first node of every stage but the first.
    """
    num = len(costs)
    works = [cost.flops + balance.per_element * cost.elements for cost in costs]
    boundary = [0.0, *(balance.per_boundary * boundary_elements(costs, i) for i in range(1, num)), 0.0]

    @cache
    def best(start: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Return (cost of the slowest stage, cost of all boundaries, cuts) of the nodes from `start` in `left` stages."""
        if left == 1:
            own = sum(works[start:]) + boundary[start] if _has_parameters(costs[start:]) else math.inf
            return own, 0.0, ()
        choices: list[tuple[float, float, tuple[int, ...]]] = [(math.inf, 0.0, ())]
        for stop in range(start + 1, num - left + 2):
            if _has_parameters(costs[start:stop]):
                own = sum(works[start:stop]) + boundary[start] + boundary[stop]
                slowest, sent, cuts = best(stop, left - 1)
                choices.append((max(own, slowest), boundary[stop] + sent, (stop, *cuts)))
        return min(choices)

    return best(0, stages)[2]


def boundary_elements(costs: Sequence[NodeCost], cut: int) -> int:
    """Return the number of elements that one micro-batch sends over the boundary before node `cut`."""
    return sum(math.prod(shape) for shape in costs[cut - 1].boundary)


def stage_table(
    costs: Sequence[NodeCost],
    cuts: Sequence[int],
    balance: Balance,
    bytes_each: int,
    activations: Sequence[int],
) -> str:
    """Return a table of what each stage holds, computes and sends for a micro-batch.

    Args:
        bytes_each: size of an element of the boundary activations.
        activations: bytes that autograd keeps in each stage.
    """
    bounds = [0, *cuts, len(costs)]
    works = [cost.flops + balance.per_element * cost.elements for cost in costs]
    lines = ["stage  layers              parameters   work   GFLOP  activations MiB  sent on MiB"]
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        part = costs[start:stop]
        layers = f"{start}-{stop - 1} {part[0].name}..{part[-1].name}"
        sent = boundary_elements(costs, stop) * bytes_each / 2**20 if stop < len(costs) else 0.0
        lines.append(
            f"{stage:5d}  {layers:18s}{sum(c.num_parameters for c in part):12,}  {sum(works[start:stop]) / sum(works):5.1%}"
            f"  {sum(c.flops for c in part) / 1e9:6.2f}  {activations[stage] / 2**20:15.1f}"
            f"  {sent:11.1f}"
        )
    return "\n".join(lines)


def _has_parameters(costs: Sequence[NodeCost]) -> bool:
    return any(cost.num_parameters for cost in costs)
