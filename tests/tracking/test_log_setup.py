"""The log of a rank: what goes to the terminal, what to its file, and that nothing is lost before there is a folder."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from dsyolo.engine.deepspeed_internals import route_logger
from dsyolo.tracking.log_setup import RunLog

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
log = logging.getLogger("dsyolo.test")


@pytest.fixture(autouse=True)
def handlers_put_back(monkeypatch: pytest.MonkeyPatch):
    root = logging.getLogger()
    before, shown = root.handlers[:], warnings.showwarning
    yield
    root.handlers[:], warnings.showwarning = before, shown


def file_of(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank_{rank:04d}.log").read_text(encoding="utf-8")


def test_what_was_logged_before_there_was_a_folder_is_in_the_file(tmp_path: Path, capsys):
    run_log = RunLog(rank=3)
    log.info("early")
    run_log.open_file(tmp_path)
    log.info("late, 红细胞")
    lines = file_of(tmp_path, 3).splitlines()
    assert [re.sub(LINE, "", line) for line in lines] == ["INFO rank 3: early", "INFO rank 3: late, 红细胞"]
    assert capsys.readouterr() == ("", "")  # another rank's figures are not for the terminal
    log.warning("cannot do that")
    assert re.fullmatch(LINE + "WARNING rank 3: cannot do that\n", capsys.readouterr().out)


def test_errors_go_to_standard_error_as_they_are(tmp_path: Path, capsys):
    RunLog(rank=0)
    log.error("data.yaml cannot be used")
    log.info("a line")
    out, err = capsys.readouterr()
    assert err == "\ndata.yaml cannot be used\n\n"
    assert re.fullmatch(LINE + "INFO rank 0: a line\n", out)


def test_a_terminal_shows_plain_lines(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    RunLog(rank=0)
    log.info("epoch 1/3")
    log.warning("slow")
    assert terminal.getvalue() == "epoch 1/3\nWARNING: slow\n"


def test_lines_of_deepspeed_go_to_the_file_until_they_are_asked_for(tmp_path: Path, capsys):
    run_log = RunLog(rank=0)
    run_log.open_file(tmp_path)
    theirs = logging.getLogger("DeepSpeed")
    level = theirs.level
    theirs.addHandler(logging.StreamHandler(sys.stdout))
    route_logger()
    theirs.info("DeepSpeedEngine configuration")
    assert capsys.readouterr().out == ""
    theirs.warning("odd")
    run_log.show_deepspeed()
    theirs.info("step=1")
    theirs.setLevel(level)
    out = capsys.readouterr().out
    assert [re.sub(LINE, "", line) for line in out.splitlines()] == [
        "WARNING rank 0: DeepSpeed: odd",
        "INFO rank 0: DeepSpeed: step=1",
    ]
    assert file_of(tmp_path).count("DeepSpeed: ") == 3


def test_warnings_are_logged_by_their_text(tmp_path: Path, capsys):
    run_log = RunLog(rank=0)
    run_log.open_file(tmp_path)
    from dsyolo.tracking.background_plotter import BackgroundPlotter

    plotter = BackgroundPlotter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = sys.modules["dsyolo.tracking.log_setup"]._log_warning
        plotter.draw("grid.jpg", lambda: 1 / 0)
        plotter.close()
        warnings.warn("of somebody else", stacklevel=1)
    out, err = capsys.readouterr()
    assert re.fullmatch(
        LINE + "WARNING rank 0: grid.jpg was not drawn. ZeroDivisionError: division by zero\n", out
    )
    assert err == ""
    assert "UserWarning: of somebody else" in file_of(tmp_path)


def test_a_folder_that_cannot_be_written_to_costs_a_warning(tmp_path: Path, capsys):
    (tmp_path / "logs").write_text("a file")
    RunLog(rank=0).open_file(tmp_path)
    assert (
        "rank_0000.log cannot be written: File exists. The run goes on without it." in capsys.readouterr().out
    )


def test_a_second_log_in_one_process_replaces_the_first(tmp_path: Path, capsys):
    RunLog(rank=0)
    RunLog(rank=0)
    log.info("once")
    assert capsys.readouterr().out.count("once") == 1
