"""Drawn boxes, grids, and files that appear whole."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsyolo.base.batch import Detections
from dsyolo.tracking.plots import colour, draw, grid, save, save_curves

NAMES = ("cat", "dog")
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def found(*boxes: tuple[tuple[float, ...], int, float]) -> Detections:
    return Detections(
        np.array([box for box, _, _ in boxes], np.float32),
        np.array([score for _, _, score in boxes], np.float32),
        np.array([klass for _, klass, _ in boxes], np.int64),
    )


def canvas(height: int, width: int, value: int = 200) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_a_box_is_drawn_in_its_class_colour_on_a_copy():
    image = canvas(240, 320)
    picture = draw(image, found(((100, 80, 200, 160), 1, 0.9)), NAMES)
    assert (image == 200).all()
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert tuple(picture[120, 100]) == tuple(picture[120, 200]) == tuple(picture[160, 150]) == colour(1)
    assert (picture[100:150, 120:180] == 200).all()  # the inside stays as it was
    assert (picture[:60] == 200).all()


def test_the_better_box_lies_on_top():
    same = (100, 80, 200, 160)
    picture = draw(canvas(240, 320), found((same, 1, 0.9), (same, 0, 0.4)), NAMES)
    assert tuple(picture[120, 100]) == colour(1)


def test_lines_grow_with_the_image():
    def line_px(scale: int) -> int:
        box = tuple(scale * side for side in (100, 80, 200, 160))
        picture = draw(canvas(240 * scale, 320 * scale), found((box, 0, 0.9)), NAMES)
        return int((picture[120 * scale] == colour(0)).all(axis=1).sum())

    assert line_px(8) >= 4 * line_px(1) > 0


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 320, 240),
        (-50, -50, 400, 300),
        (310, 230, 320, 240),
        (0, 0, 3, 3),
        (318, 0, 320, 2),
        (9, 9, 9, 9),
    ],
)
def test_the_text_of_a_box_at_any_edge_lies_in_the_image(box: tuple[int, ...]):
    picture = draw(canvas(240, 320), found((box, 0, 0.55)), NAMES)
    plate = (picture == colour(0)).all(axis=2)
    assert plate.any(axis=1).sum() >= 9  # a text's height at least
    assert plate.any(axis=0).sum() >= 30  # and its width


def test_a_channel_swapped_view_can_be_drawn_on():
    bgr = np.zeros((120, 160, 3), np.uint8)
    bgr[..., 0] = 255
    picture = draw(bgr[..., ::-1], found(((40, 40, 80, 80), 0, 0.5)), NAMES)
    assert tuple(picture[100, 100]) == (0, 0, 255)


def test_colours_of_eighty_classes_differ():
    colours = np.array([colour(klass) for klass in range(80)], int)
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(80, dtype=int)
    assert apart.min() >= 6
    neighbours = np.abs(np.diff(colours, axis=0)).sum(axis=1)
    assert neighbours.min() >= 100


def test_a_grid_fits_images_of_any_size_into_rows():
    images = [
        canvas(480, 640, 10),
        canvas(640, 480, 20),
        canvas(50, 100, 30),
        canvas(30, 30, 40),
        canvas(1, 900, 50),
    ]
    sheet = grid(images, columns=3, cell_px=120, gap_px=4)
    assert sheet.shape == (120 + 4 + 120, 3 * 120 + 2 * 4, 3)
    assert sheet[60, 60, 0] == 10  # each in the middle of its cell
    assert sheet[60, 124 + 60, 0] == 20
    assert sheet[60, 248 + 60, 0] == 30
    assert sheet[124 + 60, 60, 0] == 40
    assert sheet[124 + 59, 124 + 60, 0] == 50  # one pixel high
    assert (sheet[124:, 248:] == 255).all()  # no sixth image
    wide = grid([canvas(30, 60)] * 2, columns=5, cell_px=60, gap_px=0)
    assert wide.shape == (30, 120, 3)


def test_save_keeps_rgb_and_leaves_nothing_else(tmp_path: Path):
    image = canvas(32, 48, 0)
    image[:, :24] = (250, 120, 10)
    for name, tolerance in (("a.png", 0), ("a.jpg", 12)):
        save(tmp_path / name, image)
        back = cv2.imread(str(tmp_path / name))[:, :, ::-1].astype(int)
        assert np.abs(back - image)[:, 2:20].max() <= tolerance
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.png"]


def test_a_picture_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    save(path, canvas(8, 8, 1))
    before = path.read_bytes()

    def break_off(source: Path, target: Path) -> None:
        assert Path(target).read_bytes() == before  # all is written elsewhere before the rename
        raise OSError("disk pulled out")

    monkeypatch.setattr(os, "replace", break_off)
    with pytest.raises(OSError, match="disk pulled out"):
        save(path, canvas(64, 64, 2))
    assert path.read_bytes() == before


def test_curves_with_gaps_and_single_points_are_drawn(tmp_path: Path):
    panels = {"mAP": {"mAP50": ([1, 3], [0.2, 0.4]), "mAP50-95": ([], [])}, "lr": {"lr": ([1], [0.01])}}
    save_curves(tmp_path / "curves.png", panels)
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.std(axis=(0, 1)).min() > 5
    assert os.listdir(tmp_path) == ["curves.png"]


@pytest.mark.parametrize("num_epochs", [1, 2, 7, 300])
def test_ticks_are_whole_epochs_and_numbers_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_epochs: int
):
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    plain = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or plain(self, *a, **k))
    epochs = list(range(1, num_epochs + 1))
    values = {"small": 2e-6, "lr": 0.01, "speed": 54321.0, "large": 7.5e6, "nothing": 0.0}
    panels = {name: {name: (epochs, [value] * num_epochs)} for name, value in values.items()}
    save_curves(tmp_path / "curves.png", panels, best_epoch=num_epochs)
    (figure,) = figures
    for axes, title in zip(figure.axes, panels, strict=True):
        low, high = axes.get_xlim()
        assert low < 1
        assert high > num_epochs
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)
        left = min(tick.get_window_extent().x0 for tick in axes.get_yticklabels() if tick.get_text())
        assert left >= 0
        line, best = axes.get_lines()
        assert set(best.get_xdata()) == {num_epochs}
        assert (line.get_marker() != "None") == (num_epochs <= 20), title
        if num_epochs == 1:
            assert line.get_markersize() >= 6
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for i, one in enumerate(boxes):  # no panel's text lies on another panel
        assert not [other for other in boxes[i + 1 :] if one.overlaps(other)]
    assert f"the best, {num_epochs}" in figure._supxlabel.get_text()
