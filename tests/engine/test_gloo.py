"""The reductions that stand in for gloo's own: right on all ranks and on some, and in use by DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

SOME = (1, 3)


def of_rank(rank: int, elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(rank)).to(dtype)


def reduce_all() -> dict[str, Any]:
    """Through DeepSpeed's own functions, as ZeRO calls them."""
    import deepspeed.comm as deepspeed_comm

    from dsyolo.engine import process_group

    world = process_group.init_process_group()
    some = torch.distributed.new_group(SOME)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, group, ranks in (("all", None, range(world.size)), ("some", some, SOME)):
            if world.rank not in ranks:
                continue
            given, size = of_rank(world.rank, 24, dtype), len(ranks)
            # the output is a part of the input, as in DeepSpeed
            flat = given.clone()
            part = flat.chunk(size)[list(ranks).index(world.rank)]
            deepspeed_comm.reduce_scatter_fn(part, flat, group=group)
            found[f"scattered, {name}, {dtype}"] = part.clone()
            for dst in ranks:
                whole = given.clone()
                deepspeed_comm.reduce(whole, dst, group=group)
                if dst == world.rank:
                    found[f"reduced, {name}, {dtype}"] = whole
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(4, reduce_all)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "ranks"), [("all", range(4)), ("some", SOME)])
def test_sums_are_right(found, name, ranks, dtype):
    expected = sum(of_rank(rank, 24, dtype).double() for rank in ranks)
    close = {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    for place, rank in enumerate(ranks):
        reduced, scattered = (found[rank][f"{kind}, {name}, {dtype}"] for kind in ("reduced", "scattered"))
        torch.testing.assert_close(reduced.double(), expected, **close)
        torch.testing.assert_close(scattered.double(), expected.chunk(len(ranks))[place], **close)


def test_a_rank_outside_a_group_has_nothing_of_it(found):
    assert not [key for key in found[0] if "some" in key]
