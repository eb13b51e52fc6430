"""The blocks of YOLOv5: Conv, Bottleneck, C3, SPPF, Upsample, Concat, Detect. Shapes: B C H W."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm in fp32 whatever the precision of its input and of its parameters.

    Under DeepSpeed's `bf16.enabled` the parameters are bf16 and the statistics fp32, which torch's own
    module refuses on a CPU. `num_batches_tracked` stays in weight files but is not updated: with a fixed
    momentum nothing reads it, and updating it costs a kernel per layer.

    Attributes:
        frozen: normalise with the running statistics in training too, and do not update them.
        moves_statistics: False while activation checkpointing repeats a forward pass.
    """

    moves_statistics = True

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-3, momentum=0.03)
        self.frozen = False

    def normalise(self, *args: Any) -> torch.Tensor:
        """Call `F.batch_norm`; engine/batchnorm.py replaces this method."""
        return F.batch_norm(*args)  # looked up at each call: DeepSpeed's profiler replaces it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training and not self.moves_statistics and mean is not None and var is not None:
            # Update copies instead. None would make autograd save fewer tensors than in the first pass, and a
            # momentum of 0 would turn an infinity into NaN.
            mean, var = mean.clone(), var.clone()
        moves = self.training and not self.frozen
        weight, bias = self.weight.float(), self.bias.float()
        return self.normalise(x, mean, var, weight, bias, moves, self.momentum, self.eps)


def freeze_batchnorm(network: nn.Module) -> None:
    """Freeze the statistics of every BatchNorm of `network`."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.frozen = True


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, SiLU. (B, c1, H, W) -> (B, c2, H / stride, W / stride)."""

    def __init__(
        self, c1: int, c2: int, kernel: int = 1, stride: int = 1, padding: int | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, kernel, stride, kernel // 2 if padding is None else padding, bias=False)
        self.bn = BatchNorm(c2)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class Stem(Conv):
    """The first Conv, 6x6 with stride 2. It also scales uint8 images to [0, 1].

    Images travel as uint8, a quarter of the bytes; float images must be in [0, 1] already.
    """

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__(c1, c2, kernel=6, stride=2, padding=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images / 255 if images.dtype == torch.uint8 else images
        return super().forward(x.to(self.conv.weight.dtype))


class Bottleneck(nn.Module):
    """Conv 1x1, Conv 3x3, plus the input if `shortcut`. Keeps the shape."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels)
        self.cv2 = Conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """Two 1x1 branches of half the channels, `repeats` Bottlenecks on one of them, joined by a 1x1 Conv."""

    def __init__(self, c1: int, c2: int, repeats: int, shortcut: bool) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.cv3 = Conv(2 * hidden, c2)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut) for _ in range(repeats)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling, fast: three chained 5x5 max-pools equal pools of 5, 9 and 13."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(4 * hidden, c2)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.cv1(x)
        y1 = self.pool(x)
        y2 = self.pool(y1)
        return self.cv2(torch.cat((x, y1, y2, self.pool(y2)), 1))


class Upsample(nn.Module):
    """Nearest neighbour, twice as high and wide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Concat(nn.Module):
    """Concatenates its inputs along the channels."""

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return torch.cat(xs, 1)


class Detect(nn.Module):
    """One 1x1 convolution per level, to raw maps (B, A, H, W, 5 + K): x, y, w, h, objectness, classes.

    Args:
        channels: of the levels' inputs, finest level first.
        anchors_px: (L, A, 2) widths and heights in pixels: a tensor, or nested sequences.
        strides: pixels per cell of each level.

    The biases start at the prior of docs/yolov5.md: 8 objects expected by every anchor
    of every level at 640 px, class odds of 0.6 / (K - 0.99999).
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        anchors_px: torch.Tensor | Sequence[Sequence[Sequence[float]]],
        strides: Sequence[int],
    ) -> None:
        super().__init__()
        anchors_px = torch.as_tensor(anchors_px, dtype=torch.float32)
        self.num_classes = num_classes
        self.num_anchors = anchors_px.shape[1]
        num_outputs = 5 + num_classes
        self.m = nn.ModuleList(nn.Conv2d(c, self.num_anchors * num_outputs, 1) for c in channels)
        self.register_buffer("anchors", anchors_px / torch.tensor(strides).view(-1, 1, 1))
        with torch.no_grad():
            for conv, stride in zip(self.m, strides, strict=True):
                bias = conv.get_parameter("bias").view(self.num_anchors, num_outputs)
                bias[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (num_classes - 0.99999))

    def forward(self, *xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._raw_map(conv(x)) for conv, x in zip(self.m, xs, strict=True))

    def _raw_map(self, y: torch.Tensor) -> torch.Tensor:
        b, _, h, w = y.shape
        return y.view(b, self.num_anchors, 5 + self.num_classes, h, w).permute(0, 1, 3, 4, 2)
