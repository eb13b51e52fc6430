"""Class names of any script in pictures: drawn by a font that has their letters, or as numbers, never alike."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from dsyolo.base.batch import Detections, GroundTruth
from dsyolo.tracking import picture_text
from dsyolo.tracking.picture_text import Text, drawable_names
from dsyolo.tracking.plots import draw
from dsyolo.tracking.predictions import draw_pair

OWN = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@pytest.fixture(autouse=True)
def only_own_font(monkeypatch: pytest.MonkeyPatch):
    """The fonts of this machine must not decide."""
    forget()
    monkeypatch.setattr(picture_text, "_font_paths", lambda: (OWN,))
    yield
    forget()


def forget() -> None:
    for cached in (picture_text._drawable, picture_text._font_with):
        cached.cache_clear()


def one(klass: int) -> Detections:
    return Detections(
        np.array([[20, 60, 180, 90]], np.float32), np.array([0.5], np.float32), np.array([klass])
    )


def drawn(name: str) -> np.ndarray:
    return draw(np.full((100, 400, 3), 200, np.uint8), one(0), [name])


def ink(text: str) -> np.ndarray:
    """Black on white, with a margin that must stay white."""
    words = Text(text, 20.0)
    picture = np.full((words.height + words.below + 20, words.width + 20, 3), 255, np.uint8)
    words.draw(picture, (10, 10 + words.height), (0, 0, 0))
    return picture.min(-1)


@pytest.mark.parametrize("text", ["cat", "café", "Größe", "Кошка", "γάτα"])
def test_the_ink_fills_the_size_that_a_text_gives(text: str):
    dark = ink(text) < 128
    assert dark.any()
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    assert rows[0] >= 9
    assert rows[-1] <= len(dark) - 9
    assert columns[0] >= 9
    assert columns[-1] <= dark.shape[1] - 9
    assert columns[-1] - columns[0] >= dark.shape[1] - 20 - 8  # as wide as said
    assert rows[-1] - rows[0] >= 12  # of a capital of 20


def test_names_that_differ_in_accents_or_letters_alone_look_different():
    names = ["cafe", "café", "cafè", "кот", "кит"]
    pictures = [drawn(name).tobytes() for name in names]
    assert len(set(pictures)) == len(names)
    assert drawn("cafe\u0301").tobytes() == pictures[1]  # the accent as a letter of its own
    assert drawable_names(names) == names
    assert drawable_names(["x" * 300]) == ["x" * 18 + "..." + "x" * 18]  # else it would cover the picture


def test_two_chinese_names_without_a_font_are_numbers_and_one_line_says_so(caplog: pytest.LogCaptureFixture):
    names = ["cat", "红细胞", "白细胞", "café"]
    with caplog.at_level(logging.WARNING):
        assert drawable_names(names) == ["cat", "class 1", "class 2", "café"]
        image = np.full((100, 400, 3), 200, np.uint8)
        plates = [draw(image, one(klass), names) for klass in (1, 2)]
        truth = GroundTruth(0, (100, 400), one(1).boxes_xyxy, np.array([1]), 1.0, (0.0, 0.0))
        pair = draw_pair(image, truth, one(2), names)
    assert (plates[0] != plates[1]).any()
    numbers = draw_pair(image, truth, one(2), ["cat", "class 1", "class 2", "café"])
    assert (pair == numbers).all()
    (line,) = caplog.messages
    assert (
        "no font of this machine has the letters of 红细胞 and of 1 other class, drawn as `class 1`" in line
    )
    assert "Install a font that has them, such as fonts-noto-cjk" in line


def test_a_font_that_has_the_letters_is_found_beside_broken_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken, good = tmp_path / "broken.ttf", tmp_path / "good.ttf"
    broken.write_bytes(b"\0\1\0\0 no font")
    shutil.copy(OWN, good)
    everything = tmp_path / "LastResort.ttf"  # a box for each letter there is
    shutil.copy(OWN, everything)
    monkeypatch.setattr(
        picture_text, "_font_paths", lambda: (broken, everything, tmp_path / "gone.ttf", good)
    )
    assert picture_text._font_of("кот 0.50") == good
    assert picture_text._font_of("猫 0.50") is None


def test_letters_that_must_be_joined_need_the_library_for_it(monkeypatch: pytest.MonkeyPatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: False)
    assert drawable_names(["قط", "кот"]) == ["class 0", "кот"]
    forget()
    monkeypatch.setattr(features, "check", lambda name: True)
    assert drawable_names(["قط", "кот"]) == ["قط", "кот"]


def test_control_characters_of_a_weights_file_are_escaped():
    assert drawable_names(["a\x1b[2Jb", "c\u202ed"]) == [r"a\x1b[2Jb", r"c\u202ed"]


@pytest.mark.parametrize("box", [(0, 0, 400, 100), (390, 95, 400, 100), (-50, -50, 5, 5), (0, 0, 1, 1)])
def test_a_text_at_any_edge_lies_in_the_image(box: tuple[int, ...]):
    picture = np.full((100, 400, 3), 200, np.uint8)
    found = Detections(np.array([box], np.float32), np.array([0.5], np.float32), np.array([0]))
    written = draw(picture, found, ["Größe"])
    assert written.shape == picture.shape
    assert (written != picture).any(-1).sum() > 9 * 30


def test_a_text_wider_than_the_image_is_cut():
    picture = np.full((30, 50, 3), 255, np.uint8)
    Text("Größe" * 50, 12.0).draw(picture, (5, 20), (0, 0, 0))
    assert (picture < 128).any()
    Text("Größe", 12.0).draw(picture, (500, 20), (0, 0, 0))  # beside it
