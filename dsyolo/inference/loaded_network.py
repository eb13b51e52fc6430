"""A trained network out of a weights file, on this machine's device, with its NMS."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dsyolo.base.batch import Detections
from dsyolo.base.errors import UserError
from dsyolo.config.run_config import image_size_fault
from dsyolo.data.loader import stack_images
from dsyolo.detection.boxes import letterbox, unletterbox
from dsyolo.detection.postprocess import PlainPredictor, PostProcessor
from dsyolo.models.registry import meta_network
from dsyolo.models.weights import rebuild


class LoadedNetwork(NamedTuple):
    """A trained network on this machine's device."""

    class_names: tuple[str, ...]
    image_size_px: int
    stride: int  # pixels that the sides of images must be multiples of
    strides: tuple[int, ...]  # pixels per cell of each level
    anchors: torch.Tensor  # (L, A, 2) widths and heights in cells
    predict: PlainPredictor
    postprocess: PostProcessor

    def detect(self, images_rgb: Sequence[np.ndarray]) -> list[Detections]:
        """Return the objects of each image (H, W, 3) uint8, in its own pixels.

        Every image is scaled to a long side of `image_size_px`; those that have one shape then go through together.
        """
        shapes = [self._input_shape(image) for image in images_rgb]
        found: list[Detections | None] = [None] * len(images_rgb)
        for shape in dict.fromkeys(shapes):
            members = [i for i, other in enumerate(shapes) if other == shape]
            padded = [letterbox(images_rgb[i], shape) for i in members]
            decoded = self.predict(stack_images([image for image, _, _ in padded]))
            for i, (_, scale, pad_xy), boxes in zip(members, padded, decoded, strict=True):
                one = self.postprocess(boxes)
                size_hw = (images_rgb[i].shape[0], images_rgb[i].shape[1])
                found[i] = one._replace(boxes_xyxy=unletterbox(one.boxes_xyxy, scale, pad_xy, size_hw))
        return [one for one in found if one is not None]

    def _input_shape(self, image_rgb: np.ndarray) -> tuple[int, int]:
        height, width = image_rgb.shape[:2]
        scale = self.image_size_px / max(height, width)
        height_px, width_px = (
            -(-round(side * scale) // self.stride) * self.stride for side in (height, width)
        )
        return height_px or self.stride, width_px or self.stride


def load_network(
    weights: Path,
    postprocess: PostProcessor,
    *,
    model: str | None = None,
    imgsz: int | None = None,
    device: str = "auto",
) -> LoadedNetwork:
    """Load the network of a weights file.

    Args:
        postprocess: the thresholds.
        model: FILE.py:FUNCTION that builds a network of the user's own.
        imgsz: long side of images in pixels; None: that of the training.
        device: auto: a GPU if there is one; cpu.

    Raises:
        UserError: the weights cannot be used, or not with this `imgsz`.
    """
    network, info = rebuild(weights, model)
    size_px = info.image_size_px if imgsz is None else imgsz
    stride = meta_network(model or info.variant).size_multiple_px
    if fault := image_size_fault(size_px, info.variant, stride, times=1):
        raise UserError("The command line cannot be used", [f"--imgsz: {fault}"])
    on = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    anchors = network.anchors.clone()  # before they move to the device
    predictor = PlainPredictor(network, on)
    return LoadedNetwork(info.names, size_px, stride, network.strides, anchors, predictor, postprocess)
