"""How well anchors fit the labels of a data set: labels that match none are never learned."""

from typing import NamedTuple

import numpy as np

CHUNK = 100_000  # labels at a time
FEW = 0.02  # share of unmatched labels from which on it is a warning


class AnchorFit(NamedTuple):
    """Labels that no anchor can match, at the size of training."""

    num_labels: int
    unmatched_wh: np.ndarray  # (U, 2) px
    anchor_t: float
    image_size_px: int

    @property
    def best_possible_recall(self) -> float:
        """Return the share of labels that some anchor matches; 1 without labels."""
        return 1 - len(self.unmatched_wh) / max(self.num_labels, 1)

    @property
    def needs_warning(self) -> bool:
        return 1 - self.best_possible_recall > FEW

    def summary(self) -> str:
        """Return what a user must know, as one line."""
        recall = f"best possible recall {_floored(self.best_possible_recall)}"
        if not len(self.unmatched_wh):
            return f"anchors: all {self.num_labels:,} labels match one at {self.image_size_px} px, {recall}"
        share = len(self.unmatched_wh) / self.num_labels
        small, large = self.unmatched_wh.min(0), self.unmatched_wh.max(0)
        return (
            f"anchors: {len(self.unmatched_wh):,} of {self.num_labels:,} labels ({share:.2%}) match none at "
            f"{self.image_size_px} px, as a side differs {self.anchor_t:g} times or more: {recall}. They are from "
            f"{small[0]:.1f} x {small[1]:.1f} to {large[0]:.1f} x {large[1]:.1f} px; another --imgsz or a larger "
            "--anchor_t matches more."
        )


def _floored(recall: float) -> str:
    """Return a recall with four digits, never rounded up to 1."""
    return f"{np.floor(recall * 1e4) / 1e4:.4f}"


def fit_anchors(
    anchors_px: np.ndarray, boxes_wh: np.ndarray, image_wh: np.ndarray, image_size_px: int, anchor_t: float
) -> AnchorFit:
    """Compare all labels with all anchors, by the rule of the assignment (assigner.py), without augmentation.

    Args:
        anchors_px: (..., 2) widths and heights.
        boxes_wh: (T, 2) as shares of their images.
        image_wh: (T, 2) size of each label's image, in any unit.
        image_size_px: the long side that images are scaled to.
    """
    anchors = anchors_px.reshape(-1, 2).astype(np.float64)
    unmatched = [np.zeros((0, 2))]
    for start in range(0, len(boxes_wh), CHUNK):
        sizes = image_wh[start : start + CHUNK].astype(np.float64)
        wh = boxes_wh[start : start + CHUNK] * sizes * (image_size_px / sizes.max(1, keepdims=True))
        ratio = wh[:, None] / anchors[None]  # (T, A, 2)
        matches = np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)).max(-1) < anchor_t
        unmatched.append(wh[~matches.any(1)])
    return AnchorFit(len(boxes_wh), np.concatenate(unmatched), anchor_t, image_size_px)
