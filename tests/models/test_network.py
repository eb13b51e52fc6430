"""The graph by hand, slices of the network against the whole, decoding, and the precision of BatchNorm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsyolo.models.blocks import BatchNorm
from dsyolo.models.network import Network, Node, NodeLink, connect
from dsyolo.models.yolov5 import VARIANTS, build_yolov5, family, level_strides

SIZE_PX = 64
NUM_CLASSES = 3


def node(name: str, *reads: str, module: nn.Module | None = None) -> Node:
    return Node(name, module or nn.Identity(), reads)


def boundaries(nodes: list[Node]) -> list[list[str]]:
    """Return what is alive after each node, by name, as the links have it."""
    boundary, alive = ["images"], []
    for one, link in zip(nodes, connect(nodes), strict=True):
        assert [boundary[k] for k in link.reads] == list(one.reads)
        boundary = [boundary[k] for k in link.keeps] + [one.name]
        alive.append(boundary)
    return alive


# ---- connect


def test_liveness_of_a_small_graph_by_hand():
    nodes = [node("a", "images"), node("b", "a"), node("c", "b", "a"), node("d", "c"), node("e", "b", "d")]
    assert connect(nodes) == (
        NodeLink(reads=(0,), keeps=()),  # images -> a
        NodeLink(reads=(0,), keeps=(0,)),  # a -> a, b
        NodeLink(reads=(1, 0), keeps=(1,)),  # a, b -> b, c
        NodeLink(reads=(1,), keeps=(0,)),  # b, c -> b, d
        NodeLink(reads=(0, 1), keeps=()),  # b, d -> e
    )
    assert boundaries(nodes) == [["a"], ["a", "b"], ["b", "c"], ["b", "d"], ["e"]]


def test_the_input_lives_until_it_is_last_read():
    assert boundaries([node("a", "images"), node("b", "a", "images"), node("c", "b")]) == [
        ["images", "a"],
        ["b"],
        ["c"],
    ]


def test_a_node_may_read_one_output_twice():
    class Add(nn.Module):
        def forward(self, x, y):
            return x + y

    network = Network([node("a", "images"), node("twice", "a", "a", module=Add())])
    assert network(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("a", "images"), node("a", "a")], "used twice"),
        ([node("images", "images")], "used twice"),
        ([node("a", "b"), node("b", "images")], "a reads"),  # before it is made
        ([node("a", "images"), node("b", "nowhere")], "b reads"),
        ([node("a", "images"), node("b", "images")], "never read"),  # a is made for nobody
        ([node("a", "images"), node("b", "a"), node("c", "a")], "never read"),
    ],
)
def test_graphs_that_cannot_be_are_refused(nodes, message):
    with pytest.raises(AssertionError, match=message):
        connect(nodes)


# ---- the boundary activations of the real networks


def table_boundaries(variant: str) -> dict[str, list[str]]:
    nodes, previous = [], "images"
    for row in family(variant):
        nodes.append(node(row.name, *(row.reads or (previous,))))
        previous = row.name
    return dict(zip([one.name for one in nodes], boundaries(nodes), strict=True))


def test_boundary_activations_of_the_p5_networks():
    alive = table_boundaries("yolov5n")
    sizes = [len(names) for names in alive.values()]
    # layers 0 to 4 are a chain; from there p3, then p4 wait for the way up, lat5 and lat4 for the way down
    assert sizes == [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 3, 3, 3, 4, 3, 3, 4, 3, 3, 4, 3, 3, 1]
    assert alive["p3"] == ["p3"]
    assert alive["p4"] == ["p3", "p4"]
    assert alive["up5"] == ["p3", "p4", "lat5", "up5"]
    assert alive["up4"] == ["p3", "lat5", "lat4", "up4"]
    assert alive["down3"] == ["lat5", "lat4", "out3", "down3"]
    assert alive["out5"] == ["out3", "out4", "out5"]


def test_boundary_activations_of_the_p6_networks():
    alive = table_boundaries("yolov5n6")
    assert [len(names) for names in alive.values()][:5] == [1, 1, 1, 1, 1]
    assert max(map(len, alive.values())) == 5
    assert alive["p6"] == ["p3", "p4", "p5", "p6"]
    assert alive["up6"] == ["p3", "p4", "p5", "lat6", "up6"]
    assert alive["up4"] == ["p3", "lat6", "lat5", "lat4", "up4"]
    assert alive["down5"] == ["lat6", "out3", "out4", "out5", "down5"]
    assert alive["out6"] == ["out3", "out4", "out5", "out6"]


# ---- slices and outputs


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_yolov5("yolov5n", NUM_CLASSES).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (2, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def test_any_cut_gives_the_output_of_the_whole(network, images):
    whole = network(images)
    last = len(network.order)
    alive = list(table_boundaries("yolov5n").values())
    for cut in range(1, last):
        boundary = network.run((images,), 0, cut)
        assert len(boundary) == len(alive[cut - 1])
        (out,) = network.run(boundary, cut, last)
        assert all(a.equal(b) for a, b in zip(out, whole, strict=True)), network.order[cut]


@torch.no_grad()
def test_cuts_after_every_node_give_the_output_of_the_whole(images):
    torch.manual_seed(0)
    network = build_yolov5("yolov5n6", 2).eval()
    boundary = (images,)
    for k in range(len(network.order)):
        boundary = network.run(boundary, k, k + 1)
    assert all(a.equal(b) for a, b in zip(boundary[0], network(images), strict=True))


@torch.no_grad()
def test_maps_have_the_shapes_that_the_loss_reads(network):
    maps = network(torch.zeros(2, 3, 64, 96, dtype=torch.uint8))
    assert [tuple(raw.shape) for raw in maps] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8)]
    assert network.decode(maps).shape == (2, 3 * (96 + 24 + 6), 8)


@torch.no_grad()
def test_uint8_images_equal_floats_from_0_to_1(network, images):
    for a, b in zip(network(images), network(images.float() / 255), strict=True):
        assert a.equal(b)
    assert not network(images)[0].equal(network(images.float())[0])


@torch.no_grad()
def test_the_memory_format_of_images_does_not_matter(network, images):
    for a, b in zip(
        network(images), network(images.contiguous(memory_format=torch.channels_last)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_decoding_by_hand(network):
    maps = [torch.zeros(1, 3, 8, 8, 8), torch.zeros(1, 3, 4, 4, 8), torch.zeros(1, 3, 2, 2, 8)]
    maps[1][0, 2, 3, 1] = torch.tensor([1.0, -2.0, 0.5, -0.5, 3.0, -3.0, 0.0, 1.0])
    decoded = network.decode(tuple(maps))
    row = decoded[0, 3 * 64 + 2 * 16 + 3 * 4 + 1].tolist()  # levels in order, each by anchor, row, column

    def s(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    stride, (anchor_w, anchor_h) = 16, (59, 119)
    expected = [(2 * s(1) - 0.5 + 1) * stride, (2 * s(-2) - 0.5 + 3) * stride]
    expected += [(2 * s(0.5)) ** 2 * anchor_w, (2 * s(-0.5)) ** 2 * anchor_h, s(3), s(-3), 0.5, s(1)]
    assert row == pytest.approx(expected, rel=1e-5)
    # all raw values 0: the middle of the cell, the size of the anchor
    assert decoded[0, 0].tolist() == pytest.approx([4, 4, 10, 13, *[0.5] * 4])
    assert decoded[0, -1].tolist() == pytest.approx([48, 48, 373, 326, *[0.5] * 4])


def test_biases_start_at_the_prior():
    torch.manual_seed(0)
    few, many = build_yolov5("yolov5n", 3), build_yolov5("yolov5n", 80)
    for network, num_classes in ((few, 3), (many, 80)):
        for conv, stride in zip(network.detect.m, network.strides, strict=True):
            bias = conv.bias.detach().view(3, 5 + num_classes)
            bound = 1 / math.sqrt(conv.in_channels)  # torch's own start, around 0
            assert (bias[:, :4].abs() <= bound).all()
            assert ((bias[:, 4] - math.log(8 / (640 / stride) ** 2)).abs() <= bound).all()
            assert ((bias[:, 5:] - math.log(0.6 / (num_classes - 0.99999))).abs() <= bound).all()


# the table of docs/yolov5.md, K = 80
PARAMETERS = {
    "yolov5n": 1_872_157,
    "yolov5s": 7_235_389,
    "yolov5m": 21_190_557,
    "yolov5l": 46_563_709,
    "yolov5x": 86_749_405,
    "yolov5n6": 3_246_940,
    "yolov5s6": 12_626_620,
    "yolov5m6": 35_731_932,
    "yolov5l6": 76_770_172,
    "yolov5x6": 140_794_780,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts(variant):
    with torch.device("meta"):
        network = build_yolov5(variant, 80)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[variant]
    assert network.anchors.shape == (len(level_strides(variant)), 3, 2)


def test_a_variant_may_be_short_and_must_exist():
    with torch.device("meta"):
        assert build_yolov5("s6", 1).variant == "yolov5s6"
    with pytest.raises(ValueError, match=r"yolov5q.*yolov5n, yolov5s"):
        build_yolov5("q", 3)
    with pytest.raises(ValueError, match="at least 1 class"):
        build_yolov5("n", 0)


# ---- BatchNorm


def bf16_parameters(network: nn.Module) -> nn.Module:
    """As DeepSpeed's `bf16.enabled` leaves a network: buffers stay in fp32."""
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    return network


def test_batchnorm_with_bf16_parameters_keeps_fp32_statistics():
    torch.manual_seed(0)
    norm, plain = bf16_parameters(BatchNorm(4)), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
    # a mean and a spread that bf16 statistics, with 8 bits, would lose after a few steps of 0.03
    x = (torch.randn(8, 4, 6, 6) * 0.1 + 1.003).bfloat16()
    for _ in range(20):
        out, expected = norm(x), plain(x.float())
    assert out.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, plain.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, plain.running_var, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_with_bf16_parameters_runs_and_learns_on_a_cpu(images, training):
    torch.manual_seed(0)
    network = bf16_parameters(build_yolov5("yolov5n", 2)).train(training)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    maps = network(images)
    assert {raw.dtype for raw in maps} == {torch.bfloat16}
    sum(raw.float().square().mean() for raw in maps).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.bfloat16 for p in network.parameters())
    for name, buffer in network.named_buffers():
        moved = training and name.rpartition(".")[2] in ("running_mean", "running_var")
        assert buffer.equal(before[name]) != moved, name
        assert buffer.dtype == before[name].dtype


def test_batchnorm_equals_torchs_own():
    torch.manual_seed(0)
    norm, plain = BatchNorm(3), nn.BatchNorm2d(3, eps=1e-3, momentum=0.03)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(norm(x), plain(x))
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x))
