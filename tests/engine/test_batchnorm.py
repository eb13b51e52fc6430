"""Synchronised BatchNorm on real ranks: R ranks of m images train as one process of R x m."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import training
from ranks import asked, long_but, run_ranks

STEPS = 4


def relative(a, b) -> float:
    """Largest difference relative to the largest value of b, or to 0.01 where that is larger.

    Biases begin at 0 and are a few thousandths here: rounding alone makes 1.2e-4 of the largest, both sides being
    as far (0.9e-4) from the same training in fp64.
    """
    return max((a[n] - b[n]).abs().max().item() / b[n].abs().max().clamp(min=1e-2).item() for n in b)


# ---- the function, against F.batch_norm on the images of all ranks


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A batch of 5 images: its first 2 are rank 0's, the others rank 1's. Means differ, one is large."""
    made = torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, 3, 6, generator=made) * torch.tensor([1.0, 0.1, 3, 1])[None, :, None, None]
    x = x + torch.arange(5.0)[:, None, None, None] + torch.tensor([0.0, 0, 0, 50])[None, :, None, None]
    grad = torch.randn(5, 4, 3, 6, generator=made)
    channels = torch.randn(4, 4, generator=made)
    return {
        "x": x.to(dtype),
        "grad": grad.to(dtype),
        "weight": channels[0],
        "bias": channels[1],
        "mean": channels[2],
        "var": channels[3].abs(),
    }


def through(function, given: dict[str, torch.Tensor], images: slice, **more) -> dict[str, torch.Tensor]:
    x = given["x"][images].contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (given[name].clone().requires_grad_() for name in ("weight", "bias"))
    mean, var = given["mean"].clone(), given["var"].clone()
    y = function(x, mean, var, weight, bias, True, 0.03, 1e-3, **more)
    y.backward(given["grad"][images])
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": weight.grad,
        "bias": bias.grad,
        "mean": mean,
        "var": var,
    }


def own_part(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from dsyolo.engine import process_group
    from dsyolo.engine.batchnorm import batch_norm

    rank = process_group.init_process_group().rank
    return through(batch_norm, inputs(dtype), slice(0, 2) if rank == 0 else slice(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_gradients_and_statistics_are_those_of_the_whole_batch(dtype):
    first, second = run_ranks(2, own_part, dtype)
    whole = through(F.batch_norm, inputs(dtype), slice(None))
    # bf16 has 8 bits; the gradient of x is of the size of 1, and a difference of some of them
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-5}
    for name in ("y", "x"):
        joined = torch.cat((first[name], second[name]))
        assert joined.dtype == dtype
        torch.testing.assert_close(joined, whole[name], **close)
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], whole[name], **close)
    for name in ("mean", "var"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], whole[name], rtol=1e-5, atol=1e-5)


def gradients_by_differences() -> bool:
    """In the first rank's image only: all of them would need the ranks to move in step."""
    from dsyolo.engine import process_group
    from dsyolo.engine.batchnorm import batch_norm

    rank, step = process_group.init_process_group().rank, 1e-2
    given = inputs(torch.float32)
    given["x"] = given["x"] - given["x"].mean((0, 2, 3), keepdim=True)  # fp32 differences need small values
    own = slice(0, 2) if rank == 0 else slice(2, 5)
    computed = through(batch_norm, given, own)["x"]
    for place in [(0, 0, 0, 0), (1, 2, 1, 3), (0, 3, 2, 5)]:
        sums = []
        for sign in (1, -1):
            x = given["x"][own].clone()
            if rank == 0:
                x[place] += sign * step
            y = batch_norm(x, None, None, given["weight"], given["bias"], True, 0.03, 1e-3)
            total = (y.double() * given["grad"][own].double()).sum()
            torch.distributed.all_reduce(total)
            sums.append(total.item())
        slope = (sums[0] - sums[1]) / (2 * step)
        if rank == 0:
            torch.testing.assert_close(computed[place].item(), slope, rtol=5e-3, atol=5e-4)
    return True


def test_the_gradient_is_the_slope_of_the_sum_over_all_ranks():
    assert all(run_ranks(2, gradients_by_differences))


def in_a_group_and_recomputed() -> dict[str, dict[str, torch.Tensor]]:
    from torch.utils.checkpoint import checkpoint

    from dsyolo.engine import process_group
    from dsyolo.engine.batchnorm import batch_norm

    rank = process_group.init_process_group().rank
    pair, alone = torch.distributed.new_group([0, 1]), torch.distributed.new_group([2])
    images = [slice(0, 2), slice(2, 5), slice(0, 5)][rank]

    def recomputed(x, *rest, **more):
        # as in a module: what it holds is no argument of the checkpoint
        return checkpoint(lambda x: batch_norm(x, *rest, **more), x, use_reentrant=False)

    given, group = inputs(torch.float32), alone if rank == 2 else pair
    return {
        name: through(f, given, images, group=group)
        for name, f in (("once", batch_norm), ("twice", recomputed))
    }


def test_a_group_keeps_to_itself_and_a_second_forward_gives_the_same():
    first, second, whole = run_ranks(3, in_a_group_and_recomputed)
    for kind in ("once", "twice"):
        for name in ("y", "x"):
            joined = torch.cat((first[kind][name], second[kind][name]))
            torch.testing.assert_close(joined, whole["once"][name], rtol=1e-5, atol=1e-5)
    for name in ("y", "x", "weight", "bias"):
        assert torch.equal(first["once"][name], first["twice"][name])
    assert not torch.equal(first["once"]["mean"], first["twice"]["mean"])  # who recomputes sees to that


def test_torchs_own_function_takes_what_it_is_given():
    """It runs on accelerators only: here at least its arguments are looked at."""
    import inspect

    from torch.nn.modules._functions import SyncBatchNorm

    names = "self input weight bias running_mean running_var eps momentum process_group world_size"
    assert list(inspect.signature(SyncBatchNorm.forward).parameters) == names.split()


# ---- the training


def every_stage(folder: str, asked_for: list[object]) -> dict[object, dict[str, object]]:
    cases: dict[object, dict] = {stage: {"stage": stage} for stage in range(4)}
    # BatchNorm's weights are gathered and freed too, between forward and backward
    cases["3 all sharded"] = {
        "stage": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    cases["autocast"] = {"stage": 2, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    cases["bf16"] = {"stage": 1, "bf16": {"enabled": True}}
    results = {}
    for name in asked_for:
        case = cases[name]
        engine, partitions, ema, _ = training.build(folder=Path(folder), synchronised=True, **case)
        names = list(engine.network.state_dict())
        losses = training.train(engine, ema, 0, STEPS)
        results[name] = {
            "losses": losses,
            "names": names,
            "weights": training.whole(partitions, partitions.masters()),
            "buffers": {
                name: buffer.clone() for name, buffer in engine.buffers.named(engine.buffers.flat).items()
            },
        }
    return results


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    return run_ranks(2, every_stage, str(tmp_path_factory.mktemp("syncbn")), asked(request, "case") or [0])[0]


@pytest.fixture(scope="module")
def plain():
    return training.plain(STEPS, at_once=2)


@pytest.mark.parametrize("case", long_but([0, "3 all sharded"], [0, 1, 2, 3, "3 all sharded"]))
def test_two_ranks_train_as_one_process_with_twice_the_images(two_ranks, plain, case):
    got = two_ranks[case]
    assert torch.tensor(got["losses"]) == pytest.approx(torch.tensor(plain["losses"]), rel=1e-5, abs=1e-6)
    assert relative(got["weights"], plain["weights"]) < 1e-4
    floating = {name: buffer for name, buffer in plain["buffers"].items() if buffer.is_floating_point()}
    assert relative(got["buffers"], floating) < 1e-4


def test_without_it_the_training_is_another_one(two_ranks, plain):
    apart = torch.tensor(training.plain(STEPS)["losses"])
    assert apart != pytest.approx(torch.tensor(plain["losses"]), rel=1e-3)


@pytest.mark.parametrize("case", long_but(["autocast"], ["autocast", "bf16"]))
def test_it_trains_in_bf16(two_ranks, plain, case):
    got = two_ranks[case]
    assert torch.tensor(got["losses"]) == pytest.approx(torch.tensor(plain["losses"]), rel=0.05)
    assert all(b.dtype == torch.float32 for n, b in got["buffers"].items() if "running" in n)


def test_names_stay(two_ranks):
    assert two_ranks[0]["names"] == list(training.network().state_dict())
