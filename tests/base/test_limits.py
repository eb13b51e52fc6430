"""Limits of a process are told before libraries run into them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import ROOT

from dsyolo.base import limits
from dsyolo.base.errors import UserError, path_error
from dsyolo.cli import main

MIB = 1 << 20


def limited(command: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of Python under a limit of the shell."""
    return subprocess.run(
        ["bash", "-c", f'ulimit {command}; exec "$0" "$@"', sys.executable, *argv],
        capture_output=True, text=True, encoding="utf-8", timeout=120, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [["dsyolo/train.py", "--data", "x"], ["-m", "dsyolo.cli", "val", "--weights", "x"]]
)
def test_too_little_address_space_is_reported_before_torch_is_imported(words):
    done = limited("-v 800000", *words)
    assert done.returncode == 2, done.stderr
    assert "address space: limited to 0.8 GiB, but at least 1.0 GiB are needed. Raise it" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_imports_leave_is_compared(monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda kind: (1500 * MIB, 1500 * MIB))
    monkeypatch.setattr(limits, "_address_space", lambda: 700 * MIB)
    limits.check_address_space(700 * MIB)
    with pytest.raises(UserError, match=r"limited to 1.5 GiB, but at least 1.8 GiB are needed"):
        limits.check_address_space(1100 * MIB)


def test_open_files_are_raised_as_far_as_allowed_or_reported():
    code = (
        "import resource; from dsyolo.base.limits import raise_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (30, 60)); raise_open_files(50)\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try: raise_open_files(100)\n"
        "except ValueError as error: print(error)"
    )
    done = limited("-n 60", "-c", code)
    assert "(60, 60)" in done.stdout, done.stderr
    assert "open files: limited to 60, but up to 100 are needed. Raise it (`ulimit -n 1024`)" in done.stdout


def test_a_small_shared_memory_is_reported(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=16, f_frsize=4096))
    limits.check_shared_memory(65536)
    with pytest.raises(
        UserError, match=r"/dev/shm: 0.1 MiB free, but up to 9.5 MiB are needed .*--workers 0"
    ):
        limits.check_shared_memory(10_000_000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["plan", "--gpus", "1x8GiB"]])
def test_a_full_disk_behind_standard_output_is_reported(words):
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dsyolo.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
    assert done.returncode == 74, done.stderr
    assert done.stderr.strip() == "Standard output cannot be written: No space left on device."


FULL = """
import resource
from pathlib import Path
from dsyolo import cli
from dsyolo.config.option_checks import write_json

write_json(Path("m.json"), {"kept": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
cli._run = lambda argv: write_json(Path("m.json"), {"map50_95": 0.5})
raise SystemExit(cli.main(["val"]))
"""


def test_a_report_that_cannot_be_written_whole_is_named_and_the_one_before_is_kept(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 74
    assert done.stderr.strip() == "m.json cannot be written: File too large. What was there is kept."
    assert (tmp_path / "m.json").read_text(encoding="utf-8") == '{\n  "kept": 1\n}\n'
    assert [one.name for one in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "words",
    [
        ["val", "--weights", "w" * 5000, "--data", "x"],
        ["convert", "coco", "s" * 300, "d"],
        ["convert", "voc", "s" * 300, "d"],
        ["detect", "--weights", "x", "i" * 5000],
        ["sample", "d" * 300],
        ["doctor", "--hostfile", "h" * 5000],
        ["train", "--data", "d" * 5000],
        ["train", "--data", "x", "--project", "p" * 5000],
        ["train", "--data", "x", "--name", "n" * 300, "--resume"],
        ["train", "--data", "x", "--hyp", "h" * 5000, "--weights", "w" * 300],
        ["train", "--data", "x", "--deepspeed_config", "w" * 300],
    ],
)
def test_names_over_the_systems_limit_are_no_tracebacks(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    assert status in (1, 2)
    assert "Traceback" not in "".join(capsys.readouterr())


def test_faults_of_paths_have_a_remedy():
    found = path_error(PermissionError(13, "Permission denied", "/a/b"))
    assert str(found) == (
        "A path cannot be used:\n  /a/b: Permission denied. Change its permissions, or those of the folders above it."
    )
    assert path_error(OSError(28, "No space left on device", "/a")) is None
