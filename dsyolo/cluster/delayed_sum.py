"""Sums of all ranks on the host for which no rank waits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from dsyolo.cluster.world import World


class DelayedSum:
    """Sums whole numbers over all ranks, over gloo; each sum is read some time later, as after the next step.

    All ranks must create it together and make the same calls in the same order, so all decide alike.
    """

    def __init__(self, world: World) -> None:
        self._group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def start(self, numbers: Sequence[int]) -> None:
        """Begin the next sum; the last one must have been taken."""
        assert self._pending is None, "take() the sum under way first"
        total = torch.tensor(numbers, dtype=torch.int64)
        work = None
        if self._group:
            work = torch_dist.all_reduce(total, torch_dist.ReduceOp.SUM, group=self._group, async_op=True)
        self._pending = work, total

    def take(self) -> list[int] | None:
        """Wait for the sum under way and return it; None if there is none."""
        if self._pending is None:
            return None
        work, total = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        return [int(number) for number in total]
