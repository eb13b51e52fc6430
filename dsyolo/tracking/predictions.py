"""The picture of a validation: each image's ground truth beside its detections, with what is false and what was missed."""

from collections.abc import Sequence

import numpy as np

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.boxes import pairwise_iou
from dsyolo.tracking.picture_text import Text, drawable_names
from dsyolo.tracking.plots import draw_box, fit, grid, write_label

# RGB; blue and red are kept apart by everybody, and what was missed is dashed too.
RIGHT, FALSE, MISSED = (25, 90, 200), (205, 30, 30), (245, 160, 0)
MATCH_IOU = 0.5
CELL_PX, PAIRS_PER_ROW = 400, 2
TEXT_PX = 11.0  # height of a capital letter


def matches(ground_truth: GroundTruth, detections: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Return which labels were found, (N,) bool, and which detections are right, (D,) bool.

    As the metrics match: the best box first, each takes the free label of its class that it overlaps most, if by an
    IoU of 0.5.
    """
    iou = pairwise_iou(detections.boxes_xyxy, ground_truth.boxes_xyxy)
    iou *= detections.classes[:, None] == ground_truth.classes[None]
    was_found = np.zeros(len(ground_truth.classes), bool)
    is_right = np.zeros(len(detections.classes), bool)
    for row in np.argsort(-detections.scores, kind="stable") if iou.size else ():
        free = np.where(was_found, 0.0, iou[row])
        label = int(free.argmax())
        if free[label] >= MATCH_IOU:
            was_found[label] = is_right[row] = True
    return was_found, is_right


def draw_pair(
    image_rgb: np.ndarray, ground_truth: GroundTruth, detections: Detections, class_names: Sequence[str]
) -> np.ndarray:
    """Return the image twice, side by side: with its labels, and with its detections.

    Args:
        image_rgb: (H, W, 3) uint8, as in its file.
        ground_truth, detections: in pixels of `image_rgb`.
    """
    was_found, is_right = matches(ground_truth, detections)
    small = fit(
        image_rgb, CELL_PX
    )  # drawn on at its final size, so that texts are readable whatever the image's
    scale = small.shape[1] / image_rgb.shape[1]
    shown = drawable_names(class_names)
    names = [shown[k] for k in ground_truth.classes]
    left = _drawn(small, ground_truth.boxes_xyxy * scale, names, was_found, MISSED)
    best_last = np.argsort(detections.scores, kind="stable")
    texts = [f"{shown[detections.classes[i]]} {detections.scores[i]:.2f}" for i in best_last]
    right = _drawn(small, detections.boxes_xyxy[best_last] * scale, texts, is_right[best_last], FALSE)
    gap = np.full((small.shape[0], 2, 3), 255, np.uint8)
    return np.concatenate((left, gap, right), 1)


def draw_sheet(pairs: Sequence[np.ndarray], shown_score: float) -> np.ndarray:
    """Return the pairs of `draw_pair` in a grid below a legend; detections are those above `shown_score`."""
    sheet = grid(pairs, columns=PAIRS_PER_ROW, cell_px=2 * CELL_PX, gap_px=12)
    legend = np.full((40, sheet.shape[1], 3), 255, np.uint8)
    x = 8
    entries = (
        (f"left: labels, right: detections above {shown_score}", None),
        ("found", RIGHT),
        ("missed", MISSED),
        ("false", FALSE),
    )
    for text, rgb in entries:
        if rgb is not None:
            draw_box(legend, np.array([x, 12, x + 22, 28]), rgb, 2, dashed=rgb == MISSED)
            x += 30
        label = Text(text, TEXT_PX)
        label.draw(legend, (x, 26), (0, 0, 0))
        x += label.width + 24
    return np.concatenate((legend, sheet))


def _drawn(
    image_rgb: np.ndarray,
    boxes_xyxy: np.ndarray,
    texts: Sequence[str],
    is_good: np.ndarray,
    bad: tuple[int, int, int],
) -> np.ndarray:
    """Return a copy with boxes in green, and in `bad` those that are not good; missed ones are dashed."""
    picture = np.array(image_rgb, order="C")
    colours = [RIGHT if good else bad for good in is_good]
    for box, rgb in zip(boxes_xyxy, colours, strict=True):
        draw_box(picture, box, rgb, 2, dashed=rgb == MISSED)
    for box, text, rgb in zip(boxes_xyxy, texts, colours, strict=True):  # last: boxes would cross them
        write_label(picture, text, box, rgb, TEXT_PX)
    return picture
