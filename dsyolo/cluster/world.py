"""The world of ranks: joining it, and the few collectives that are used."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as torch_dist

from dsyolo.base.environment import Environment, export_to_torch, read_environment
from dsyolo.base.errors import UserError
from dsyolo.cluster.rendezvous import Rendezvous
from dsyolo.engine.gloo import send_only_shares

T = TypeVar("T")


class World(NamedTuple):
    """Where this process stands among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this machine

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0


class ParallelDims(NamedTuple):
    """Where a rank stands in a pipeline and among its replicas; without a pipeline there is one stage."""

    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1


def parallel_dims(world: World, stages: int) -> ParallelDims:
    """The replicas of a stage are neighbours, as in DeepSpeed: gradients are what most bytes are sent for."""
    dp_size = world.size // stages
    return ParallelDims(world.rank // dp_size, stages, world.rank % dp_size, dp_size)


def world_from_environment() -> World:
    """The world that the launcher described; of one rank where there was none. Imports and joins nothing.

    Raises:
        UserError: it did not tell everything.
    """
    return _world(read_environment())


def init_process_group(rendezvous_timeout_s: float = 300) -> World:
    """As `joined`, where nobody has to watch the ranks afterwards."""
    with process_group(rendezvous_timeout_s) as world:
        return world


@contextlib.contextmanager
def process_group(rendezvous_timeout_s: float = 300) -> Iterator[World]:
    """Starts the process group that DeepSpeed uses, alone or as the launcher said.

    Inside, the ranks' meeting still watches them: so nobody is unwatched until what watches a run has begun. Ranks wait `rendezvous_timeout_s` for each other; torchrun's agents see to that themselves.
    """
    place = read_environment()
    world = _world(place)
    is_alone = world.size == 1 and not place.under_torchrun
    if is_alone:  # nobody has to find it: the launcher's port may be another run's
        place = place._replace(master_addr="127.0.0.1", master_port=_free_port())
    export_to_torch(place, instead=is_alone)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    quiet_deepspeed()
    get_accelerator().set_device(world.local_rank)
    if not pins_memory():
        # On a CPU determinism costs nothing: without it the gradient of indexing is summed in any order.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    backend = get_accelerator().communication_backend_name()
    meeting = None
    if world.size > 1 and not place.under_torchrun:
        meeting = Rendezvous(
            world.rank,
            world.size,
            str(place.master_addr),
            place.master_port or 0,
            wait_s=rendezvous_timeout_s,
        )
        meeting.wait()
    deepspeed.init_distributed(backend, verbose=False)
    send_only_shares()
    yield world
    if meeting:
        meeting.close()


def quiet_deepspeed() -> None:
    """Leaves out what DeepSpeed would do at every start, or say at every step.

    Its shared-memory collectives are a C++ op that would be compiled at the first start; gloo needs no compiler, and a
    build that is killed leaves a lock that every later start waits for.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls some at every step, and only it can change that.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*deprecated", category=FutureWarning)


def destroy_process_group(world: World) -> None:
    """Leaves the process group, so that no rank is torn down while another still talks to it.

    Where the JSON's `comms_logger` is on, the first rank prints what it saw: DeepSpeed leaves that to the program.
    """
    from deepspeed.comm import comm as deepspeed_comm

    if deepspeed_comm.comms_logger is not None and deepspeed_comm.comms_logger.enabled:
        deepspeed_comm.log_summary()
    if world.size > 1:
        torch_dist.barrier()
    torch_dist.destroy_process_group()


def barrier() -> None:
    """Waits for all ranks."""
    torch_dist.barrier()


def all_reduce_sum(tensor: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sums `tensor` over the ranks of `group` (default: all), in place, and returns it. No wait on an accelerator."""
    if torch_dist.get_world_size(group) > 1:
        torch_dist.all_reduce(tensor, group=group)
    return tensor


def broadcast(tensor: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> None:
    """Makes `tensor` that of the first rank of `group` (default: all) on all of them, in place."""
    if torch_dist.get_world_size(group) > 1:
        torch_dist.broadcast(tensor, group=group, group_src=0)


def all_gather_objects(item: Any, device: torch.device) -> list[Any]:
    """Every rank's item, on every rank, in the order of ranks. Items are our own, never a file's."""
    if torch_dist.get_world_size() == 1:
        return [item]
    payload = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(torch_dist.get_world_size())]
    torch_dist.all_gather(sizes, torch.tensor([payload.numel()], device=device))
    lengths = [int(size) for size in sizes]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.empty_like(padded) for _ in lengths]
    torch_dist.all_gather(parts, padded)
    return [
        pickle.loads(part[:length].cpu().numpy().tobytes())
        for part, length in zip(parts, lengths, strict=True)
    ]


def run_on_rank0_and_broadcast(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on the first rank alone; gives its small result, or raises its UserError, on all of them."""
    result, error = _attempted(work) if world.is_main_process else (None, None)
    _agreed(error)
    return all_gather_objects(result, device_of_rank())[0]


def check_same(item: Any, what: str, remedy: str) -> None:
    """All ranks must have the same; it is plain data.

    Raises:
        UserError: on all ranks, where one has another.
    """
    told = all_gather_objects(item, device_of_rank())
    others = [rank for rank, one in enumerate(told) if one != told[0]]
    if others:
        rule = f"rank {others[0]} has another than rank 0. Their machines differ: {remedy}"
        raise UserError("The ranks do not agree", [f"{what}: {rule}."])


def first_problem_of_any_rank(problem: str | None) -> str | None:
    """The first rank's own where it has one, else the next's: the same on all ranks."""
    return next(filter(None, all_gather_objects(problem, device_of_rank())), None)


def all_ranks_or_raise(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; where it raises a UserError on one, it is raised on all."""
    result, error = _attempted(work)
    _agreed(error)
    return result  # type: ignore[return-value]


def _attempted(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return work(), None
    except UserError as caught:
        return None, caught


def _agreed(error: UserError | None) -> None:
    """Raises on every rank where one of them has an error."""
    for told in all_gather_objects(
        error and (error.headline, error.problems, error.status), device_of_rank()
    ):
        if told:
            raise UserError(*told)


def memory_of_device(local_rank: int) -> int:
    """Bytes of the accelerator that this rank will use."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().total_memory(local_rank)


def free_memory_of_device() -> None:
    """Gives back what its allocator keeps and nobody uses."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().empty_cache()


def device_of_rank() -> torch.device:
    """The device that this rank computes on."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def balanced_owners(names_and_sizes: Sequence[tuple[str, int]], world_size: int) -> dict[str, int]:
    """Which rank has which name: each, the largest first, goes to the rank with the least. The same on every rank."""
    loads = [0] * world_size
    owner = {}
    for name, size in sorted(names_and_sizes, key=lambda item: -item[1]):
        rank = loads.index(min(loads))
        owner[name] = rank
        loads[rank] += size
    return owner


def set_threads(world: World, threads: int | None) -> int:
    """Gives this rank its share of the machine's cores, or `threads`; returns how many."""
    threads = threads or _cores_of_a_rank(world)
    torch.set_num_threads(threads)
    return threads


def num_workers(world: World, workers: int | None) -> int:
    """Loader processes of this rank: `workers`, or as many as its cores carry beside the training."""
    # On a CPU the training itself takes the rank's cores; one worker keeps ahead of it.
    return (min(8, _cores_of_a_rank(world)) if pins_memory() else 1) if workers is None else workers


def num_readers(world: World) -> int:
    """Threads of this rank that read files while the training has not begun."""
    return min(16, max(2, _cores_of_a_rank(world)))  # two, so that one slow file does not hold up all


def pins_memory() -> bool:
    """Whether batches are copied to a device of its own, from pinned memory."""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_name() != "cpu"


def _cores_of_a_rank(world: World) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_size)


def _world(place: Environment) -> World:
    return World(place.rank, place.size, place.local_rank, place.local_size)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
