"""`dsyolo <command>`: each command is found, and only its own module is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsyolo import cli, train
from dsyolo.base.errors import UserError
from dsyolo.commands import convert

LIGHT = ("val", "detect", "convert", "sample", "plan", "simulate")
HELP = """
import contextlib, sys
from dsyolo import cli
for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"] if name else ["--help"])
    assert "torch" not in sys.modules, name
"""


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-c", HELP, "", *LIGHT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: dsyolo {name} " in done.stdout for name in LIGHT)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys, monkeypatch):
    monkeypatch.setattr(cli, "outlive_readers", lambda: None)
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: dsyolo {name} " in capsys.readouterr().out


def test_train_is_the_entry_of_train_py(monkeypatch):
    given = []
    monkeypatch.setattr(cli, "outlive_readers", lambda: given.append("streams"))
    monkeypatch.setattr(train, "main", lambda *args: given.extend(args) or 7)
    assert cli.main(["train", "--data", "x", "--", "--help"]) == 7
    assert given == ["streams", ["--data", "x", "--", "--help"], "dsyolo train"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("No", ["a: b."]), 2, "a: b."),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (None, 0, ""),
    ],
)
def test_how_a_command_ends_is_its_status(error, status, message, monkeypatch, capsys):
    def run(args) -> int:
        if error:
            raise error
        return 0

    monkeypatch.setattr(convert, "run", run)
    assert cli.main(["convert", "coco", "src", "dst"]) == status
    assert message in capsys.readouterr().err


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2
    assert "usage: dsyolo" in capsys.readouterr().err


def test_what_another_programs_option_became_is_noted(monkeypatch, capsys):
    from dsyolo.commands import val

    monkeypatch.setattr(val, "run", lambda args: 0)
    assert cli.main(["val", "--weights", "w", "--data", "d", "plots=True", "simplify=True"]) == 0
    assert capsys.readouterr().err.startswith("Note: plots=True, simplify=True: defaults of other programs")


def test_a_reader_that_stops_reading_ends_it_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dsyolo.cli", "sample", "--images", "4", str(tmp_path / "drawn")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.returncode == 141
    assert "BrokenPipe" not in done.stderr
