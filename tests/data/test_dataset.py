"""The index, its cache, and images as training loads them."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from image_files import NUM_CLASSES, add, encoded, picture, with_exif

from dsyolo.base.errors import UserError
from dsyolo.data import images, index_builder, labels
from dsyolo.data import index as index_module
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.index import DatasetIndex
from dsyolo.data.index_builder import build_index, read_image_record
from dsyolo.data.index_cache import default_cache_dir


def read(root: Path, **options) -> DatasetIndex:
    return build_index([root / "images"], NUM_CLASSES, root / "cache", progress=False, **options)


def reasons(found: DatasetIndex) -> list[tuple[str, str]]:
    return [(Path(problem.file).name, problem.reason) for problem in found.problems]


# ---- bad files


def bad_images() -> list[tuple[str, bytes, str]]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    jpeg, png = encoded(noise, ".jpg"), encoded(noise, ".png")
    webp, bmp = encoded(noise, ".webp"), encoded(noise, ".bmp")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(jpeg)) + jpeg  # its end marker must not count
    return [
        ("half.jpg", jpeg[: len(jpeg) // 2], images.TRUNCATED),
        ("one_byte_of_pixels_less.jpg", jpeg[:-3], images.TRUNCATED),
        ("half_and_an_end.jpg", jpeg[: len(jpeg) // 2] + b"\xff\xd9", images.TRUNCATED),
        ("header_only.jpg", jpeg[:30], images.TRUNCATED),
        ("thumbnail.jpg", jpeg[:2] + thumbnail + jpeg[2 : len(jpeg) // 2], images.TRUNCATED),
        ("half.png", png[: len(png) // 2], images.TRUNCATED),
        ("half.webp", webp[: len(webp) // 2], images.TRUNCATED),
        ("half.bmp", bmp[: len(bmp) // 2], images.TRUNCATED),
        ("text.jpg", b"<html>404 not found</html>", images.NOT_AN_IMAGE),
        ("empty.jpg", b"", images.EMPTY),
        ("damaged.png", png[:60] + bytes(40) + png[100:], images.NOT_AN_IMAGE),
        ("tiny.png", encoded(picture(9, 30), ".png"), images.TOO_SMALL),
    ]


@pytest.mark.parametrize(("name", "content", "reason"), bad_images(), ids=[bad[0] for bad in bad_images()])
def test_a_bad_image_is_reported_and_the_rest_loads(tmp_path, name, content, reason):
    add(tmp_path, "good.jpg")
    bad = add(tmp_path, name, content)
    found = read(tmp_path)
    assert [found.path(i) for i in range(len(found))] == [str(tmp_path / "images" / "good.jpg")]
    assert [(p.file, p.reason) for p in found.problems] == [(str(bad), reason)]
    assert reason in found.summary()
    assert name in found.summary()
    assert DetectionDataset(found, 64).load(0, 64).boxes_xyxy.shape == (1, 4)


@pytest.mark.parametrize("interval", [0, 1])  # of restart markers
def test_grey_of_the_shade_of_missing_blocks_is_no_truncation(tmp_path, capfd, interval):
    options = [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    whole = cv2.imencode(".jpg", np.full((48, 64, 3), 128, np.uint8), options)[1].tobytes()
    path = tmp_path / "x.jpg"
    path.write_bytes(whole)
    assert images.check_image(path)[0] == (48, 64)
    assert not capfd.readouterr().err  # libjpeg tells of corrupt data
    path.write_bytes(whole[:-8] + b"\xff\xd9")
    assert images.check_image(path)[1] == images.TRUNCATED


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0 0.5 0.5 0.2", labels.WRONG_COLUMNS),
        ("0 0.5 nan 0.2 0.4", labels.NOT_FINITE),
        ("3 0.5 0.5 0.2 0.4", labels.UNKNOWN_CLASS),
        ("0 1.5 0.5 0.2 0.4", labels.OUTSIDE),
        ("1 0.5 0.5 0.5 0.5", labels.DUPLICATE),
        ("0 0.5 0.5 0 0.4", labels.NO_SIZE),
    ],
)
def test_a_bad_row_is_reported_and_its_image_loads_with_the_others(tmp_path, row, reason):
    add(tmp_path, "good.jpg")
    add(tmp_path, "mixed.jpg", label=f"1 0.5 0.5 0.5 0.5\n{row}\n")
    found = read(tmp_path)
    assert len(found) == 2
    assert found.classes.tolist() == [0, 1]
    (problem,) = found.problems
    assert problem.file.endswith("mixed.txt")
    assert (problem.line, problem.reason) == (2, reason)
    assert f"1 x {reason}: {tmp_path / 'labels' / 'mixed.txt'}:2" in found.summary()


def test_an_image_whose_rows_are_all_bad_is_no_background(tmp_path):
    add(tmp_path, "good.jpg")
    add(tmp_path, "bad.jpg", label="7 0.5 0.5 0.5 0.5\n8 0.5 0.5 0.5 0.5\n7 0.1 0.1 0.1 0.1\n")
    found = read(tmp_path)
    assert len(found) == 1
    assert found.num_backgrounds == 0
    assert reasons(found) == [("bad.txt", labels.UNKNOWN_CLASS)] * 3 + [
        ("bad.jpg", index_builder.NO_ROW_LEFT)
    ]
    assert [len(rows) for rows in found.unknown_classes().values()] == [2, 1]


def test_missing_and_repeated_images_of_a_list(tmp_path):
    good = add(tmp_path, "good.jpg")
    listing = tmp_path / "train.txt"
    listing.write_text(f"{good}\n./images/gone.jpg\n./images/good.jpg\n")
    found = build_index([listing], NUM_CLASSES, tmp_path / "cache", progress=False)
    assert len(found) == 1
    assert reasons(found) == [("good.jpg", index_builder.LISTED_TWICE), ("gone.jpg", images.NOT_FOUND)]


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    add(tmp_path, "a.jpg", b"no image")
    with pytest.raises(UserError, match=r"None of the 1 images") as caught:
        read(tmp_path)
    assert images.NOT_AN_IMAGE in str(caught.value)


def test_backgrounds_and_polygons(tmp_path):
    add(tmp_path, "a.jpg", label=None)
    add(tmp_path, "b.jpg", label="")
    add(tmp_path, "c.png", label="2 0.1 0.2 0.5 0.2 0.3 0.6\n1 0.5 0.5 0.2 0.2\n")
    found = read(tmp_path)
    assert (len(found), found.num_backgrounds, found.num_boxes) == (3, 2, 2)
    assert found.summary() == "3 images (2 backgrounds), 2 boxes"
    assert np.bincount(found.classes).tolist() == [0, 1, 1]
    dataset = DetectionDataset(found, 128)
    assert dataset.load(0).polygons == ()
    assert dataset.load(1).boxes_xyxy.shape == (0, 4)
    sample = dataset.load(2)  # 128 x 96
    np.testing.assert_allclose(sample.polygons[0], [[12.8, 19.2], [64, 19.2], [38.4, 57.6]], rtol=1e-5)
    np.testing.assert_allclose(sample.boxes_xyxy[0], [12.8, 19.2, 64, 57.6], rtol=1e-5)
    assert sample.polygons[1] is None


def test_records_make_the_index(tmp_path):
    names = [f"{i}.jpg" for i in range(5)]
    paths = [str(add(tmp_path, name)) for name in names]
    alone = index_module.assemble_index([read_image_record(path, NUM_CLASSES) for path in paths], NUM_CLASSES)
    together = read(tmp_path, workers=3)
    for name in index_module.ARRAYS:
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))


# ---- sizes and pixels


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(64, 48), (61, 58), (640, 480)])
def test_exif_turns_size_and_pixels_at_every_scale(tmp_path, orientation, size):
    path = add(tmp_path, "a.jpg", with_exif(encoded(picture(*size)), orientation))
    whole = cv2.imread(str(path))[..., ::-1]
    found = read(tmp_path)
    assert found.sizes_hw.tolist() == [list(whole.shape[:2])]
    for reduction in (1, 2, 4):
        sample = DetectionDataset(found, 64).load(0, max(size) // reduction)
        height, width = sample.image.shape[:2]
        assert max(height, width) == max(size) // reduction
        reference = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA).astype(int)
        # Edges differ by the way of averaging; corners or colours exchanged would give 80.
        assert np.abs(sample.image - reference).mean() < 12


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
@pytest.mark.parametrize("long_side_px", [17, 32, 50, 64, 100])
def test_the_long_side_is_exact_and_boxes_scale_with_the_image(tmp_path, suffix, long_side_px):
    add(tmp_path, f"a{suffix}")
    sample = DetectionDataset(read(tmp_path), 64).load(0, long_side_px)
    height, width = sample.image.shape[:2]
    assert width == long_side_px
    assert abs(height - 0.75 * width) <= 0.5
    assert sample.image.dtype == np.uint8
    np.testing.assert_allclose(
        sample.boxes_xyxy, [[width / 4, height / 4, width * 0.75, height * 0.75]], rtol=1e-6
    )
    red, green = sample.image[height // 4, width // 4], sample.image[height // 4, 3 * width // 4]
    assert red[0] > 200 > 60 > max(red[1:])
    assert green[1] > 200 > 60 > max(green[0], green[2])


def test_ground_truth_is_in_pixels_of_the_file(tmp_path):
    add(tmp_path, "a.png")
    found = read(tmp_path)
    size_hw, boxes_xyxy, classes = DetectionDataset(found, 32).ground_truth(0)
    assert size_hw == (48, 64)
    assert classes.tolist() == [0]
    np.testing.assert_allclose(boxes_xyxy, [[16, 12, 48, 36]])


@pytest.mark.parametrize("change", ["removed", "truncated", "resized"])
def test_a_file_that_changes_after_indexing_becomes_grey_with_one_warning(tmp_path, change):
    path = add(tmp_path, "a.jpg")
    dataset = DetectionDataset(read(tmp_path), 64)
    data = path.read_bytes()
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 3] if change == "truncated" else encoded(picture(48, 64)))
    with pytest.warns(UserWarning, match=str(path)):
        sample = dataset.load(0, 64)
    assert sample.image.shape == (48, 64, 3)
    assert (sample.image == 114).all()
    assert not len(sample.classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.load(0, 64)


def test_ram_keeps_images_up_to_its_budget_and_changes_nothing(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        add(tmp_path, name)
    found = read(tmp_path)
    plain, kept = (
        DetectionDataset(found, 64),
        DetectionDataset(found, 64, cache_bytes=2 * 64 * 48 * 3),
    )
    for index in range(3):
        kept.load(index).image[:] = 0  # the caller may write to what it gets
    for index in range(3):
        np.testing.assert_array_equal(kept.load(index).image, plain.load(index).image)
    Path(found.path(0)).unlink()
    Path(found.path(2)).unlink()
    assert kept.load(0).image.max() > 200  # from memory
    with pytest.warns(UserWarning, match="has changed since it was indexed"):
        kept.load(2)  # beyond the budget
    with pytest.warns(UserWarning, match="has changed since it was indexed"):
        pickle.loads(pickle.dumps(kept)).load(0)  # the memory stays behind
    assert len(pickle.dumps(kept)) < 20_000


# ---- the cache


@pytest.fixture
def reads(monkeypatch):
    """Counts the images that are really read."""
    count = []
    check = index_builder.check_image
    monkeypatch.setattr(index_builder, "check_image", lambda path: count.append(path) or check(path))
    return count


def test_the_second_index_comes_from_the_cache_problems_and_all(tmp_path, reads):
    add(tmp_path, "a.jpg", label="1 0.1 0.2 0.5 0.2 0.3 0.6\n9 0.5 0.5 0.1 0.1\n")
    add(tmp_path, "b.jpg", b"bad")
    first, second = read(tmp_path), read(tmp_path)
    assert len(reads) == 2
    assert first.problems == second.problems
    assert second.num_classes == NUM_CLASSES
    for name in index_module.ARRAYS:
        before, after = getattr(first, name), getattr(second, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("change", ["label", "image", "new", "num_classes"])
def test_any_change_of_the_files_reads_again(tmp_path, reads, change):
    add(tmp_path, "a.jpg")
    read(tmp_path)
    if change == "label":
        (tmp_path / "labels" / "a.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    elif change == "image":
        path = add(tmp_path, "a.jpg")
        os.utime(path, ns=(1, 1))
    elif change == "new":
        add(tmp_path, "b.jpg")
    reads.clear()
    build_index(
        [tmp_path / "images"],
        4 if change == "num_classes" else NUM_CLASSES,
        tmp_path / "cache",
        progress=False,
    )
    assert reads


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_cache_is_reported_and_rebuilt(tmp_path, reads, damage):
    add(tmp_path, "a.jpg")
    first = read(tmp_path)
    (cache_file,) = (tmp_path / "cache").iterdir()  # nothing but the one file: temporaries are gone
    data = bytearray(cache_file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    cache_file.write_bytes({"cut": data[:-7], "flipped": data, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="damaged"):
        again = read(tmp_path)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    reads.clear()
    read(tmp_path)
    assert not reads


def test_a_cache_folder_that_cannot_be_written_is_only_a_warning(tmp_path):
    add(tmp_path, "a.jpg")
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.warns(UserWarning, match="could not be cached"):
        assert len(read(tmp_path)) == 1


def test_the_default_cache_is_outside_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "dsyolo"
    add(tmp_path / "data", "a.jpg")
    before = sorted((tmp_path / "data").rglob("*"))
    build_index([tmp_path / "data" / "images"], NUM_CLASSES, progress=False)
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert len(list((tmp_path / "xdg" / "dsyolo").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "dsyolo"


def test_several_runs_at_once_agree(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    for i in range(20):
        add(tmp_path, f"{i}.jpg")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: read(tmp_path, workers=2), range(12)))
    assert all(np.array_equal(one.path_bytes, found[0].path_bytes) for one in found)
    assert len(list((tmp_path / "cache").iterdir())) == 1
