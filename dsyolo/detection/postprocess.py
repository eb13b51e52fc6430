"""From a network's decoded boxes to detections: score threshold, NMS, and prediction that survives a full device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsyolo.base.batch import Detections
from dsyolo.base.out_of_memory import is_out_of_memory
from dsyolo.detection.boxes import cxcywh_to_xyxy, nms

# Before NMS; its cost is bounded by this times the detections kept. An untrained network passes them by the thousands.
MAX_CANDIDATES = 5_000

Predict = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, 3, H, W) -> decoded (B, boxes, 5 + K)


class PostProcessor:
    """Detections from decoded boxes.

    Args:
        score_threshold: least objectness x class probability.
        iou_threshold: of the suppression within a class.
        max_detections: per image.
        multi_label: a box may be reported under several classes, as validation wants it; else under its best.
    """

    def __init__(
        self,
        score_threshold: float,
        iou_threshold: float,
        max_detections: int = 300,
        *,
        multi_label: bool = True,
    ) -> None:
        self.score_threshold, self.iou_threshold = score_threshold, iou_threshold
        self.max_detections, self.multi_label = max_detections, multi_label

    def __call__(self, decoded: torch.Tensor) -> Detections:
        """The detections of one image in pixels of the network's input.

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
        boxes = cxcywh_to_xyxy(decoded[box, :4]).cpu().numpy()
        score, kind = score.cpu().numpy(), kind.cpu().numpy()
        keep = nms(boxes, score, kind, self.iou_threshold, self.max_detections)
        return Detections(boxes[keep], score[keep], kind[keep])


class OomSafePredictor:
    """Predicts with half as many images at a time where memory runs out, and keeps to it.

    Args:
        predict: needs no other rank.
        tell: gets a line.
        free: gives memory back that nobody uses.
    """

    def __init__(self, predict: Predict, tell: Callable[[str], None], free: Callable[[], None]) -> None:
        self._predict, self._tell, self._free = predict, tell, free
        self._most: int | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """As `predict`.

        Raises:
            RuntimeError, MemoryError: of one image too.
        """
        while True:
            most = min(self._most or len(images), len(images))
            try:
                parts = [self._predict(part) for part in images.split(most)]
                return torch.cat(parts) if len(parts) > 1 else parts[0]
            except (RuntimeError, MemoryError) as error:
                if most == 1 or not is_out_of_memory(error):
                    raise
            self._free()
            self._most = most // 2
            self._tell(
                f"WARNING: out of memory with {most} images to validate at a time: from now on {self._most}. "
                f"--val_batch_size {self._most} does without the try."
            )


class PlainPredictor:
    """Predicts with a network as it is, without an engine: for weights files.

    Args:
        network: in eval mode; moved to the device, channels-last.
    """

    def __init__(self, network, device: torch.device) -> None:
        self._network = network.to(device, memory_format=torch.channels_last)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self._device, non_blocking=True)
        return self._network.decode(self._network(images.contiguous(memory_format=torch.channels_last)))
