"""A process that is one of thousands of ranks, without the others: torch's fake process group sends nothing and waits for nobody.

What ranks would tell each other stays what it was before, so results mean nothing; sizes of tensors and of what is sent do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as torch_dist

from dsyolo.base.environment import export_to_torch, read_environment
from dsyolo.cluster.world import World
from dsyolo.engine.process_group import quiet_deepspeed


def pretend(rank: int, ranks: int) -> World:
    """This process as the `rank`-th of `ranks`, each on a machine of its own, for as long as it lives."""
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
    """Of one rank, where every collective goes by a ring (Patarasu and Yuan 2009): twice (N - 1) / N of what is reduced for all,
    once of what is gathered, scattered, or reduced for one.

    Args:
        sizes: `Collectives.sizes`.
    """
    return (
        sum((2 if name == "all_reduce" else 1) * size for name, size in sizes.items()) * (ranks - 1) / ranks
    )
