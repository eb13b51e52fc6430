"""Ranks that read a data set together: each its share, the same result, and no wait that a slow disk makes long."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from image_files import NUM_CLASSES, add, encoded, picture
from ranks import run_ranks

from dsyolo.base.errors import UserError
from dsyolo.cluster.collectives import ClusterCommunicator
from dsyolo.cluster.preemption import Preempted
from dsyolo.data import index_builder, parallel_map
from dsyolo.data.index import ARRAYS, DatasetIndex
from dsyolo.data.index_builder import build_index
from dsyolo.engine import process_group

NUM_FILES = 5 * parallel_map.CHUNK + 7  # more chunks than ranks, and one that is not full
TIMEOUT_S = 4.0  # of an exchange, in the test of a slow disk
SLOW_S = 3 * TIMEOUT_S
WAITS = "reading the data set, waiting for the other ranks"


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


def contents(found: DatasetIndex) -> dict:
    return {name: getattr(found, name) for name in ARRAYS} | {"problems": found.problems}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert first.pop("problems") == second.pop("problems")
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_array_equal(array, second[name])


def read_together(sources: list[Path], cache_dir: Path, timeout_s: float | None = None, slow_s: float = 0.0):
    """Return what this rank gets the first and the second time, how many images it read each time, and its progress messages.

    Args:
        timeout_s: of an exchange.
        slow_s: the first file of rank 1 takes so long; then, as a proof, an exchange for which it is as late.
    """
    reads, messages = [], []
    check = index_builder.check_image
    # every rank stands for a machine of its own, with a cache of its own
    world = process_group.init_process_group()._replace(local_rank=0, local_size=1)
    timeout = timedelta(seconds=timeout_s) if timeout_s else None
    communicator = ClusterCommunicator(world, messages.append, lambda: 0, timeout)

    def counted(path):
        reads.append(path)
        if slow_s and world.rank == 1 and len(reads) == 1:
            time.sleep(slow_s)
        return check(path)

    index_builder.check_image = counted
    source = sources[min(world.rank, len(sources) - 1)]
    results = []
    try:
        for _ in range(2):
            reads.clear()
            found = build_index(
                [source],
                NUM_CLASSES,
                cache_dir / f"of{world.rank}",
                workers=2,
                progress=False,
                communicator=communicator,
            )
            results.append((contents(found), len(reads)))
    except UserError as error:
        return str(error)
    finally:
        index_builder.check_image = check
    proof = ""
    if slow_s:
        time.sleep(slow_s if world.rank == 1 else 0)
        try:
            communicator.exchange(None)
        except RuntimeError as error:
            proof = str(error)
    return results, messages, proof


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_get_bit_for_bit_what_one_process_gets(tmp_path, listing, size):
    alone = contents(build_index([listing], NUM_CLASSES, tmp_path / "alone", progress=False))
    assert len({problem.reason for problem in alone["problems"]}) > 4
    first, second = zip(
        *(results for results, *_ in run_ranks(size, read_together, [listing], tmp_path)), strict=True
    )
    for found, _ in (*first, *second):
        assert_same(found, dict(alone))
    reads = [num for _, num in first]
    assert sum(reads) == NUM_FILES + 1  # every file once, the missing one too
    assert max(reads) - min(reads) <= parallel_map.CHUNK
    assert [num for _, num in second] == [0] * size  # from the cache


def test_a_machine_without_the_cache_gets_it_from_one_that_has_it(tmp_path, listing):
    alone = build_index([listing], NUM_CLASSES, tmp_path / "of1", progress=False)
    for results, *_ in run_ranks(2, read_together, [listing], tmp_path):
        for found, num_read in results:
            assert num_read == 0
            assert_same(found, contents(alone))
    assert [path.name for path in (tmp_path / "of0").iterdir()] == [
        path.name for path in (tmp_path / "of1").iterdir()
    ]


@pytest.mark.soak
def test_a_file_that_takes_longer_than_any_timeout_holds_up_nobody(tmp_path, listing):
    ranks = run_ranks(2, read_together, [listing], tmp_path, TIMEOUT_S, SLOW_S)
    alone = contents(build_index([listing], NUM_CLASSES, tmp_path / "alone", progress=False))
    for results, *_ in ranks:
        assert_same(results[0][0], dict(alone))
    messages, proofs = [one for _, one, _ in ranks], [proof for *_, proof in ranks]
    assert "imed out" in proofs[0]  # the same wait within an exchange is what must not be
    # the watchdog takes the rank with the fewest messages for the late one
    assert messages[0].index(WAITS) < messages[1].index(WAITS)


@pytest.mark.parametrize("what", ["missing", "another"])
def test_ranks_that_see_other_files_are_refused_on_all_of_them(tmp_path, listing, what):
    other = tmp_path / "other.txt"
    if what == "another":
        other.write_text("\n".join(listing.read_text().splitlines()[5:]))
    texts = run_ranks(2, read_together, [listing, other], tmp_path)
    for text in texts:
        if what == "missing":
            assert "other.txt: no such folder" in text
            assert "Rank 1 reported this." in text
        else:
            assert (
                f": rank 0 finds {NUM_FILES + 1:,} images and rank 1 finds {NUM_FILES - 4:,}. Every host"
                in text
            )
            assert "same paths" in text


def stopped_while_indexing(source: Path, cache_dir: Path) -> tuple[bool, int]:
    """Rank 1 is asked to stop while it reads; whether this rank stops too, and how many images it read."""
    asked, reads = [], []
    check = index_builder.check_image
    world = process_group.init_process_group()._replace(local_rank=0, local_size=1)
    communicator = ClusterCommunicator(
        world, lambda _: None, lambda: 75 if asked else 0, timedelta(seconds=60)
    )

    def slow(path):
        reads.append(path)
        if world.rank == 1 and len(reads) == 3:
            asked.append(True)
        time.sleep(0.1)
        return check(path)

    index_builder.check_image = slow
    try:
        build_index(
            [source],
            NUM_CLASSES,
            cache_dir / f"of{world.rank}",
            workers=2,
            progress=False,
            communicator=communicator,
        )
    except Preempted:
        return True, len(reads)
    finally:
        index_builder.check_image = check
    return False, len(reads)


def test_indexing_stops_on_all_ranks_soon_after_one_was_asked_to(tmp_path, listing):
    for has_stopped, num_read in run_ranks(2, stopped_while_indexing, listing, tmp_path):
        assert has_stopped
        assert num_read < 100  # in the two seconds until an exchange
    assert not list(tmp_path.rglob("index-*"))
