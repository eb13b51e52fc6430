"""A run's folder belongs to one run at a time, and what lies in it is not written over."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TRAIN, alone, arguments, begin, make_place

from dsyolo.base.errors import UserError
from dsyolo.cluster import run_lock as claim
from dsyolo.cluster.run_lock import RunLock
from dsyolo.cluster.shared_fs import set_aside

HOLDER = """
import sys, time
from pathlib import Path
from dsyolo.cluster.run_lock import RunLock
claim = RunLock(Path(sys.argv[1]))
claim.take(0)
print("taken", flush=True)
sys.stdin.readline()
"""


class Holder:
    """A process that is in a folder, until it is told to end or killed."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)

    def __enter__(self) -> subprocess.Popen:
        assert self.process.stdout.readline() == "taken\n"
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("claim"))


def test_a_folder_is_had_by_one_process_and_free_once_that_is_killed(tmp_path):
    with Holder(tmp_path) as holder:
        with pytest.raises(UserError, match=f"a run is in it: process {holder.pid} on "):
            RunLock(tmp_path).take(0.3)
        holder.kill()
        holder.wait()
        RunLock(tmp_path).take(0)
    assert f"process {os.getpid()} on " in (tmp_path / claim.FILE).read_text()


def test_whoever_waits_gets_it_or_gives_up_when_asked(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with Holder(tmp_path) as holder:
        begin = time.monotonic()
        with pytest.raises(UserError):
            RunLock(tmp_path).take(60, is_over=lambda: time.monotonic() > begin + 0.3)
        assert "waiting for it, 60 s at most" in caplog.text
        holder.stdin.write("end\n")
        holder.stdin.close()
        RunLock(tmp_path).take(20)
    assert time.monotonic() - begin < 20


def test_a_second_run_in_a_folder_is_refused(place):
    with Holder(place / "runs/taken") as holder:
        done = alone(place, "taken", "--resume", "auto", rendezvous_timeout_s=5)
        assert done.returncode == claim.BUSY, done.stdout + done.stderr
        assert f"a run is in it: process {holder.pid}" in done.stderr
        assert "--name" in done.stderr
        assert os.listdir(place / "runs/taken") == [claim.FILE]


@pytest.mark.soak
def test_what_another_run_saved_while_this_one_waited_is_not_written_over(place):
    assert alone(place, "other", epochs=1).returncode == 0
    command = [sys.executable, str(TRAIN), *arguments(place, "late", epochs=2), "--resume", "auto"]
    with Holder(place / "runs/late") as holder:
        waiting = begin(place, command)
        said = ""
        while "waiting for it" not in said:
            line = waiting.stdout.readline()
            assert line, said
            said += line
        shutil.copytree(
            place / "runs/other", place / "runs/late", dirs_exist_ok=True, ignore=lambda *_: [claim.FILE]
        )
        holder.stdin.write("end\n")
        holder.stdin.close()
        said += waiting.communicate(timeout=60)[0]
    assert waiting.returncode == claim.BUSY, said
    assert "another run has saved there" in said
    assert (place / "runs/late/weights/best.safetensors").read_bytes() == (
        place / "runs/other/weights/best.safetensors"
    ).read_bytes()


def test_weights_without_a_checkpoint_are_kept_when_a_run_begins_anew(place):
    (place / "runs/old/weights").mkdir(parents=True)
    (place / "runs/old/weights/best.safetensors").write_text("mine")
    done = alone(place, "old", "--resume", "auto", epochs=1)
    assert done.returncode == 0, done.stderr
    assert "held weights but no checkpoint to resume from. The weights were moved to" in done.stdout
    assert (place / "runs/old/weights.1/best.safetensors").read_text() == "mine"
    assert (place / "runs/old/weights/best.safetensors").stat().st_size > 1000


def test_only_a_folder_with_files_is_set_aside(tmp_path):
    assert set_aside(tmp_path / "none") is None
    (tmp_path / "weights").mkdir()
    assert set_aside(tmp_path / "weights") is None
    (tmp_path / "weights.1").mkdir()
    (tmp_path / "weights/last").touch()
    assert set_aside(tmp_path / "weights") == tmp_path / "weights.2"
    assert (tmp_path / "weights.2/last").exists()
