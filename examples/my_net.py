"""A network of your own: YOLOv5n with channel attention in its backbone, and a neck that only goes up, of two levels.

python dsyolo/train.py --data data.yaml --model examples/my_net.py:build
"""

import torch
from torch import nn

from dsyolo.models.blocks import C3, SPPF, Concat, Conv, Detect, Stem, Upsample
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.network import Node

ANCHORS_PX = (
    ((10, 13), (33, 30), (62, 45)),
    ((59, 119), (156, 198), (373, 326)),
)  # (levels, anchors, w and h)


class ChannelAttention(nn.Module):
    """Scale every channel by a gate that looks at the means of all channels. (B, C, H, W) keeps its shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.SiLU(), nn.Conv2d(channels // 4, channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


def build(num_classes: int) -> DetectionNetwork:
    """Return the network. A node without `reads` reads the one before it; the first one reads the images."""
    nodes = [
        Node("stem", Stem(3, 16)),  # takes the uint8 images to [0, 1]
        Node("conv2", Conv(16, 32, 3, 2)),
        Node("p2", C3(32, 32, 1, shortcut=True)),
        Node("conv3", Conv(32, 64, 3, 2)),
        Node("p3", C3(64, 64, 2, shortcut=True)),
        Node("attention3", ChannelAttention(64)),
        Node("conv4", Conv(64, 128, 3, 2)),
        Node("p4", C3(128, 128, 3, shortcut=True)),
        Node("sppf", SPPF(128, 128)),
        Node("up4", Upsample()),
        Node("join3", Concat(), ("up4", "attention3")),
        Node("out3", C3(192, 64, 1, shortcut=False)),
        Node("detect", Detect((64, 128), num_classes, ANCHORS_PX, (8, 16)), ("out3", "sppf")),
    ]
    return DetectionNetwork(nodes, num_classes, strides=(8, 16))
