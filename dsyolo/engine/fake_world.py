"""One process as one rank of thousands, by torch's fake process group, which sends nothing.

Collectives leave their tensors as they are, so results mean nothing. Sizes of tensors and messages are right.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as torch_dist

from dsyolo.base.environment import export_to_torch, read_environment
from dsyolo.cluster.world import World
from dsyolo.engine.process_group import quiet_deepspeed


def pretend(rank: int, ranks: int) -> World:
    """Make this process rank `rank` of `ranks`, each on its own machine, until it ends."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = read_environment(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
    )
    export_to_torch(place)
    quiet_deepspeed()
    torch_dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    deepspeed.init_distributed("gloo", verbose=False)
    return World(rank, ranks, 0, 1)


def sent_bytes(sizes: Mapping[str, int], ranks: int) -> float:
    """Return the bytes that one of N ranks sends if every collective is a ring (Patarasu and Yuan 2009).

    An all-reduce sends 2 (N - 1) / N of its tensor; a gather, scatter, or reduction to one rank half of that.

    Args:
        sizes: `CommTimer.sizes`.
    """
    return (
        sum((2 if name == "all_reduce" else 1) * size for name, size in sizes.items()) * (ranks - 1) / ranks
    )
