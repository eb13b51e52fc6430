"""A process's position: among the ranks, on its machine, in a pipeline; and its share of the machine."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dsyolo.base.environment import read_environment


class World(NamedTuple):
    """This process's position among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this machine

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0


class ParallelDims(NamedTuple):
    """A rank's position in the pipeline and in data parallelism; without a pipeline there is one stage."""

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
    """Return this rank's position. Ranks of one stage are neighbours, as in DeepSpeed: gradients are most of the traffic."""
    dp_size = world.size // stages
    return ParallelDims(world.rank // dp_size, stages, world.rank % dp_size, dp_size)


def world_from_environment() -> World:
    """Return the world that the launcher described, or raise UserError; of one rank without a launcher."""
    return World(*read_environment()[:4])


def balanced_owners(names_and_sizes: Sequence[tuple[str, int]], world_size: int) -> dict[str, int]:
    """Assign names to ranks, the largest first, each to the rank with the least so far. The same on every rank."""
    loads, owner = [0] * world_size, {}
    for name, size in sorted(names_and_sizes, key=lambda item: -item[1]):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += size
    return owner


def set_threads(world: World, threads: int | None) -> int:
    """Set torch's threads to this rank's share of the machine's cores, or to `threads`. Return how many."""
    threads = threads or cores_of_rank(world)
    torch.set_num_threads(threads)
    return threads


def num_readers(world: World) -> int:
    """Return the threads by which this rank reads files before the training begins."""
    return min(16, max(2, cores_of_rank(world)))  # two, so that one slow file does not hold up all


def cores_of_rank(world: World) -> int:
    """Return a rank's share of this machine's cores, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_size)
