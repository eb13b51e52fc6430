"""The contents of a folder of checkpoints after saving, full disks and kills: always at least the last whole one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import training
from ranks import run_ranks

from dsyolo.base.errors import UserError
from dsyolo.checkpoint import manifest
from dsyolo.checkpoint.latest import newest_whole
from dsyolo.checkpoint.manifest import Manifest, all_checkpoints, read_manifest
from dsyolo.checkpoint.train_state import TrainState

DISK_BYTES = 36 << 20  # a checkpoint of yolov5n with momentum and average takes 21 MiB


def progress(step: int) -> TrainState:
    place = {"step": step, "epoch": (step - 1) // 4}
    return TrainState(total_steps=20, epochs=5, num_images=32, global_batch=8, seed=0, **place)


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
    found["newest"] = newest_whole(place, checkpoints._world, set_aside=False).name
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
    from dsyolo.cluster import collectives

    place = Path(folder)
    engine, _, ema, checkpoints = training.build(1, place, frozen=True)
    losses = training.train(engine, ema, 0, 1)
    said = [checkpoints.save(progress(1)), checkpoints.save(progress(2))]
    collectives.barrier()
    left = names(place)
    training.train(engine, ema, 1, 2)
    other, _, of_other, checkpoints_of_other = training.build(1, place, seed=7, frozen=True)
    saved = checkpoints_of_other.load(all_checkpoints(place)[-1])
    again = training.train(other, of_other, 1, 2)
    return {"said": said, "left": left, "step": saved.step, "losses": (losses, again)}


def test_a_full_disk_is_reported_on_all_ranks_and_the_last_checkpoint_kept(small_disk):
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
    assert problem.endswith("The one before, step_00000001, is kept.")


# ---- choosing


def write_checkpoint(folder: Path, step: int, names: tuple[str, ...] = ("a", "b", "c", "d")) -> Path:
    """As ranks would save it, with a file of each name."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = {f"{name}.safetensors": name.encode() * 1000 for name in names}
    for name, content in files.items():
        (path / name).write_bytes(content)
    said = Manifest(
        format=1,
        progress=progress(step),
        optimizer_scalars={},
        ema_updates=0,
        files={name: manifest.sha256_of(path / name) for name in files},
        tensors={},
    )
    (path / "progress.json").write_text(said.model_dump_json())
    return path


def choose(folder: Path, set_aside: bool) -> tuple[str, list[str]]:
    """The name of the checkpoint that this rank takes, or why none, and the files that it read for that."""
    from dsyolo.engine import process_group

    world, read, plain = process_group.init_process_group(), [], manifest.sha256_of

    def noted(path: Path) -> str:
        read.append(path.name)
        return plain(path)

    manifest.sha256_of = noted
    try:
        return newest_whole(folder, world, set_aside=set_aside).name, read
    except UserError as error:
        return str(error), read
    finally:
        manifest.sha256_of = plain


def test_ranks_share_out_what_is_verified_and_take_the_same(tmp_path):
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2)
    ranks = run_ranks(2, choose, tmp_path, True)
    assert [name for name, _ in ranks] == ["step_00000002"] * 2
    assert [len(read) for _, read in ranks] == [2, 2]
    assert sorted(ranks[0][1] + ranks[1][1]) == [f"{name}.safetensors" for name in "abcd"]


@pytest.mark.parametrize("set_aside", [False, True])
def test_what_one_rank_finds_damaged_all_refuse_or_set_aside(tmp_path, set_aside):
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    (newest / "b.safetensors").write_bytes(b"b" * 999 + b"c")  # in the share of rank 1
    (newest / "c.safetensors").unlink()
    (first, read), (second, of_second) = run_ranks(2, choose, tmp_path, set_aside)
    assert first == second
    assert "b.safetensors" in of_second
    assert "b.safetensors" not in read
    if set_aside:
        assert first == "step_00000001"
        assert names(tmp_path) == ["damaged_step_00000002", "step_00000001"]
    else:
        assert "b.safetensors: its checksum is not the one that was saved" in first
        assert "c.safetensors: its checksum is not the one that was saved" in first
        assert names(tmp_path) == ["step_00000001", "step_00000002"]
