"""From images to detections: prediction that survives running out of memory, score threshold and NMS."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dsyolo.base.batch import Detections, EvalBatch, Targets
from dsyolo.base.out_of_memory import is_out_of_memory
from dsyolo.detection.boxes import cxcywh_to_xyxy, nms
from dsyolo.detection.loss import DetectionLoss
from dsyolo.detection.validation_loss import PredictBatch, Prediction

# Before NMS, whose cost is bounded by this times the detections kept. An untrained network gives thousands.
MAX_CANDIDATES = 5_000


@dataclass(frozen=True)
class PostProcessor:
    """Turns decoded boxes into detections."""

    score_threshold: float  # minimum objectness x class probability
    iou_threshold: float  # NMS within a class drops boxes above it
    max_detections: int = 300  # per image
    multi_label: bool = True  # report a box under every class above the threshold, not only the best one

    def __call__(self, decoded: torch.Tensor) -> Detections:
        """Return the detections of one image, in pixels of the network's input.

        Args:
            decoded: (boxes, 5 + K): centre, size, objectness, class probabilities.
        """
        decoded = decoded[decoded[:, 4] > self.score_threshold]
        scores = decoded[:, 4:5] * decoded[:, 5:]
        if self.multi_label:
            box, kind = torch.nonzero(scores > self.score_threshold, as_tuple=True)
            score = scores[box, kind]
        else:
            score, kind = scores.max(1)
            box = torch.nonzero(score > self.score_threshold)[:, 0]
            score, kind = score[box], kind[box]
        if len(score) > MAX_CANDIDATES:
            score, best = score.topk(MAX_CANDIDATES)
            box, kind = box[best], kind[best]
        columns = (cxcywh_to_xyxy(decoded[box, :4]), score, kind)
        boxes, scores_np, classes = (column.cpu().numpy() for column in columns)
        keep = nms(boxes, scores_np, classes, self.iou_threshold, self.max_detections)
        return Detections(boxes[keep], scores_np[keep], classes[keep])


@dataclass
class OomSafePredictor:
    """Halves the number of images at a time when memory runs out, for good."""

    predict: PredictBatch  # must not need other ranks
    warn: Callable[[str], None]  # gets a message
    free: Callable[[], None]  # releases cached memory
    _limit: int | None = field(default=None, init=False)

    def __call__(self, batch: EvalBatch) -> Prediction:
        """Predict as `predict` does.

        Raises:
            RuntimeError, MemoryError: memory runs out even with one image, or `predict` fails otherwise.
        """
        images, labels = batch
        while True:
            limit = min(self._limit or len(images), len(images))
            starts = range(0, len(images), limit)
            try:
                parts = [
                    self.predict(EvalBatch(images[i : i + limit], labels[i : i + limit])) for i in starts
                ]
                if len(parts) == 1:
                    return parts[0]
                decoded = torch.cat([part.decoded for part in parts])
                return Prediction(decoded, tuple(loss for part in parts for loss in part.losses))
            except (RuntimeError, MemoryError) as error:
                if limit == 1 or not is_out_of_memory(error):
                    raise
            self.free()
            self._limit = limit // 2
            self.warn(
                f"Out of memory while validating {limit} images at a time: {self._limit} from now on. "
                f"Set --val_batch_size {self._limit} to avoid this."
            )


class PlainPredictor:
    """Predicts with a network without an engine, for weights files.

    Args:
        network: in eval mode; moved to the device, channels-last.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self._network = network.to(device, memory_format=torch.channels_last)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return decoded boxes (B, boxes, 5 + K) of uint8 images (B, 3, H, W)."""
        return self._network.decode(self._maps(images))

    @torch.inference_mode()
    def with_loss(
        self, loss: DetectionLoss, images: torch.Tensor, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return decoded boxes, and the sums (L, 3) of `loss`, which is moved to the device."""
        maps = self._maps(images)
        on_device = Targets(*(tensor.to(self._device, non_blocking=True) for tensor in targets))
        sums = loss.to(self._device).level_sums(maps, on_device)  # first: it takes less memory than decoding
        return self._network.decode(maps), sums

    def _maps(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = images.to(self._device, non_blocking=True)
        return self._network(images.contiguous(memory_format=torch.channels_last))
