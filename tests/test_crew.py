"""Ranks that read a data set together: each its share, the same result, and no wait that a slow disk makes long."""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from test_dataset import NUM_CLASSES, add, encoded, picture

from dsyolo.data import crew as crew_module
from dsyolo.data import scan as scan_module
from dsyolo.data.scan import scan
from dsyolo.data.scanned import ARRAYS, Scan
from dsyolo.errors import UserError
from dsyolo.parallel import dist

NUM_FILES = 5 * crew_module.CHUNK + 7  # more chunks than ranks, and one that is not full
TIMEOUT_S = 4.0  # of a meeting, in the test of a slow disk
SLOW_S = 3 * TIMEOUT_S


@pytest.fixture(scope="module")
def listing(tmp_path_factory):
    """A list of images with every kind of trouble: bad rows, bad images, missing ones, repeats."""
    root = tmp_path_factory.mktemp("data")
    jpeg = encoded(picture())
    paths = []
    for number in range(NUM_FILES):
        label = {0: None, 1: "9 0.5 0.5 0.1 0.1\n", 2: "1 0.1 0.2 0.5 0.2 0.3 0.6\n0 0.5 0.5 2 0.1\n"}
        content = b"no image" if number % 50 == 20 else jpeg
        paths.append(add(root, f"{number:04}.jpg", content, label.get(number % 11, "0 0.5 0.5 0.5 0.5\n")))
    text = "\n".join(map(str, [*paths[::-1], root / "images/gone.jpg", paths[3], paths[200]]))
    (root / "list.txt").write_text(text)
    return root / "list.txt"


def told(found: Scan) -> dict:
    return {name: getattr(found, name) for name in ARRAYS} | {"problems": found.problems}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert first.pop("problems") == second.pop("problems")
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_array_equal(array, second[name])


def read_together(sources: list[Path], cache_dir: Path, timeout_s: float | None = None, slow_s: float = 0.0):
    """What this rank gets, how many images it read, what it told, and, after a slow file, how a meeting ends."""
    reads, said = [], []
    check = scan_module.check_image
    world = dist.join()
    # every rank stands for a machine of its own, with a cache of its own
    world = world._replace(local_rank=0, local_size=1)
    crew = dist.ReadingCrew(world, said.append, timedelta(seconds=timeout_s) if timeout_s else None)

    def counted(path):
        if slow_s and world.rank == 1 and not reads:
            reads.append(path)
            time.sleep(slow_s)
        reads.append(path)
        return check(path)

    scan_module.check_image = counted
    try:
        source = sources[min(world.rank, len(sources) - 1)]
        found = scan(
            [source], NUM_CLASSES, cache_dir / f"of{world.rank}", workers=2, progress=False, crew=crew
        )
    except UserError as error:
        return str(error)
    finally:
        scan_module.check_image = check
    if slow_s:
        time.sleep(slow_s if world.rank == 1 else 0)
        try:
            crew.exchange(None)
        except RuntimeError:
            return told(found), len(reads), said, "timed out"
    return told(found), len(reads), said, "in time"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_get_bit_for_bit_what_one_process_gets(tmp_path, listing, size):
    alone = told(scan([listing], NUM_CLASSES, tmp_path / "alone", progress=False))
    assert len({problem.reason for problem in alone["problems"]}) > 4
    results = run_ranks(size, read_together, [listing], tmp_path)
    for found, *_ in results:
        assert_same(found, dict(alone))
    reads = [num for _, num, *_ in results]
    assert sum(reads) == NUM_FILES + 1  # every file once, the missing one too
    assert max(reads) - min(reads) <= crew_module.CHUNK
    again = run_ranks(size, read_together, [listing], tmp_path)
    for found, num, *_ in again:
        assert_same(found, dict(alone))
        assert num == 0  # from the cache


def test_a_machine_without_the_cache_gets_it_from_one_that_has_it(tmp_path, listing):
    first = run_ranks(2, read_together, [listing], tmp_path)
    (cache_file,) = (tmp_path / "of0").iterdir()
    content = cache_file.read_bytes()
    shutil.rmtree(tmp_path / "of0")
    for (found, num, *_), (before, *_) in zip(
        run_ranks(2, read_together, [listing], tmp_path), first, strict=True
    ):
        assert num == 0
        assert_same(found, before)
    assert cache_file.read_bytes()[32:200] == content[32:200]


def test_a_file_that_takes_longer_than_any_timeout_holds_up_nobody(tmp_path, listing):
    results = run_ranks(2, read_together, [listing], tmp_path, TIMEOUT_S, SLOW_S)
    alone = told(scan([listing], NUM_CLASSES, tmp_path / "alone", progress=False))
    for found, *_ in results:
        assert_same(found, dict(alone))
    assert results[0][3] == "timed out"  # the same wait within a meeting is what must not be
    said = [said for _, _, said, _ in results]
    assert len(said[0]) > len(said[1])  # a watch takes the one with the least progress for the late one
    assert any("waiting for the other ranks" in text for text in said[0])


@pytest.mark.parametrize("what", ["missing", "another"])
def test_ranks_that_see_other_files_are_told_on_all_of_them(tmp_path, listing, what):
    other = tmp_path / "other.txt"
    if what == "another":
        other.write_text("\n".join(listing.read_text().splitlines()[5:]))
    texts = run_ranks(2, read_together, [listing, other], tmp_path)
    assert texts[0] == texts[1]
    if what == "missing":
        assert "other.txt: no such folder" in texts[0]
        assert "This is what rank 1 found." in texts[0]
    else:
        assert f"rank 0 finds {NUM_FILES + 1:,} images and rank 1 {NUM_FILES - 4:,}" in texts[0]
        assert "same paths" in texts[0]
