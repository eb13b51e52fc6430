"""The data set that dsyolo draws itself."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from dsyolo.base.errors import UserError
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.index_builder import build_index
from dsyolo.data.synthetic import NAMES, draw_image, draw_sample


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_equal_settings_give_equal_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_sample(tmp_path / name, num_images=6, seed=seed, image_size=(96, 96))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if name.endswith(".jpg"))


def test_it_is_a_clean_yolo_data_set_with_every_class_in_both_splits(tmp_path):
    spec = read_data_yaml(draw_sample(tmp_path / "s", num_images=100, image_size=(160, 128)))
    assert spec.names == NAMES
    assert len(spec.names) >= 4
    for sources, num_images in ((spec.train, 80), (spec.val, 20)):
        found = build_index(sources, spec.num_classes, tmp_path / "cache", progress=False)
        assert len(found) == num_images
        assert not found.problems
        assert (np.bincount(found.classes, minlength=spec.num_classes) > 0).all()
        assert (found.sizes_hw <= [128, 160]).all()
        assert (found.sizes_hw >= [96, 120]).all()
        sides = (found.boxes[:, 2:] - found.boxes[:, :2]) * np.repeat(
            found.sizes_hw[:, ::-1], np.diff(found.offsets), 0
        )
        assert sides.min() >= 11.9
        assert sides.max() > 45
        assert np.median(sides) < 40


def test_boxes_fit_what_is_drawn(tmp_path):
    """With the same draws but no shapes the image is the background: where the two differ, there is a box."""
    checked = 0
    for seed in range(12):
        image, shapes = draw_image(np.random.default_rng(seed), (128, 128))
        if len(shapes) != 2:
            continue
        inside = np.zeros(image.shape[:2], bool)
        for shape in shapes:
            x1, y1, x2, y2 = shape.box_xyxy
            assert 0 <= x1 < x2 <= image.shape[1]
            assert 0 <= y1 < y2 <= image.shape[0]
            outline = shape.outline.clip(0, image.shape[1::-1])
            np.testing.assert_allclose(np.r_[outline.min(0), outline.max(0)], shape.box_xyxy)
            inside[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
        saturation = np.ptp(image.astype(int), axis=2)
        assert saturation[inside].mean() > saturation[~inside].mean()
        checked += 1
    assert checked


def test_several_hundred_images_take_seconds(tmp_path):
    start = time.process_time()
    draw_sample(tmp_path / "s", num_images=50)
    assert time.process_time() - start < 3  # 0.5 s of one core; 400 images: 4 s


def test_a_complete_sample_is_kept_and_other_content_refused(tmp_path):
    path = draw_sample(tmp_path / "s", num_images=4, image_size=(64, 64))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    assert draw_sample(tmp_path / "s", num_images=4, image_size=(64, 64)) == path
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")} == before
    with pytest.raises(UserError, match="was not written"):
        draw_sample(tmp_path / "s", num_images=5, image_size=(64, 64))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="it is not empty"):
        draw_sample(tmp_path / "other", num_images=4)
    assert (tmp_path / "other" / "mine.txt").read_text() == "keep"


def test_a_drawing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dsyolo.data.synthetic.write_data_yaml", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_sample(tmp_path / "s", num_images=3, image_size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def test_settings_out_of_range_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="cannot be drawn") as caught:
        draw_sample(tmp_path / "s", num_images=1, val_share=0.0, seed=-1, image_size=(32, 256))
    assert len(caught.value.problems) == 4
