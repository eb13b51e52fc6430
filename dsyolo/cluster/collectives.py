"""The few collectives that dsyolo uses itself, and agreement between ranks."""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist

from dsyolo.base.errors import UserError
from dsyolo.cluster.preemption import Preempted
from dsyolo.cluster.world import World

T = TypeVar("T")


def barrier() -> None:
    """Wait for all ranks."""
    torch_dist.barrier()


def all_reduce_sum(tensor: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum `tensor` in place over the ranks of `group` (default: all) and return it. No wait on an accelerator."""
    if torch_dist.get_world_size(group) > 1:
        torch_dist.all_reduce(tensor, group=group)
    return tensor


def broadcast(tensor: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> None:
    """Overwrite `tensor` by that of the first rank of `group` (default: all)."""
    if torch_dist.get_world_size(group) > 1:
        torch_dist.broadcast(tensor, group=group, group_src=0)


def all_gather_objects(item: Any) -> list[Any]:
    """Return every rank's item on every rank, in the order of ranks. Items are our own, never a file's."""
    if torch_dist.get_world_size() == 1:
        return [item]
    accelerator = None if torch_dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    device = torch.device("cpu")
    if accelerator:
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
    payload = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(sizes, torch.tensor([payload.numel()], device=device))
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in lengths]
    torch_dist.all_gather(parts, padded)
    items = (part[:length].cpu().numpy() for part, length in zip(parts, lengths, strict=True))
    return [pickle.loads(item.tobytes()) for item in items]


def run_on_rank0_and_broadcast(world: World, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only. Return its small result, or raise its UserError, on all ranks."""
    result = all_ranks_or_raise(lambda: work() if world.is_main_process else None)
    return all_gather_objects(result)[0]


def first_problem_of_any_rank(problem: str | None) -> str | None:
    """Return the problem of the first rank that has one; the same on all ranks."""
    return next(filter(None, all_gather_objects(problem)), None)


def all_ranks_or_raise(work: Callable[[], T]) -> T:
    """Run `work` on every rank. If it raises a UserError on one, raise that on all."""
    results, problem = [], None
    try:
        results.append(work())
    except UserError as error:
        problem = error.headline, error.problems, error.status
    for found in filter(None, all_gather_objects(problem)):
        raise UserError(*found)
    return results[0]


class ClusterCommunicator:
    """One rank's view of all ranks that read a data set together (data/parallel_map.py), over gloo.

    Args:
        at: called with where this rank is whenever it makes progress.
        requested: returns an exit status if this rank was asked to stop, else 0; `exchange` then raises Preempted on
            all ranks.
        timeout: of an exchange; None: gloo's own.
    """

    exchange_every_s = 2.0

    def __init__(
        self,
        world: World,
        at: Callable[[str], None],
        requested: Callable[[], int],
        timeout: timedelta | None = None,
    ) -> None:
        self.rank, self.size, self.at = world.rank, world.size, at
        self.keeps_cache = world.local_rank == 0
        self._requested = requested
        self._group = torch_dist.new_group(backend="gloo", timeout=timeout) if world.size > 1 else None

    def exchange(self, item: Any) -> list[Any]:
        """Return every rank's item, in the order of ranks. Items are our own, never a file's."""
        gathered = [(self._requested(), item)] * self.size
        if self._group:
            torch_dist.all_gather_object(gathered, gathered[0], group=self._group)
        if status := max(requested for requested, _ in gathered):
            raise Preempted(status)
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
