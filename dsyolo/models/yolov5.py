"""The ten YOLOv5 v6/v7 networks: one table per family, two numbers per variant."""

import math
from typing import NamedTuple

import torch
from torch import nn

from dsyolo.models.blocks import C3, SPPF, Concat, Conv, Detect, Stem, Upsample
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.network import Node


class LayerRow(NamedTuple):
    """One row of a family's table. Without `reads`, a node reads the one before it."""

    name: str
    kind: type[nn.Module]
    channels: int = 0  # at width 1
    reads: tuple[str, ...] = ()
    repeats: int = 0  # Bottlenecks of a C3 at depth 1
    kernel: int = 1
    stride: int = 1
    shortcut: bool = False


def _down(name: str, channels: int, reads: tuple[str, ...] = ()) -> LayerRow:
    return LayerRow(name, Conv, channels, reads, kernel=3, stride=2)


def _c3(name: str, channels: int, repeats: int = 3, *, shortcut: bool = False) -> LayerRow:
    return LayerRow(name, C3, channels, repeats=repeats, shortcut=shortcut)


PARAMETERLESS = (Upsample, Concat)
STEM_CHANNELS = 64  # of the first layer at width 1
# A row's position is its index in YOLOv5's own parameter names, `model.<index>.`
_P4_BACKBONE = (
    LayerRow("stem", Stem, STEM_CHANNELS, stride=2),
    _down("conv2", 128),
    _c3("p2", 128, 3, shortcut=True),
    _down("conv3", 256),
    _c3("p3", 256, 6, shortcut=True),
    _down("conv4", 512),
    _c3("p4", 512, 9, shortcut=True),
)
_P4_NECK = (
    LayerRow("lat5", Conv, 512),
    LayerRow("up5", Upsample),
    LayerRow("join4", Concat, reads=("up5", "p4")),
    _c3("fuse4", 512),
    LayerRow("lat4", Conv, 256),
    LayerRow("up4", Upsample),
    LayerRow("join3", Concat, reads=("up4", "p3")),
    _c3("out3", 256),
    _down("down3", 256),
    LayerRow("merge4", Concat, reads=("down3", "lat4")),
    _c3("out4", 512),
    _down("down4", 512),
    LayerRow("merge5", Concat, reads=("down4", "lat5")),
)
P5 = (
    *_P4_BACKBONE,
    _down("conv5", 1024),
    _c3("p5", 1024, 3, shortcut=True),
    LayerRow("sppf", SPPF, 1024),
    *_P4_NECK,
    _c3("out5", 1024),
    LayerRow("detect", Detect, reads=("out3", "out4", "out5")),
)
P6 = (
    *_P4_BACKBONE,
    _down("conv5", 768),
    _c3("p5", 768, 3, shortcut=True),
    _down("conv6", 1024),
    _c3("p6", 1024, 3, shortcut=True),
    LayerRow("sppf", SPPF, 1024),
    LayerRow("lat6", Conv, 768),
    LayerRow("up6", Upsample),
    LayerRow("join5", Concat, reads=("up6", "p5")),
    _c3("fuse5", 768),
    *_P4_NECK,
    _c3("out5", 768),
    _down("down5", 768),
    LayerRow("merge6", Concat, reads=("down5", "lat6")),
    _c3("out6", 1024),
    LayerRow("detect", Detect, reads=("out3", "out4", "out5", "out6")),
)

# (L, A, 2) widths and heights in pixels, finest level first
ANCHORS_P5_PX = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
ANCHORS_P6_PX = (
    ((19, 27), (44, 40), (38, 94)),
    ((96, 68), (86, 152), (180, 137)),
    ((140, 301), (303, 264), (238, 542)),
    ((436, 615), (739, 380), (925, 792)),
)

DEPTH_WIDTH = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}
VARIANTS = tuple(f"yolov5{size}{family}" for family in ("", "6") for size in DEPTH_WIDTH)


def family(variant: str) -> tuple[LayerRow, ...]:
    """Return the table that `variant` is built from."""
    return P6 if variant.endswith("6") else P5


def level_strides(variant: str) -> tuple[int, ...]:
    """Return the pixels per cell of the variant's levels, finest first."""
    return (8, 16, 32, 64) if variant.endswith("6") else (8, 16, 32)


def anchors_px(variant: str) -> torch.Tensor:
    """Return the anchors that the variant starts with, (L, A, 2) float32 in pixels."""
    return torch.tensor(ANCHORS_P6_PX if variant.endswith("6") else ANCHORS_P5_PX, dtype=torch.float32)


def build_yolov5(variant: str, num_classes: int) -> DetectionNetwork:
    """Build a network in train mode, with torch's default initialisation of convolutions.

    Args:
        variant: `yolov5n` ... `yolov5x6`, or just `n` ... `x6`.
        num_classes: K, at least 1.

    Raises:
        ValueError: no such variant, or no class.
    """
    variant = variant if variant.startswith("yolov5") else f"yolov5{variant}"
    if variant not in VARIANTS:
        raise ValueError(f"model: {variant!r} given, but the variants are {', '.join(VARIANTS)}.")
    if num_classes < 1:
        raise ValueError(f"num_classes: {num_classes} given, but a detector needs at least 1 class.")
    depth, width = DEPTH_WIDTH[variant.removeprefix("yolov5")[0]]
    strides = level_strides(variant)
    channels_of: dict[str, int] = {"images": 3}
    nodes: list[Node] = []
    previous = "images"
    for row in family(variant):
        reads = row.reads or (previous,)
        inputs = tuple(channels_of[name] for name in reads)
        outputs = math.ceil(row.channels * width / 8) * 8 if row.channels else sum(inputs)
        module = (
            Detect(inputs, num_classes, anchors_px(variant), strides)
            if row.kind is Detect
            else _build(row, inputs[0], outputs, depth)
        )
        nodes.append(Node(row.name, module, reads))
        channels_of[row.name] = outputs
        previous = row.name
    return DetectionNetwork(nodes, num_classes, strides, variant=variant)


def _build(row: LayerRow, c1: int, c2: int, depth: float) -> nn.Module:
    if row.kind is C3:
        return C3(c1, c2, max(round(row.repeats * depth), 1), row.shortcut)
    if row.kind is Conv:
        return Conv(c1, c2, row.kernel, row.stride)
    return row.kind() if row.kind in PARAMETERLESS else row.kind(c1, c2)
