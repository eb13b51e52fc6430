"""mAP, precision and recall against hand-computed cases and a naive implementation of COCO's definition."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.detection.metrics import Metrics, evaluate

NAMES = ("cat", "dog", "hen")
SQUARE = (0, 0, 10, 10)
FAR = (50, 50, 60, 60)


def ground_truth(*labels: tuple[tuple[float, ...], int], image_id: int = 0) -> GroundTruth:
    """Labels are (xyxy, class)."""
    boxes = np.array([box for box, _ in labels], np.float32).reshape(-1, 4)
    return GroundTruth(
        image_id, (100, 100), boxes, np.array([k for _, k in labels], np.int64), 1.0, (0.0, 0.0)
    )


def found(*boxes: tuple[tuple[float, ...], int, float]) -> Detections:
    """Boxes are (xyxy, class, score)."""
    return Detections(
        np.array([box for box, _, _ in boxes], np.float32).reshape(-1, 4),
        np.array([score for _, _, score in boxes], np.float32),
        np.array([k for _, k, _ in boxes], np.int64),
    )


def one_class(labels: list[tuple[float, ...]], boxes: list[tuple[tuple[float, ...], float]]) -> Metrics:
    return evaluate(
        [ground_truth(*((box, 0) for box in labels))], [found(*((b, 0, s) for b, s in boxes))], ["cat"]
    )


def test_a_perfect_box_scores_one():
    metrics = one_class([SQUARE], [(SQUARE, 0.7)])
    assert (metrics.map50_95, metrics.map50, metrics.map75, metrics.fitness) == pytest.approx((1, 1, 1, 1))
    assert (metrics.precision, metrics.recall) == (1, 1)
    assert metrics.confidence == pytest.approx(0.7)


def test_a_wrong_box_before_the_right_one_halves_the_precision_at_every_recall():
    metrics = one_class([SQUARE], [(FAR, 0.9), (SQUARE, 0.8)])
    assert metrics.map50_95 == pytest.approx(0.5)
    assert (metrics.precision, metrics.recall) == (0.5, 1)


def test_half_of_the_labels_found_reaches_51_of_101_recalls():
    metrics = one_class([SQUARE, FAR], [(SQUARE, 0.9)])
    assert metrics.map50 == pytest.approx(51 / 101)
    assert (metrics.precision, metrics.recall) == (1, 0.5)


def test_an_iou_of_062_is_right_at_three_of_ten_thresholds():
    metrics = one_class([SQUARE], [((0, 0, 10, 6.2), 0.9)])
    assert (metrics.map50, metrics.map75, metrics.map50_95) == pytest.approx((1, 0, 0.3))
    assert metrics.fitness == pytest.approx(0.1 * 1 + 0.9 * 0.3)


def test_a_second_box_on_one_label_is_wrong():
    # IoU 0.6 with the higher score, then 0.9: from 0.65 on the second is right, which must not leak into P at 0.5.
    metrics = one_class([SQUARE, FAR], [((0, 0, 10, 6), 0.9), ((0, 0, 10, 9), 0.8), (FAR, 0.7)])
    assert (metrics.precision, metrics.recall) == pytest.approx((2 / 3, 1))


def test_the_best_f1_is_that_of_one_score_for_all_classes():
    # cat alone would take both boxes (score >= 0.2), dog only its first; F1 means: at 0.9: (2/3 + 1) / 2 = 0.83,
    # at 0.2: (1 + 2/4) / 2 = 0.75.
    labels = ground_truth((SQUARE, 0), (FAR, 0), (SQUARE, 1))
    wrong = (20, 20, 30, 30)
    boxes = found((SQUARE, 0, 0.9), (SQUARE, 1, 0.9), (wrong, 1, 0.5), (FAR, 1, 0.3), (FAR, 0, 0.2))
    metrics = evaluate([labels], [boxes], NAMES[:2])
    assert metrics.confidence == pytest.approx(0.9)
    cat, dog = metrics.per_class
    assert (cat.precision, cat.recall, dog.precision, dog.recall) == (1, 0.5, 1, 1)
    assert (metrics.precision, metrics.recall) == (1, 0.75)


def test_of_equally_good_scores_the_lowest_is_taken():
    # F1 = 2 TP / (boxes + labels): 2/3, 1/2, 2/5, 2/3
    wrong = (20, 20, 30, 30)
    metrics = one_class([SQUARE, FAR], [(SQUARE, 0.9), (wrong, 0.8), (wrong, 0.7), (FAR, 0.6)])
    assert metrics.confidence == pytest.approx(0.6)
    assert (metrics.precision, metrics.recall) == (0.5, 1)


def test_a_class_without_labels_counts_in_no_mean():
    boxes = found((FAR, 2, 0.95), (SQUARE, 0, 0.9), (FAR, 2, 0.1))
    metrics = evaluate([ground_truth((SQUARE, 0))], [boxes], NAMES)
    assert (metrics.map50_95, metrics.precision, metrics.recall) == (pytest.approx(1), 1, 1)
    assert metrics.confidence == pytest.approx(0.9)
    hen = metrics.per_class[2]
    assert (hen.num_labels, hen.precision, hen.recall, hen.map50, hen.map50_95) == (0, None, None, None, None)


@pytest.mark.parametrize(
    ("ground_truths", "detections"),
    [
        ([], []),
        ([ground_truth()], [found()]),
        ([ground_truth()], [found((SQUARE, 1, 0.5))]),
        ([ground_truth((SQUARE, 1))], [found()]),
        ([ground_truth((SQUARE, 1))], [found((FAR, 0, 0.5))]),
        ([ground_truth((SQUARE, 1))], [found((FAR, 1, 0.5))]),
    ],
    ids=["no images", "nothing", "no labels", "no boxes", "only boxes of other classes", "only wrong boxes"],
)
def test_nothing_right_gives_zeros(ground_truths: list[GroundTruth], detections: list[Detections]):
    metrics = evaluate(ground_truths, detections, NAMES)
    assert (metrics.map50_95, metrics.map50, metrics.map75, metrics.fitness) == (0, 0, 0, 0)
    assert (metrics.precision, metrics.recall, metrics.confidence) == (0, 0, 0)
    assert (metrics.num_images, metrics.num_labels) == (
        len(ground_truths),
        sum(len(t.classes) for t in ground_truths),
    )
    json.dumps(metrics.to_json(), allow_nan=False)


def test_of_an_image_the_best_300_boxes_count():
    wrong = [(FAR, 0, 0.9)] * 299
    last = evaluate([ground_truth((SQUARE, 1))], [found(*wrong, (SQUARE, 1, 0.1))], NAMES)
    beyond = evaluate([ground_truth((SQUARE, 1))], [found(*wrong, (FAR, 2, 0.8), (SQUARE, 1, 0.1))], NAMES)
    assert (last.map50, beyond.map50) == (pytest.approx(1), 0)


def test_images_and_labels_are_counted_and_an_image_may_come_once_only():
    ground_truths = [
        ground_truth((SQUARE, 0), (FAR, 0)),
        ground_truth((SQUARE, 0), (FAR, 2), image_id=1),
        ground_truth(image_id=2),
    ]
    metrics = evaluate(ground_truths, [found(), found(), found()], NAMES)
    assert (metrics.num_images, metrics.num_labels) == (3, 4)
    assert [(row.num_images, row.num_labels) for row in metrics.per_class] == [(2, 3), (0, 0), (1, 1)]
    with pytest.raises(AssertionError, match="twice"):
        evaluate([ground_truth(), ground_truth()], [found(), found()], NAMES)


def test_the_table_is_in_line_on_a_terminal_where_a_chinese_letter_takes_two_columns():
    names = ("红细胞", "cafe\u0301", "plate")
    table = evaluate([ground_truth((SQUARE, 0))], [found((SQUARE, 0, 0.9))], names).table()
    head, _, *rows = table.splitlines()
    # Columns by hand: four more for the red cells than letters less one, none for the accent of its own.
    assert head.index("Class") == 1
    assert [len(head) - len(row) for row in rows] == [3, -1, 0]


def test_a_long_name_does_not_make_the_table_wider_than_a_terminal():
    names = ("x" * 300 + " end", "红" * 60)
    table = evaluate([ground_truth((SQUARE, 0), (FAR, 1))], [found((SQUARE, 0, 0.9))], names).table()
    head, _, first, second = table.splitlines()
    assert first.startswith("x" * 18 + "...x")
    assert "end  " in first
    assert second.split()[0] == "红" * 9 + "..." + "红" * 9
    assert len(head) == 39 + 60


def test_table_and_json_have_the_same_values(capsys: pytest.CaptureFixture[str]):
    metrics = evaluate(
        [ground_truth((SQUARE, 0), (FAR, 1))], [found((SQUARE, 0, 0.9), (SQUARE, 1, 0.3))], NAMES
    )
    assert metrics.table().splitlines() == [
        "Class    Images    Labels         P         R     mAP50  mAP50-95",
        "  all         1         2     0.500     0.500     0.500     0.500",
        "  cat         1         1     1.000     1.000     1.000     1.000",
        "  dog         1         1     0.000     0.000     0.000     0.000",
        "  hen         0         0         -         -         -         -",
    ]
    plain = metrics.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["map50_95"], plain["map50"], plain["precision"], plain["recall"]) == pytest.approx(
        [0.5] * 4
    )
    assert plain["fitness"] == metrics.fitness
    assert plain["per_class"][2] == {
        "name": "hen",
        "num_images": 0,
        "num_labels": 0,
        "precision": None,
        "recall": None,
        "map50": None,
        "map50_95": None,
    }
    assert capsys.readouterr() == ("", "")


def random_case(seed: int) -> tuple[list[GroundTruth], list[Detections]]:
    """Labels, boxes near them, duplicates and wrong ones, with many equal scores and background images."""
    rng = np.random.default_rng(seed)
    ground_truths, detections = [], []
    for image_id in rng.permutation(12).tolist():
        centre, half = rng.uniform(20, 80, (rng.integers(0, 7), 2)), rng.uniform(3, 15, (1, 2))
        boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
        classes = rng.integers(0, 2, len(boxes))
        near = np.concatenate([boxes] * 3 + [rng.uniform(0, 100, (4, 4)).astype(np.float32)])
        near += rng.normal(0, 1.5, near.shape).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guessed = np.where(
            rng.random(len(near)) < 0.2, rng.integers(0, 3, len(near)), [*classes] * 3 + [0, 1, 2, 2]
        )
        scores = np.sort(rng.integers(1, 20, len(near)) / 20)[::-1].astype(np.float32)
        order = rng.permutation(len(near))
        ground_truths.append(GroundTruth(image_id, (100, 100), boxes, classes, 1.0, (0.0, 0.0)))
        detections.append(Detections(near[order], scores, guessed[order].astype(np.int64)))
    return ground_truths, detections


def naive_iou(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(float), b.astype(float)
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    overlap = max(width, 0.0) * max(height, 0.0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def naive_matches(
    labels: GroundTruth, boxes: Detections, klass: int, iou_at_least: float, score_at_least: float
):
    """(score, right?) of each box of the class, best first."""
    free = [g for g in range(len(labels.classes)) if labels.classes[g] == klass]
    rows = []
    for d in range(len(boxes.scores)):
        if boxes.classes[d] != klass or boxes.scores[d] < score_at_least:
            continue
        overlaps = [(naive_iou(boxes.boxes_xyxy[d], labels.boxes_xyxy[g]), g) for g in free]
        best_iou, best = max(overlaps, default=(0.0, -1))
        if best_iou >= iou_at_least:
            free.remove(best)
        rows.append((float(boxes.scores[d]), best_iou >= iou_at_least))
    return rows


def naive_matches_of_all(ground_truths, detections, klass, iou_at_least, score_at_least=0.0):
    pairs = sorted(zip(ground_truths, detections, strict=True), key=lambda pair: pair[0].image_id)
    rows = [row for t, d in pairs for row in naive_matches(t, d, klass, iou_at_least, score_at_least)]
    return sorted(rows, key=lambda row: -row[0])


def naive_ap(ground_truths, detections, klass: int, iou_at_least: float) -> float:
    """COCO: at 101 recalls, the best precision at that recall or a higher one."""
    num_labels = sum(int((t.classes == klass).sum()) for t in ground_truths)
    num_right, curve = 0, []
    for num_found, (_, right) in enumerate(
        naive_matches_of_all(ground_truths, detections, klass, iou_at_least), start=1
    ):
        num_right += right
        curve.append((num_right / num_labels, num_right / num_found))
    recalls = np.linspace(0, 1, 101)
    return float(np.mean([max((p for r, p in curve if r >= recall), default=0.0) for recall in recalls]))


def naive_best_f1(ground_truths, detections) -> tuple[float, list[tuple[float, float]]]:
    best = (-1.0, 0.0, [])
    for score in sorted({float(s) for d in detections for s in d.scores}):
        rows = []
        for klass in (0, 1):
            matches = naive_matches_of_all(ground_truths, detections, klass, 0.5, score)
            num_right, num_labels = (
                sum(right for _, right in matches),
                sum((t.classes == klass).sum() for t in ground_truths),
            )
            rows.append((num_right / max(len(matches), 1), num_right / num_labels))
        f1 = np.mean([2 * p * r / max(p + r, 1e-16) for p, r in rows])
        if f1 > best[0] + 1e-9:
            best = (f1, score, rows)
    return best[1], best[2]


@pytest.mark.parametrize("seed", range(4))
def test_random_cases_equal_the_naive_implementation(seed: int):
    ground_truths, detections = random_case(seed)
    metrics = evaluate(ground_truths, detections, NAMES)
    ious = np.linspace(0.5, 0.95, 10)
    ap = np.array([[naive_ap(ground_truths, detections, klass, iou) for klass in (0, 1)] for iou in ious])
    assert 0.2 < ap.mean() < 0.8  # or the case would prove little
    assert (metrics.map50_95, metrics.map50, metrics.map75) == pytest.approx(
        (ap.mean(), ap[0].mean(), ap[5].mean())
    )
    assert [(row.map50, row.map50_95) for row in metrics.per_class[:2]] == [
        pytest.approx((ap[0, klass], ap[:, klass].mean())) for klass in (0, 1)
    ]
    score, rows = naive_best_f1(ground_truths, detections)
    assert metrics.confidence == score
    assert [(row.precision, row.recall) for row in metrics.per_class[:2]] == [
        pytest.approx(row) for row in rows
    ]
    assert (metrics.precision, metrics.recall) == pytest.approx(np.mean(rows, axis=0))


def test_the_order_of_images_does_not_matter_to_the_last_digit():
    ground_truths, detections = random_case(7)
    expected = evaluate(ground_truths, detections, NAMES)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(ground_truths))
        assert evaluate([ground_truths[i] for i in order], [detections[i] for i in order], NAMES) == expected
