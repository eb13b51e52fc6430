"""JPEGs without an end marker are read exactly where all of their pixels are there."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from image_files import add, picture
from PIL import Image

from dsyolo.base import safe_io
from dsyolo.data import images
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.index_builder import build_index
from dsyolo.data.jpeg_ends import has_all_pixels, jpeg_header


def pixels(kind: str) -> np.ndarray:
    y, x = np.mgrid[:60, :90]
    if kind == "smooth":
        return np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8)
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def jpeg(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(kind)).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("restart_marker_blocks", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_no_cut_but_that_of_the_marker_is_taken_for_whole(
    kind, subsampling, progressive, restart_marker_blocks
):
    options = {"restart_marker_blocks": restart_marker_blocks} if restart_marker_blocks else {}
    whole = jpeg(kind, quality=75, subsampling=subsampling, progressive=progressive, **options)
    start = jpeg_header(whole)[2]
    accepted = [cut for cut in range(1, 30) if has_all_pixels(whole[:-cut], start)]
    assert accepted == [1, 2]
    assert not has_all_pixels(whole[: (start + len(whole)) // 2], start)


def test_a_progressive_one_that_lacks_its_last_scan_is_cut():
    whole = jpeg("smooth", progressive=True)
    assert not has_all_pixels(whole[: whole.rindex(b"\xff\xda")], jpeg_header(whole)[2])


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("long_side_px", [64, 30])  # the second is decoded at 1/2
def test_it_is_indexed_counted_and_read_like_the_whole(tmp_path, capfd, cut, long_side_px):
    whole = add(tmp_path, "whole.jpg")
    path = add(tmp_path, "cut.jpg", whole.read_bytes()[:-cut])
    found = build_index([tmp_path / "images"], 3, tmp_path / "cache", progress=False)
    assert len(found) == 2
    assert [(p.file, p.reason) for p in found.problems] == [(str(path), images.NO_END_MARKER)]
    assert f"1 x {images.NO_END_MARKER}: {path}" in found.summary()
    dataset = DetectionDataset(found, long_side_px)
    np.testing.assert_array_equal(dataset.load(0).image, dataset.load(1).image)
    assert dataset.load(0).boxes_xyxy.shape == (1, 4)
    assert not capfd.readouterr().err


def test_a_background_without_its_end_marker_stays_one(tmp_path):
    add(tmp_path, "a.jpg", add(tmp_path, "b.jpg").read_bytes()[:-2], label="")
    found = build_index([tmp_path / "images"], 3, tmp_path / "cache", progress=False)
    assert (len(found), found.num_backgrounds) == (2, 1)


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_became_a_pipe_or_a_folder_is_no_image(tmp_path, made):
    path = add(tmp_path, "a.jpg")
    path.unlink()
    made(path)
    assert images.check_image(path)[1] == images.NOT_FOUND
    assert images.read_rgb(path, picture().shape[:2], 64) is None


def test_a_file_that_becomes_a_pipe_while_it_is_opened(tmp_path, monkeypatch):
    """The look at its kind cannot tell then: opening must not wait for a writer."""
    path = add(tmp_path, "a.jpg")
    before = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(safe_io.os, "stat", lambda *_: before)
    with pytest.raises(OSError, match="it must be a file"):
        safe_io.read_bytes(path)
