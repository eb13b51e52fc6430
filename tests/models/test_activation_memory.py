"""Counted activations against what torch's allocator gives out, and the choice of blocks against all choices."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from activations import kept
from recompute import PRECISIONS, allocations, forward, images_of, step
from torch import nn

from dsyolo.base.errors import UserError
from dsyolo.config import spec
from dsyolo.models.activation_memory import Activations, NodeBytes, choose, count_activations
from dsyolo.models.blocks import C3, Conv, Stem
from dsyolo.models.network import Network, Node
from dsyolo.models.yolov5 import build_yolov5
from dsyolo.planner.model_profile import inference_bytes

SOME = frozenset({"stem", "p3", "sppf", "out4"})


def own_bytes(counted: Activations) -> dict[str, int]:
    """Return by node what it saves besides its inputs."""
    return {node.name: counted.bytes_of(node.saved - node.inputs) for node in counted.nodes}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("variant", "size_px", "batch"),
    [
        ("yolov5n", 160, 3),
        pytest.param("yolov5n", 320, 2, marks=pytest.mark.soak),
        pytest.param("yolov5s", 160, 2, marks=pytest.mark.soak),
    ],
)
def test_counted_bytes_are_those_that_the_allocator_gave_out(variant, size_px, batch, precision):
    network, images = build_yolov5(variant, 20), images_of(batch, size_px)
    counted = count_activations(network, tuple(images.shape), spec.PRECISIONS[precision])
    step(network, images, precision)
    for names in (frozenset(), SOME, network.blocks()):
        network.checkpointed = names
        measured, _ = allocations(lambda: forward(network, images, precision))
        assert kept(counted, names) == pytest.approx(measured, rel=0.02)
        _, peak = allocations(lambda: step(network, images, precision))
        # Beside activations the most at once has maps, gradients on their way, and a few of weights; and on a CPU that
        # cannot compute in bf16 a convolution's fp32 copies.
        emulated = precision == "autocast_bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert 1 < peak / counted.peak_bytes(names) < (3 if emulated or size_px == 160 else 1.2), names


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("variant", "size_px", "batch"), [("yolov5n", 320, 2), ("yolov5n6", 256, 3)])
def test_what_a_pass_without_gradients_takes_is_what_the_allocator_gave_out(
    variant, size_px, batch, precision
):
    network, images = build_yolov5(variant, 20).eval(), images_of(batch, size_px)

    def passes() -> object:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
            return network.decode(network(images))

    passes()
    _, peak = allocations(passes)
    counted = inference_bytes(network, tuple(images.shape), spec.PRECISIONS[precision])
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "autocast_bf16" and (emulated or torch.cpu._is_amx_tile_supported()):
        # AMX tiles take images and weights in an order of their own, and the emulation takes them in fp32: copies.
        assert 0.999 < peak / counted < (3 if emulated else 2)
    else:
        assert counted == pytest.approx(peak, rel=0.001)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_of_two_bytes_have_activations_of_two_bytes(precision):
    network = build_yolov5("yolov5n", 3)
    whole = own_bytes(count_activations(network, (2, 3, 64, 64), spec.PRECISIONS["fp32"]))
    half = own_bytes(count_activations(network, (2, 3, 64, 64), spec.PRECISIONS[precision]))
    # not in half: statistics of batches, and BatchNorm's weights are copied to fp32
    assert half["p2"] == pytest.approx(whole["p2"] / 2, rel=0.02)
    assert next(network.parameters()).dtype == torch.float32


def test_real_weights_are_neither_needed_nor_touched():
    with torch.device("meta"):
        empty = build_yolov5("yolov5n", 3)
    network = build_yolov5("yolov5n", 3)
    network.checkpointed = SOME
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    shape = (1, 3, 64, 64)
    counted = count_activations(network, shape, spec.PRECISIONS["fp32"])
    assert own_bytes(counted) == own_bytes(count_activations(empty, shape, spec.PRECISIONS["fp32"]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.checkpointed == SOME


def test_a_conv_by_hand():
    network = Network([Node("one", Stem(3, 8), ("images",)), Node("two", Conv(8, 8), ("one",))])
    counted = count_activations(network, (2, 3, 10, 10), spec.PRECISIONS["fp32"])
    plane, statistics = 2 * 25 * 4, 2 * 8 * 4
    own = own_bytes(counted)
    # the convolution's input, cast to float; its output; what enters SiLU; mean and deviation of the batch
    assert own["one"] == 3 * 4 * plane + 2 * 8 * plane + statistics
    assert own["two"] == 2 * 8 * plane + statistics
    both = frozenset({"one", "two"})
    assert counted.peak_bytes() == sum(own.values()) + 8 * plane
    assert counted.peak_bytes(both) == max(own["one"], own["two"] + 8 * plane)
    assert counted.peak_bytes(frozenset({"one"})) == max(own["one"], own["two"] + 8 * plane)
    assert counted.peak_bytes(frozenset({"two"})) == counted.peak_bytes()


class Join(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, y), 1)


def small() -> Activations:
    nodes = [
        Node("stem", Stem(3, 8), ("images",)),
        Node("a", C3(8, 16, 2, True), ("stem",)),
        Node("b", Conv(16, 24, 3, 2), ("a",)),
        Node("c", C3(24, 24, 1, False), ("b",)),
        Node("up", nn.Upsample(scale_factor=2.0), ("c",)),
        Node("join", Join(), ("up", "a")),
        Node("d", C3(40, 16, 3, False), ("join",)),
        Node("e", Conv(16, 32), ("d",)),
    ]
    return count_activations(Network(nodes), (2, 3, 32, 32), spec.PRECISIONS["fp32"])


@pytest.mark.parametrize("offload", [False, True])
def test_the_fewest_blocks_are_the_fewest_of_all_choices(offload):
    counted = small()
    sets = [
        frozenset(names) for n in range(len(counted.blocks) + 1) for names in combinations(counted.blocks, n)
    ]
    peaks = {names: counted.peak_bytes(names, offload=offload) for names in sets}
    assert len(set(peaks.values())) > 10
    for budget in sorted(set(peaks.values())):
        names = counted.fewest(budget, offload=offload)
        assert counted.peak_bytes(names, offload=offload) <= budget
        assert len(names) == min(len(some) for some in sets if peaks[some] <= budget)
    least = min(peaks.values())
    assert counted.fewest(least - 1, offload=offload) is None
    assert least == peaks[counted.blocks]


def test_casts_of_weights_are_alive_at_the_end_of_the_forward_pass():
    network = build_yolov5("yolov5s", 3)
    # few pixels: casts are the most
    counted = count_activations(network, (1, 3, 64, 64), spec.PRECISIONS["autocast_bf16"])
    casts = counted.bytes_of(frozenset().union(*(node.casts for node in counted.nodes)))
    assert casts == 2 * sum(p.numel() for p in network.parameters() if p.ndim == 4)
    for names in (frozenset(), counted.blocks):
        assert counted.peak_bytes(names) > casts
    assert counted.fewest(casts) is None
    assert counted.fewest(counted.peak_bytes(counted.blocks)) is not None


def test_a_shared_storage_is_counted_once():
    nodes = (
        NodeBytes("a", frozenset(), frozenset({1, 2}), frozenset({3})),
        NodeBytes("b", frozenset({3}), frozenset({3, 4}), frozenset({5})),
        NodeBytes("c", frozenset({3, 5}), frozenset({3, 5, 6}), frozenset()),
    )
    counted = Activations(dict.fromkeys(range(1, 7), 10), nodes, frozenset("abc"))
    assert own_bytes(counted) == {"a": 20, "b": 10, "c": 10}
    assert counted.peak_bytes() == 60
    assert counted.peak_bytes(frozenset("a")) == 40
    assert counted.peak_bytes(frozenset("ab")) == 30
    assert counted.peak_bytes(frozenset("ab"), offload=True) == 30  # c keeps its inputs itself
    assert counted.fewest(45) == frozenset("a")


def test_plans():
    counted = small()
    plain, least = counted.peak_bytes(), counted.peak_bytes(counted.blocks)
    assert choose(counted, "none", offload=False) == (counted, frozenset(), False)
    assert choose(counted, "none", offload=False).peak_bytes == plain
    assert choose(counted, "blocks", offload=False).checkpointed == counted.blocks
    assert choose(counted, "blocks", offload=False).peak_bytes == least
    assert choose(counted, plain, offload=False).checkpointed == frozenset()
    plan = choose(counted, least, offload=False)
    assert plan.peak_bytes == least
    assert plan.explain().endswith("of 6 blocks; 0.00 GiB without")
    with pytest.raises(UserError) as caught:
        choose(counted, 1000, offload=False)
    (line,) = caught.value.problems
    assert choose(counted, int(0.001 * 2**30), offload=False).checkpointed  # the remedy works
    assert line.startswith("recompute: 9.313e-07GiB given, but a micro-batch keeps 0.001GiB with all blocks")
