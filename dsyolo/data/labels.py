"""Reads and checks YOLO label files.

A row is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, as shares of the image's width and height. A bad row is
reported and repaired or left out: nothing here raises for a bad label.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsyolo.base.safe_io import read_bytes
from dsyolo.base.text import decode_any, escaped

UNREADABLE_LABEL = "label file cannot be read"
WRONG_COLUMNS = "wrong number of columns (row left out)"
NOT_A_NUMBER = "not a number (row left out)"
COMMAS = "columns separated by commas (row left out)"
DECIMAL_COMMA = "numbers with a decimal comma (row left out)"
CLASS_NAME = "a name where the class's number stands (row left out)"
NOT_FINITE = "NaN or infinity (row left out)"
NOT_A_CLASS = "class is not a whole number from 0 (row left out)"
UNKNOWN_CLASS = "class that data.yaml does not name (row left out)"
NO_SIZE = "box without width or height (row left out)"
OUTSIDE = "box outside the image (row left out)"
CLIPPED = "box over the image's edge (clipped)"
DUPLICATE = "duplicate row (left out)"

# A row with numbers further outside [0, 1] is a mistake (pixels instead of shares, for example). YOLOv5 drops the
# whole image then. Rows with numbers in [0, 1] but corners outside are used, clipped, there and here.
OUTSIDE_LIMIT = 0.01
# Below this overhang (0.6 px of 640) a clipped corner is rounding, and not reported.
ROUNDING = 1e-3
MOST_LABEL_BYTES = 64 << 20
# In details, and searched for there by split_checks.py:
NOT_PIXELS = ", not pixels"
AS_CORNERS = "as corners x1 y1 x2 y2 they would fit"
AS_TOP_LEFT = "as the top left corner, width and height they would fit"
NUM_SHOWN = 3  # problems of one kind that are listed


class Problem(NamedTuple):
    """A problem of one file of the data set, and what was done about it."""

    file: str
    line: int  # 1-based; 0: the file as a whole
    reason: str  # one of the constants of these modules, to group by
    detail: str = ""  # the value given, and the rule

    @property
    def place(self) -> str:
        file = escaped(self.file, lines=False)  # a name may hold anything but a slash
        return f"{file}:{self.line}" if self.line else file

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


def first_places(problems: Sequence[Problem]) -> str:
    """Return where the first few problems are."""
    return ", ".join(p.place for p in problems[:NUM_SHOWN]) + ", ..." * (len(problems) > NUM_SHOWN)


def by_reason(problems: Sequence[Problem]) -> list[str]:
    """Return a line per reason, the most common first: its count, the first few places, and a detail."""
    lines = []
    for reason, count in Counter(problem.reason for problem in problems).most_common():
        group = [problem for problem in problems if problem.reason == reason]
        detail = f" ({group[0].detail})" if group[0].detail else ""
        lines.append(f"  {count:,} x {reason}: {first_places(group)}{detail}")
    return lines


class Labels(NamedTuple):
    """The usable rows of one label file."""

    classes: np.ndarray  # (N,) int64
    boxes_xyxy: np.ndarray  # (N, 4) float32, shares of the image's width and height, in [0, 1]
    polygons: tuple[np.ndarray | None, ...] = ()  # () or one per box: (P, 2) float32 in [0, 1], or None


def no_labels() -> Labels:
    """Return the labels of a background."""
    return Labels(np.zeros(0, np.int64), np.zeros((0, 4), np.float32))


def read_labels(
    path: str | Path, num_classes: int, num_keypoint_values: int = 0
) -> tuple[Labels, list[Problem]]:
    """Return the usable rows of a label file (duplicates of class and box once), and the problems of the others.

    A missing or empty file is a background, and no problem. Of rows with keypoints, the box is read.

    Args:
        num_keypoint_values: numbers behind the box of a row, in a data set with keypoints.
    """
    try:
        raw = read_bytes(path, MOST_LABEL_BYTES)
    except FileNotFoundError:
        return no_labels(), []
    except OSError as error:
        return no_labels(), [Problem(str(path), 0, UNREADABLE_LABEL, error.strerror or str(error))]
    if not raw.strip():
        return no_labels(), []
    problems: list[Problem] = []
    rows = _parse(str(path), decode_any(raw), problems, num_keypoint_values)
    labels = _checked(str(path), rows, num_classes, problems)
    problems.sort(key=lambda problem: problem.line)
    return labels, problems


def refused_rows(rows: Sequence[str], num_classes: int) -> list[Problem]:
    """Return why `read_labels` would leave out rows, as problems with the rows' numbers from 1."""
    problems: list[Problem] = []
    _checked("", _parse("", "\n".join(rows), problems), num_classes, problems)
    return [problem for problem in problems if problem.reason != CLIPPED]


_Rows = tuple[list[int], np.ndarray, np.ndarray, list[np.ndarray | None]]


def _parse(path: str, text: str, problems: list[Problem], num_keypoint_values: int = 0) -> _Rows:
    """Return line numbers, classes (N,), boxes_cxcywh (N, 4) and polygons of the rows that are numbers."""
    lines: list[int] = []
    classes: list[float] = []
    boxes: list[tuple[float, ...]] = []
    polygons: list[np.ndarray | None] = []
    for number, line in enumerate(text.splitlines(), 1):
        tokens = line.split()
        if not tokens:
            continue
        if num_keypoint_values and len(tokens) == 5 + num_keypoint_values:
            tokens = tokens[:5]
        num_columns = len(tokens)
        if num_columns != 5 and (num_columns < 7 or num_columns % 2 == 0):
            detail = f"{num_columns} columns; a box has 5 (class cx cy w h), a polygon 7, 9, 11 ... (class x y x y ...)"
            detail += "; separate them by spaces, not commas" * ("," in line)
            detail += "; is the sixth a confidence or the id of a track?" * (num_columns == 6)
            problems.append(Problem(path, number, WRONG_COLUMNS, detail))
            continue
        try:
            label, *values = map(float, tokens)
        except ValueError as error:
            problems.append(Problem(path, number, _text_among_numbers(tokens), str(error)[:80]))
            continue
        lines.append(number)
        classes.append(label)
        if num_columns == 5:
            boxes.append(tuple(values))
            polygons.append(None)
        else:
            points = np.array(values).reshape(-1, 2)
            low, high = points.min(0), points.max(0)
            boxes.append((*((low + high) / 2), *(high - low)))
            polygons.append(points)
    return lines, np.array(classes, np.float64), np.array(boxes, np.float64).reshape(-1, 4), polygons


def _text_among_numbers(tokens: Sequence[str]) -> str:
    """Return the likely reason why columns are no numbers."""
    if any(token.endswith(",") or token.startswith(",") for token in tokens):
        return COMMAS
    if any(re.fullmatch(r"-?\d*,\d+", token) for token in tokens):
        return DECIMAL_COMMA
    is_name = re.match(r"[^\W\d_]", tokens[0]) and tokens[0].lower() not in ("nan", "inf", "infinity")
    return CLASS_NAME if is_name else NOT_A_NUMBER


def _checked(path: str, rows: _Rows, num_classes: int, problems: list[Problem]) -> Labels:
    """Return the rows that are good or can be clipped. Report the first rule that another row breaks."""
    lines, classes, boxes, polygons = rows

    def report(i: int, reason: str, detail: str = "") -> None:
        detail = detail or _detail(reason, classes[i], boxes[i], num_classes)
        problems.append(Problem(path, lines[i], reason, detail))

    centres, sizes = boxes[:, :2], boxes[:, 2:]
    with np.errstate(invalid="ignore"):  # the first rule finds NaN and infinity
        corners = np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)
        boxes_xyxy = np.clip(corners, 0, 1).astype(np.float32)
        gone = (boxes_xyxy[:, 2:] <= boxes_xyxy[:, :2]).any(1)
        over = np.maximum(-corners, corners - 1).max(1, initial=-1.0)
        rules = {
            NOT_FINITE: ~(np.isfinite(boxes).all(1) & np.isfinite(classes)),
            NOT_A_CLASS: (classes != np.floor(classes)) | (classes < 0),
            UNKNOWN_CLASS: classes >= num_classes,
            NO_SIZE: (sizes <= 0).any(1),
            OUTSIDE: (np.abs(boxes - 0.5) > 0.5 + OUTSIDE_LIMIT).any(1) | (gone & (over > 0)),
        }
    broken: np.ndarray = np.stack([*rules.values(), gone])
    good = np.logical_not(broken.any(0))
    for i in np.flatnonzero(~good).tolist():
        report(i, (*rules, NO_SIZE)[int(broken[:, i].argmax())])
    seen: dict[tuple[float, ...], int] = {}
    for i, row in enumerate(zip(classes.tolist(), *boxes.T.tolist(), strict=True)):
        if good[i] and (first := seen.setdefault(row, i)) != i:
            report(i, DUPLICATE, f"the same as line {lines[first]}")
            good[i] = False
    for i in np.flatnonzero(good & (over > ROUNDING)).tolist():
        report(i, CLIPPED)
    keep = np.flatnonzero(good).tolist()
    kept = (polygons[i] for i in keep)
    clipped = tuple(None if points is None else np.clip(points, 0, 1).astype(np.float32) for points in kept)
    has_any = any(points is not None for points in clipped)
    return Labels(classes[keep].astype(np.int64), boxes_xyxy[keep], clipped if has_any else ())


def _detail(reason: str, label: float, box: np.ndarray, num_classes: int) -> str:
    given = "cx cy w h = " + " ".join(f"{value:g}" for value in box)
    if reason in (NOT_A_CLASS, UNKNOWN_CLASS):
        return f"class {label:g}, but data.yaml names {num_classes} (0 to {num_classes - 1})"
    if reason == CLIPPED and (box <= 1 + ROUNDING).all():
        fits = [AS_CORNERS] * bool((box[2:] > box[:2]).all())
        fits += [AS_TOP_LEFT] * bool((box[:2] + box[2:] <= 1 + ROUNDING).all())
        return "; ".join([given, *fits])
    if reason != OUTSIDE:
        return given
    return f"{given}; these must be shares of the image, 0 to 1" + NOT_PIXELS * bool((box > 2).any())
