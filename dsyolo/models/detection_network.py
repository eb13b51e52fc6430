"""A detector: a network whose last node gives raw maps at several strides, and the decoding of these maps."""

from collections.abc import Sequence

import torch

from dsyolo.models.network import Network, Node


class DetectionNetwork(Network):
    """A detector. `forward(images)` returns the raw maps, one (B, A, H, W, 5 + K) per level.

    Args:
        nodes: the first one reads the images: (B, 3, H, W), uint8, or floats in [0, 1]. Every node returns one
            (B, C, H, W) tensor, but the last, the head: it returns the maps, and has a buffer `anchors` (L, A, 2)
            of widths and heights in cells, as `blocks.Detect` does.
        num_classes: K.
        strides: pixels per cell of each level, finest first.
        size_multiple_px: sides of images are multiples of it, by default of the largest stride. Give it where the
            network goes down further than its levels.

    Attributes:
        variant: the name that weights files give it: `yolov5n`, or `my_net.py:build`.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        num_classes: int,
        strides: Sequence[int],
        *,
        size_multiple_px: int | None = None,
        variant: str = "",
    ) -> None:
        super().__init__(nodes)
        self.variant = variant
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.size_multiple_px = size_multiple_px or self.strides[-1]

    @property
    def head(self) -> str:
        """Name of the last node."""
        return self.order[-1]

    @property
    def anchors(self) -> torch.Tensor:
        """(L, A, 2) widths and heights in cells of the level."""
        return self.get_buffer(f"{self.head}.anchors")

    def decode(self, maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the boxes and probabilities of raw maps, (B, boxes, 5 + K) float32.

        Per box: centre and size in pixels of the input, objectness, class probabilities. Levels in order,
        each flattened A, H, W. centre = (2 s - 0.5 + cell) * stride, size = (2 s)^2 * anchor (docs/yolov5.md, Decoding).
        """
        decoded = []
        for raw, anchors, stride in zip(maps, self.anchors.float(), self.strides, strict=True):
            b, a, h, w, outputs = raw.shape
            s = raw.float().sigmoid()
            ys = torch.arange(h, device=raw.device, dtype=torch.float32)
            xs = torch.arange(w, device=raw.device, dtype=torch.float32)
            cells = torch.stack((xs.expand(h, w), ys[:, None].expand(h, w)), -1)
            centres = (s[..., :2] * 2 - 0.5 + cells) * stride
            sizes = (s[..., 2:4] * 2) ** 2 * (anchors * stride).view(1, a, 1, 1, 2)
            decoded.append(torch.cat((centres, sizes, s[..., 4:]), -1).view(b, a * h * w, outputs))
        return torch.cat(decoded, 1)
