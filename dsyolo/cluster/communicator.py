"""The communicator by which all ranks read a data set together (data/parallel_map.py): over gloo, on the host."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as torch_dist

from dsyolo.cluster.preemption import Preempted
from dsyolo.cluster.world import World


class ClusterCommunicator:
    """One rank's end of it.

    Args:
        at: called with where this rank is whenever it makes progress.
        asked: whether this rank was asked to stop; then `exchange` raises Preempted on all ranks.
        timeout: of an exchange; None: gloo's own.
    """

    exchange_every_s = 2.0

    def __init__(
        self,
        world: World,
        at: Callable[[str], None],
        asked: Callable[[], bool],
        timeout: timedelta | None = None,
    ) -> None:
        self.rank, self.size, self.at = world.rank, world.size, at
        self.keeps_cache = world.local_rank == 0
        self._asked = asked
        self._group = torch_dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    def exchange(self, item: Any) -> list[Any]:
        """Return every rank's item, in the order of ranks. Items are our own, never a file's."""
        gathered = [(self._asked(), item)] * self.size
        if self._group:
            torch_dist.all_gather_object(gathered, gathered[0], group=self._group)
        if any(asked for asked, _ in gathered):
            raise Preempted
        return [item for _, item in gathered]

    def broadcast(self, rank: int, item: Any) -> Any:
        """Return that rank's item on all ranks."""
        items = [item]
        if self._group:
            torch_dist.broadcast_object_list(items, rank, group=self._group)
        return items[0]

    def close(self) -> None:
        if self._group:
            torch_dist.destroy_process_group(self._group)
