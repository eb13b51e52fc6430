"""Activation checkpointing: bit-equal to a plain run, alone and under the engine on real ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import training
from ranks import asked, long_but, run_ranks
from torch import nn

from dsyolo.models.blocks import BatchNorm
from dsyolo.models.network import Network

SOME = frozenset({"stem", "p3", "sppf", "out4"})


@pytest.fixture(autouse=True)
def one_thread():
    """So that tests of a busy machine do not wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def one_step(
    names: frozenset[str] | None,
    *,
    autocast: bool = False,
    weights: torch.dtype = torch.float32,
    frozen: bool = False,
    offload: bool = False,
    backwards: int = 1,
) -> dict[str, torch.Tensor]:
    """Gradients, buffers and maps after one forward and `backwards` backward passes; None: all blocks."""
    net = training.network()
    for p in net.parameters():
        p.data = p.data.to(weights)
    net.checkpointed, net.offload_inputs = net.blocks() if names is None else names, offload
    for module in net.modules():
        if isinstance(module, BatchNorm) and frozen:
            module.eval()
    images = training.batch(0, 0).images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        maps = net(images)
    loss = sum((m.float() ** 2).mean() for m in maps)
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    result = {name: p.grad for name, p in net.named_parameters()}
    result |= {f"map {i}": m.detach() for i, m in enumerate(maps)} | dict(net.named_buffers())
    return result


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


CASES = [
    {},
    {"autocast": True},
    {"weights": torch.bfloat16},
    {"frozen": True},
    {"frozen": True, "autocast": True},
    {"backwards": 2},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("names", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_one_step_is_that_of_a_plain_run_to_the_last_bit(case, names, offload):
    plain = one_step(frozenset(), **case)
    assert not differing(one_step(names, offload=offload, **case), plain)
    moved = differing(plain, one_step(frozenset(), **{**case, "frozen": not case.get("frozen", False)}))
    assert any(name.endswith("running_mean") for name in moved)  # the check sees statistics that differ


def count_runs(net: Network) -> dict[str, int]:
    counts = dict.fromkeys(net.order, 0)

    def counts_one(name: str):
        def hook(module: nn.Module, inputs: object) -> None:
            counts[name] += 1

        return hook

    for name in net.order:
        net.get_submodule(name).register_forward_pre_hook(counts_one(name))
    return counts


def test_only_what_is_named_runs_again_and_only_for_gradients():
    net = training.network()
    net.checkpointed = SOME
    counts = count_runs(net)
    images = training.batch(0, 0).images
    sum(m.mean() for m in net(images)).backward()
    assert counts == {name: 2 if name in SOME else 1 for name in net.order}
    with torch.no_grad():
        net(images)
    assert counts == {name: 3 if name in SOME else 2 for name in net.order}


def test_a_slice_of_the_network_checkpoints_as_the_whole_does():
    def gradients(cuts: list[int], names: frozenset[str]) -> dict[str, torch.Tensor]:
        net = training.network()
        net.checkpointed = names
        boundary: tuple = (training.batch(0, 0).images,)
        for start, stop in zip([0, *cuts], [*cuts, len(net.order)], strict=True):
            boundary = net.run(boundary, start, stop)
        sum((m**2).mean() for m in boundary[0]).backward()
        return {name: p.grad for name, p in net.named_parameters()} | dict(net.named_buffers())

    assert not differing(gradients([5, 11], training.network().blocks()), gradients([], frozenset()))


# ---- the engine on real ranks

JSONS = [
    *({"stage": stage} for stage in range(4)),
    {"stage": 1, "bf16": {"enabled": True}},
    {"stage": 3, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
]


QUICK = (2, 5)


def train_twice(folder: str, chosen: list[int]) -> dict[int, tuple[dict, dict]]:
    """For each chosen JSON the results of a run without and of one with checkpointed blocks."""
    results = {}
    for i in chosen:
        json, pair = JSONS[i], []
        for checkpoints in (False, True):
            engine, partitions, ema, _ = training.build(folder=Path(folder, str(i)), **json)
            counts = count_runs(engine.network)
            if checkpoints:
                engine.network.checkpointed = engine.network.blocks()
            losses = training.train(engine, ema, 0, 2)
            pair.append(
                {
                    "losses": torch.tensor(losses),
                    "buffers": engine.buffers.flat.clone(),
                    "whole": torch.tensor([p.numel() for p in engine.network.parameters()]),
                    "runs": torch.tensor(list(counts.values())),
                    **{f"weight {n}": t for n, t in training.whole(partitions, partitions.masters()).items()},
                    **{f"ema {n}": t for n, t in training.whole(ema.partitions, ema.tensors).items()},
                }
            )
        results[i] = tuple(pair)
    return results


@pytest.fixture(scope="module")
def two_ranks(request, tmp_path_factory):
    return run_ranks(2, train_twice, str(tmp_path_factory.mktemp("checkpointing")), asked(request, "i"))


@pytest.mark.parametrize("i", long_but(QUICK, range(len(JSONS))), ids=[str(json) for json in JSONS])
def test_ranks_train_the_same_under_every_stage_to_the_last_bit(two_ranks, i):
    for rank in range(2):
        plain, checkpointed = two_ranks[rank][i]
        assert differing(checkpointed, plain) == ["runs"]
