"""Counted costs, cuts and stages of a network, in one process."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from dsyolo.models.flops import NodeCost, node_costs
from dsyolo.models.network import PipelineStage, pack, unpack
from dsyolo.models.pipeline_cuts import CPU, balanced_cuts, boundary_elements, stage_table
from dsyolo.models.registry import meta_network
from dsyolo.models.yolov5 import build_yolov5

SHAPE = (2, 3, 64, 64)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_yolov5("yolov5n", 3)


@pytest.fixture(scope="module")
def costs(network):
    return node_costs(network, SHAPE)


def slowest(costs: list[NodeCost], cuts: tuple[int, ...]) -> float:
    """The cost of the slowest stage, worked out the long way."""
    bounds = [0, *cuts, len(costs)]
    stages = []
    for start, stop in pairwise(bounds):
        own = sum(cost.flops + CPU.per_element * cost.elements for cost in costs[start:stop])
        borders = [cut for cut in (start, stop) if 0 < cut < len(costs)]
        stages.append(own + CPU.per_boundary * sum(boundary_elements(costs, cut) for cut in borders))
    return max(stages)


def test_costs_are_of_every_node_and_count_each_parameter_once(network, costs):
    assert tuple(cost.name for cost in costs) == network.order
    assert sum(cost.num_parameters for cost in costs) == sum(p.numel() for p in network.parameters())
    assert tuple(cost.num_parameters > 0 for cost in costs) == meta_network("yolov5n").has_parameters


# Published with the weights, of one image of 640 px with 80 classes, in units of 10^9 (docs/yolov5.md).
@pytest.mark.parametrize(("variant", "gflops"), [("yolov5n", 4.5), ("yolov5s", 16.5)])
def test_work_is_what_was_published(variant, gflops):
    total = sum(cost.flops for cost in node_costs(build_yolov5(variant, 80), (1, 3, 640, 640)))
    assert total / 1e9 == pytest.approx(gflops, rel=0.02)


def test_costs_grow_with_the_batch(network, costs):
    for one, two in zip(costs, node_costs(network, (4, *SHAPE[1:])), strict=True):
        assert two.flops == 2 * one.flops


@pytest.mark.parametrize("stages", [2, 3])
def test_no_other_cuts_make_the_slowest_stage_faster(costs, stages):
    best = min(
        slowest(costs, cuts)
        for cuts in combinations(range(1, len(costs)), stages - 1)
        if all(any(c.num_parameters for c in costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)]))
    )
    assert slowest(costs, balanced_cuts(costs, stages, CPU)) == pytest.approx(best)


@pytest.mark.parametrize("stages", [1, 2, 5, 19])
def test_every_stage_has_parameters(costs, stages):
    cuts = balanced_cuts(costs, stages, CPU)
    assert len(cuts) == stages - 1
    for start, stop in pairwise([0, *cuts, len(costs)]):
        assert any(cost.num_parameters for cost in costs[start:stop])
    assert len(stage_table(costs, cuts, CPU, 4, [1] * stages).splitlines()) == stages + 1


def test_packing_is_undone_by_unpacking():
    boundary = (torch.randn(2, 3, 4, 5), torch.randn(2, 7, 2, 2))
    shapes = [tuple(t.shape) for t in boundary]
    for given in (boundary, boundary[:1]):
        back = unpack(pack(given), shapes[: len(given)])
        assert all(a.equal(b) for a, b in zip(given, back, strict=True))
        assert all(b.is_contiguous(memory_format=torch.channels_last) for b in back)


@pytest.mark.parametrize("cuts", [(7,), (11,), (3, 12, 21), tuple(range(1, 25))])
def test_stages_in_a_row_are_the_network(network, costs, cuts):
    """Also at the borders where most tensors live, and with a stage for every node."""
    images = torch.randint(0, 256, SHAPE, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    network.eval()
    network.zero_grad()
    expected = network(images)
    sum(level.square().sum() for level in expected).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    x = images
    names = []
    for start, stop in pairwise([0, *cuts, len(costs)]):
        stage = PipelineStage(network, start, stop, costs[start - 1].boundary if start else ())
        names += [name for name, _ in stage.named_parameters()]
        x = stage(x)
    assert names == [name for name, _ in network.named_parameters()]
    for got, level in zip(x, expected, strict=True):
        assert got.equal(level)
    sum(level.square().sum() for level in x).backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
