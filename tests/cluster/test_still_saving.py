"""A run that starts while another one of this user still saves without its launcher."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsyolo.base.launcher import process_name
from dsyolo.cluster import still_saving
from dsyolo.cluster.still_saving import announce, wait_for_others


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(still_saving, "own_folder", lambda: tmp_path)
    return tmp_path


def test_a_new_run_waits_for_the_process_that_saves(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    saving = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (folder / f"saving-{process_name(saving.pid)}").touch()
    slept = []

    def sleep(_: float) -> None:
        slept.append(saving.poll())
        if len(slept) == 3:
            saving.communicate(b"\n")

    wait_for_others(logs=True, sleep=sleep)
    assert slept == [None, None, None]
    assert [record.getMessage() for record in caplog.records] == [
        f"another run on this machine still saves (process {saving.pid}): waiting for it"
    ]
    assert list(folder.iterdir()) == []


def test_it_waits_neither_for_itself_nor_for_those_that_have_gone_nor_forever(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce()
    own = folder / f"saving-{process_name(os.getpid())}"
    assert own.exists()
    for name in (f"saving-{os.getppid()}-1", "saving-x"):  # its id belongs to another process now
        (folder / name).touch()
    wait_for_others(logs=True, sleep=lambda _: pytest.fail("nobody else saves"))
    assert list(folder.iterdir()) == [own]
    (folder / f"saving-{process_name(os.getppid())}").touch()
    monkeypatch.setattr(still_saving, "MOST_S", 0.01)
    wait_for_others(logs=False)
    (record,) = caplog.records
    assert record.getMessage() == f"process {os.getppid()} still saves; this run starts beside it."
