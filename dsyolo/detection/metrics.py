"""Detection metrics: COCO's average precision by faster-coco-eval, and precision and recall at the best F1.

All boxes are in pixels of the original images. The result does not depend on the order of the images, so that
validation on many ranks equals that on one to the last digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.base.text import columns, within

MAX_DETECTIONS = 300  # per image, as YOLO does. COCO takes 100, worth about 0.2 points of mAP on COCO.
MOST_COLUMNS = 40  # of a class name in the table
TIED_F1 = 1e-9  # differences below this are rounding, from sums over classes


@dataclasses.dataclass(frozen=True)
class ClassMetrics:
    """One class. Without labels its four figures are None, and it is left out of the means."""

    name: str
    num_images: int  # images that have a label of this class
    num_labels: int
    precision: float | None
    recall: float | None
    map50: float | None
    map50_95: float | None


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Means over the classes that have labels; zeros when there are no labels or no detections at all."""

    map50_95: float  # mean over IoU 0.50, 0.55 .. 0.95 of the precision at 101 recalls
    map50: float
    map75: float
    precision: float  # at `confidence`, IoU 0.5
    recall: float
    confidence: float  # the score at which F1, averaged over classes, is best; 0 if nothing was found
    num_images: int
    num_labels: int
    per_class: tuple[ClassMetrics, ...]
    val_box: float | None = None  # the training's losses over the split; None where they were not measured
    val_obj: float | None = None
    val_cls: float | None = None

    @property
    def fitness(self) -> float:
        """Return 0.1 mAP50 + 0.9 mAP50-95, which selects the best weights and drives early stopping."""
        return 0.1 * self.map50 + 0.9 * self.map50_95

    def to_json(self) -> dict[str, Any]:
        """Return the fields and `fitness` as plain JSON values."""
        fields = dataclasses.asdict(self)
        return {**fields, "fitness": self.fitness, "per_class": list(fields["per_class"])}

    def table(self) -> str:
        """Return the table that YOLO users know: a row for all classes, then one per class ('-': no labels)."""
        names = [within(row.name, MOST_COLUMNS) for row in self.per_class]
        width = max(columns(name) for name in ("Class", *names))
        titles = ("Images", "Labels", *_FIGURES.values())
        lines = [f"{'Class':>{width}}" + "".join(f"{title:>10}" for title in titles)]
        means = (getattr(self, field) for field in _FIGURES)
        of_all = ClassMetrics("all", self.num_images, self.num_labels, *means)
        for name, row in zip(("all", *names), (of_all, *self.per_class), strict=True):
            figures = (getattr(row, field) for field in _FIGURES)
            cells = "".join(f"{'-':>10}" if figure is None else f"{figure:>10.3f}" for figure in figures)
            indent = " " * (width - columns(name))
            lines.append(f"{indent}{name}{row.num_images:>10}{row.num_labels:>10}{cells}")
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """Return what the table does not say: where P and R hold, and the losses if they were measured."""
        lines = [f"P and R: at confidence {self.confidence:.3f}, where the mean F1 of the classes is best"]
        if not self.confidence:
            lines = ["P and R: nothing was found that is right, at any confidence"]
        if self.val_box is not None:
            losses = f"box {self.val_box:.4f}, obj {self.val_obj:.4f}, cls {self.val_cls:.4f}"
            lines.append(f"loss of the split: {losses}")
        return lines


_FIGURES = {"precision": "P", "recall": "R", "map50": "mAP50", "map50_95": "mAP50-95"}


def evaluate(
    ground_truths: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> Metrics:
    """Compare detections with the labels.

    Args:
        ground_truths: one per image, in any order; no `image_id` twice.
        detections: of the same images in the same order. The best 300 of an image count, over all classes.
        class_names: of all K classes.
    """
    one = compare(ground_truths, detections, class_names)
    num_labels, has_labels = one.num_labels, one.num_labels > 0
    ap = one.precision_curves.mean(axis=1)  # (T, K)
    confidence, precision, recall = _at_best_f1(one.scores, one.classes, one.is_true_positive, num_labels)

    def mean(per_class: np.ndarray) -> float:
        return float(per_class[has_labels].mean()) if has_labels.any() else 0.0

    columns = np.stack([precision, recall, ap[0], ap.mean(axis=0)], axis=1)  # (K, 4)
    rows = tuple(
        ClassMetrics(name, int(images), int(labels_), *(figures.tolist() if labels_ else [None] * 4))
        for name, images, labels_, figures in zip(
            class_names, one.num_images, num_labels, columns, strict=True
        )
    )
    return Metrics(
        map50_95=mean(ap.mean(axis=0)),
        map50=mean(ap[0]),
        map75=mean(ap[5]),
        precision=mean(precision),
        recall=mean(recall),
        confidence=confidence,
        num_images=len(ground_truths),
        num_labels=int(num_labels.sum()),
        per_class=rows,
    )


class Comparison(NamedTuple):
    """Detections of all images beside the labels: D detections of classes that have labels, K classes."""

    scores: np.ndarray  # (D,) float64
    classes: np.ndarray  # (D,) int64
    is_true_positive: np.ndarray  # (D,) bool, at IoU 0.5
    precision_curves: np.ndarray  # (10 IoUs, 101 recalls, K), 0 without labels
    num_labels: np.ndarray  # (K,)
    num_images: np.ndarray  # (K,) that have a label of the class


def compare(
    ground_truths: Sequence[GroundTruth], detections: Sequence[Detections], class_names: Sequence[str]
) -> Comparison:
    """Match detections with labels, as `evaluate` says."""
    num_classes = len(class_names)
    pairs = sorted(zip(ground_truths, detections, strict=True), key=lambda pair: pair[0].image_id)
    ground_truths = [ground_truth for ground_truth, _ in pairs]
    assert len({one.image_id for one in ground_truths}) == len(pairs), "an image was evaluated twice"
    found = _Boxes.concatenate([_best(one) for _, one in pairs])
    labels = _Boxes.concatenate([(t.boxes_xyxy, np.ones(len(t.classes)), t.classes) for t in ground_truths])
    for boxes in (found, labels):
        assert boxes.classes.size == 0 or 0 <= boxes.classes.min() <= boxes.classes.max() < num_classes
    num_labels = np.bincount(labels.classes, minlength=num_classes)
    images_and_classes = np.unique(np.stack([labels.images, labels.classes]), axis=1)
    num_images = np.bincount(images_and_classes[1], minlength=num_classes)
    # Others count neither for COCO nor in the mean F1.
    found = found.where(num_labels[found.classes] > 0)
    precision_curves, is_true_positive = _run_coco(ground_truths, labels, found, class_names)
    return Comparison(found.scores, found.classes, is_true_positive, precision_curves, num_labels, num_images)


class _Boxes(NamedTuple):
    """The boxes of all images: image by image, within an image best first."""

    images: np.ndarray  # (N,) int64, position of the image
    boxes_xyxy: np.ndarray  # (N, 4) float64
    scores: np.ndarray  # (N,) float64
    classes: np.ndarray  # (N,) int64

    @classmethod
    def concatenate(cls, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> _Boxes:
        counts = np.array([len(classes) for _, _, classes in parts], np.int64)
        nothing = (np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        boxes, scores, classes = (np.concatenate(column) for column in zip(nothing, *parts, strict=True))
        return cls(np.repeat(np.arange(len(parts)), counts), boxes, scores, classes)

    def where(self, mask: np.ndarray) -> _Boxes:
        return _Boxes(self.images[mask], self.boxes_xyxy[mask], self.scores[mask], self.classes[mask])

    def annotations(self) -> list[dict[str, Any]]:
        """Return COCO annotations. Ids start at 1: its matching uses 0 for "no match"."""
        size_wh = self.boxes_xyxy[:, 2:] - self.boxes_xyxy[:, :2]
        columns = {
            "id": range(1, 1 + len(self.classes)),
            "image_id": self.images.tolist(),
            "category_id": self.classes.tolist(),
            "bbox": np.concatenate([self.boxes_xyxy[:, :2], size_wh], axis=1).tolist(),
            "area": size_wh.prod(axis=1).tolist(),
            "score": self.scores.tolist(),
        }
        return [
            dict(zip(columns, row, strict=True), iscrowd=0) for row in zip(*columns.values(), strict=True)
        ]


def _best(detections: Detections) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    order = np.argsort(-detections.scores, kind="stable")[:MAX_DETECTIONS]
    return detections.boxes_xyxy[order], detections.scores[order], detections.classes[order]


def _run_coco(
    ground_truths: Sequence[GroundTruth], labels: _Boxes, found: _Boxes, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the precision (10 IoUs, 101 recalls, K), 0 without labels, and whether each detection is right at IoU 0.5."""
    num_classes = len(class_names)
    if not len(labels.classes) or not len(found.classes):
        return np.zeros((10, 101, num_classes)), np.zeros(len(found.classes), bool)
    images = [{"id": i, "height": t.size_hw[0], "width": t.size_hw[1]} for i, t in enumerate(ground_truths)]
    categories = [{"id": k, "name": name} for k, name in enumerate(class_names)]
    sides = []
    for boxes in (labels, found):
        content = {"images": images, "categories": categories, "annotations": boxes.annotations()}
        sides.append(COCO(content, print_function=lambda *_: None))
    run = COCOeval_faster(*sides, iouType="bbox", print_function=lambda *_: None)
    run.params.maxDets = [MAX_DETECTIONS]  # per image and class: never cuts, since `_best` did
    run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]  # a quarter of COCO's default work
    run.evaluate()
    run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]  # (T, R, K); -1 for classes without labels
    return np.maximum(precision, 0.0), _true_positives(run.ious, found)


def _true_positives(ious: dict[tuple[int, int], Any], found: _Boxes) -> np.ndarray:
    """Match as COCO does at IoU 0.5: greedily, the best box first, each takes the free label it overlaps most.

    faster-coco-eval's own matches (`eval["matched"]`) mix all thresholds: a box that loses its label at 0.5 and wins
    it at 0.8, where the winner no longer qualifies, would count as right.

    Args:
        ious: by (image, class) the (D, G) IoUs, detections best first; empty where there is nothing to compare.
    """
    is_true_positive = np.zeros(len(found.classes), bool)
    by_pair = np.lexsort((found.classes, found.images))  # stable: within a pair still best first
    pairs = np.stack([found.images, found.classes], axis=1)[by_pair]
    edges = np.flatnonzero(np.any(pairs[1:] != pairs[:-1], axis=1)) + 1
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(pairs)], strict=True):
        rows = by_pair[start:end]
        iou = np.array(ious[tuple(pairs[start].tolist())])  # a copy to write to
        if iou.size == 0:
            continue
        for row in np.flatnonzero((iou >= 0.5).any(axis=1)):
            label = iou.shape[1] - 1 - int(iou[row, ::-1].argmax())  # the last of equals, as COCO
            if iou[row, label] >= 0.5:
                is_true_positive[rows[row]] = True
                iou[:, label] = -1.0  # taken
    return is_true_positive


def _at_best_f1(
    scores: np.ndarray, classes: np.ndarray, is_true_positive: np.ndarray, num_labels: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Find the score at which F1 = 2 TP / (found + labels), averaged over classes with labels, is best.

    Of equally good scores it takes the lowest. Detections are of classes with labels only.

    Returns:
        The score, and precision and recall per class (K,) of the boxes of at least that score; precision is 0 for a
        class without such boxes.
    """
    order = np.argsort(-scores, kind="stable")
    scores, classes, right = scores[order], classes[order], is_true_positive[order]
    if not right.any():
        return 0.0, np.zeros(len(num_labels)), np.zeros(len(num_labels))
    gains = np.zeros(len(scores))  # each box changes the F1 of its own class only
    for k in np.flatnonzero(num_labels):
        rows = np.flatnonzero(classes == k)
        f1 = 2 * np.cumsum(right[rows]) / (np.arange(1, len(rows) + 1) + num_labels[k])
        gains[rows] = np.diff(f1, prepend=0.0)
    mean_f1 = np.cumsum(gains)
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # a threshold takes all of equal score
    best = ends[np.flatnonzero(mean_f1[ends] >= mean_f1[ends].max() - TIED_F1)[-1]]
    num_found = np.bincount(classes[: best + 1], minlength=len(num_labels))
    num_right = np.bincount(classes[: best + 1], weights=right[: best + 1], minlength=len(num_labels))
    return float(scores[best]), num_right / np.maximum(num_found, 1), num_right / np.maximum(num_labels, 1)
