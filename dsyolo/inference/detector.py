"""Detection from a program: `load("best.safetensors")("image.jpg")`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from dsyolo.base.batch import Detections
from dsyolo.base.errors import UserError
from dsyolo.data.images import check_image, read_rgb
from dsyolo.detection.postprocess import PostProcessor
from dsyolo.inference.loaded_network import LoadedNetwork, load_network
from dsyolo.tracking.plots import draw, save

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

BATCH = 16  # images that go through the network at a time


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """The objects of one image, best first. N objects.

    Attributes:
        boxes_xyxy: (N, 4) float32, left, top, right and bottom in pixels of the image.
        scores: (N,) float32, objectness times class probability, from 0 to 1.
        classes: (N,) int64, indices into `names`.
        names: of all classes of the network.
        image_rgb: (H, W, 3) uint8, the image itself.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    names: tuple[str, ...]
    image_rgb: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def plot(self) -> np.ndarray:
        """Return a copy of the image with boxes, classes and scores: (H, W, 3) uint8, RGB."""
        return draw(self.image_rgb, Detections(self.boxes_xyxy, self.scores, self.classes), self.names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `plot()` as .jpg or .png. Raise UserError for another suffix, OSError where nothing can be written."""
        target = Path(path)
        if target.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            raise UserError(
                f"{target} cannot be written", ["pictures are .jpg or .png. Give it such a suffix."]
            )
        save(target, self.plot())

    def to_json(self) -> list[dict[str, Any]]:
        """Return a dictionary of plain values per object: name, class, score, box_xyxy."""
        rows = zip(self.boxes_xyxy.tolist(), self.scores.tolist(), self.classes.tolist(), strict=True)
        return [
            {"name": self.names[klass], "class": klass, "score": score, "box_xyxy": box}
            for box, score, klass in rows
        ]

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with the class names under `class_name`. Raise UserError without that package."""
        try:
            import supervision
        except ImportError:
            raise UserError(
                "There is no package supervision", ["Install it: pip install supervision."]
            ) from None
        names = np.array([self.names[klass] for klass in self.classes.tolist()], dtype=str)
        return supervision.Detections(
            xyxy=self.boxes_xyxy.reshape(-1, 4),
            confidence=self.scores,
            class_id=self.classes.astype(int),
            data={"class_name": names},
        )


class Detector:
    """A trained network that is called with images. Threads may share it.

    Attributes:
        names: of the classes.
        image_size_px: long side that images are scaled to.
    """

    def __init__(self, network: LoadedNetwork) -> None:
        self._network = network
        self.names, self.image_size_px = network.class_names, network.image_size_px

    @overload
    def __call__(self, images: str | os.PathLike[str] | np.ndarray | PilImage) -> ImageDetections: ...
    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[ImageDetections]: ...
    def __call__(self, images: Any) -> ImageDetections | list[ImageDetections]:
        """Return the objects of an image, or of each image of a list.

        Args:
            images: a file; an array (H, W, 3) or (H, W) uint8, RGB or grey; a PIL image; or a list of these.

        Raises:
            UserError: a file is no image that can be read, or an array has another shape or type.
        """
        if isinstance(images, list | tuple):
            pixels = [_pixels(image, number) for number, image in enumerate(images)]
            parts = [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]
            found = [one for part in parts for one in self._network.detect(part)]
            return [self._result(one, image) for one, image in zip(found, pixels, strict=True)]
        image_rgb = _pixels(images)
        (one,) = self._network.detect([image_rgb])
        return self._result(one, image_rgb)

    def _result(self, found: Detections, image_rgb: np.ndarray) -> ImageDetections:
        return ImageDetections(found.boxes_xyxy, found.scores, found.classes, self.names, image_rgb)


def load(
    weights: str | os.PathLike[str],
    *,
    model: str | None = None,
    imgsz: int | None = None,
    device: str = "auto",
    score: float = 0.25,
    iou: float = 0.45,
    max_detections: int = 300,
    multi_label: bool = False,
) -> Detector:
    """Load trained weights for detection.

    Args:
        weights: a .safetensors file of a run, or a file of YOLOv5's own.
        model: FILE.py:FUNCTION for weights of a network of your own.
        imgsz: long side that images are scaled to, in pixels; None: that of the training.
        device: auto: a GPU if there is one; or cpu.
        score: least score of a detection, 0 to 1.
        iou: detections of one class that overlap a better one by more than this are dropped, 0 to 1.
        max_detections: of an image.
        multi_label: report a box under each of its classes, as validation does.

    Raises:
        UserError: the file cannot be used, or an argument is out of its range.
    """
    problems = [
        f"{name}: {value} given, but it must be from 0 to 1."
        for name, value in (("score", score), ("iou", iou))
        if not 0 <= value <= 1
    ]
    if device not in ("auto", "cpu"):
        problems.append(
            f"device: {device} given, but it must be auto or cpu. CUDA_VISIBLE_DEVICES chooses a GPU."
        )
    if max_detections < 1:
        problems.append(f"max_detections: {max_detections} given, but it must be at least 1.")
    if problems:
        raise UserError("dsyolo.load cannot use these arguments", problems)
    postprocess = PostProcessor(score, iou, max_detections, multi_label)
    return Detector(load_network(Path(weights), postprocess, model=model, imgsz=imgsz, device=device))


def _pixels(image: Any, number: int | None = None) -> np.ndarray:
    """Return an image as (H, W, 3) uint8, RGB."""
    where = "The image" if number is None else f"Image {number} of the list"
    if isinstance(image, str | os.PathLike):
        size_hw, reason, detail = check_image(os.fspath(image))
        pixels = None if size_hw is None else read_rgb(os.fspath(image), size_hw, max(size_hw))
        if pixels is None:
            raise UserError(f"{os.fspath(image)} cannot be used", [": ".join(filter(None, (reason, detail)))])
        return pixels
    if not isinstance(image, np.ndarray) and hasattr(image, "convert"):  # PIL's
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"{where} cannot be used",
            [f"it is a {type(image).__name__}. Give a file, an array or a PIL image."],
        )
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        rule = f"an array of shape {image.shape} and type {image.dtype}, but it must be (H, W, 3) or (H, W), uint8"
        raise UserError(
            f"{where} cannot be used", [f"{rule}. Turn it into one, in the order red, green, blue."]
        )
    return np.ascontiguousarray(image)
