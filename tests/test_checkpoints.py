"""What a folder of checkpoints holds after saving, full disks and kills: always at least the last whole one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import training
from ranks import run_ranks

from dsyolo.parallel.checkpoint import Progress, all_checkpoints, newest_whole, read_manifest

DISK_BYTES = 36 << 20  # a checkpoint of yolov5n with momentum and average takes 21 MiB


def progress(step: int) -> Progress:
    return Progress(total_steps=20, epochs=2, num_images=8, global_batch=8, seed=0, step=step)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def save_some(folder: str) -> dict[str, Any]:
    place = Path(folder)
    engine, _, ema, checkpoints = training.build(0, place, frozen=True)
    training.train(engine, ema, 0, 1)
    found: dict[str, Any] = {}
    (place / ".step_00000001.part").mkdir()  # of a run that was killed
    for step, is_best in ((1, True), (2, False), (3, False), (4, False)):
        assert checkpoints.save(progress(step), is_best=is_best) is None
    found["with the best"] = names(place)
    before = read_manifest(place / "step_00000004")
    checkpoints.save(progress(4).model_copy(update={"epoch": 1}))
    found["again"] = names(place)
    found["untouched"] = read_manifest(place / "step_00000004") == before
    found["newest"] = newest_whole(place, set_aside=False).name
    checkpoints.save(progress(5), is_best=True)
    found["another best"] = names(place)
    checkpoints.keep = 1
    checkpoints.save(progress(6))
    found["one kept"] = names(place)
    return found


def test_the_newest_and_the_best_stay_and_none_is_written_over(tmp_path):
    (found,) = run_ranks(1, save_some, str(tmp_path))
    assert found["with the best"] == ["step_00000001", "step_00000003", "step_00000004"]
    assert found["again"] == ["step_00000001", "step_00000004", "step_00000004.1"]
    assert found["untouched"]
    assert found["newest"] == "step_00000004.1"
    assert found["another best"] == ["step_00000004.1", "step_00000005"]
    assert found["one kept"] == ["step_00000005", "step_00000006"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk that holds one checkpoint and not two."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill_the_disk(folder: str) -> dict[str, Any]:
    from dsyolo.parallel import dist

    place = Path(folder)
    engine, _, ema, checkpoints = training.build(1, place, frozen=True)
    losses = training.train(engine, ema, 0, 1)
    said = [checkpoints.save(progress(1)), checkpoints.save(progress(2))]
    dist.barrier()
    left = names(place)
    training.train(engine, ema, 1, 2)
    other, _, of_other, checkpoints_of_other = training.build(1, place, seed=7, frozen=True)
    saved = checkpoints_of_other.load(all_checkpoints(place)[-1])
    again = training.train(other, of_other, 1, 2)
    return {"said": said, "left": left, "step": saved.step, "losses": (losses, again)}


def test_a_full_disk_is_told_on_all_ranks_and_the_last_checkpoint_kept(small_disk):
    folder = small_disk / "checkpoints"
    folder.mkdir()
    ranks = run_ranks(2, fill_the_disk, str(folder))
    for rank in ranks:
        assert rank["said"] == ranks[0]["said"]
        assert rank["left"] == ["step_00000001"]
        assert rank["step"] == 1
    written, problem = ranks[0]["said"]
    assert written is None
    assert problem.startswith("The checkpoint of step 2 could not be written: rank ")
    assert "No space left on device" in problem
    assert problem.endswith("Of those before, step_00000001 is kept.")
