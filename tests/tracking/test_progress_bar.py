"""The progress bar: a line that fits the terminal, its times, and that none of it is in a file."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_tracker import BATCH, STEPS_PER_EPOCH, TrainState, drawn, go_on, some_metrics, stats_of

from dsyolo.tracking import progress_bar, run_display
from dsyolo.tracking.log_setup import RunLog
from dsyolo.tracking.progress_bar import Eta, ProgressBar, compose, duration
from dsyolo.tracking.run_display import epoch_lines
from dsyolo.tracking.tracker import RunTracker

assert drawn  # a fixture for every test here: pictures take seconds
END = "\x04end\x04"  # of what `Terminal.take` returns
PARTS = ("ETA epoch 0:12 run 1:04:56", "38.2 images/s", "box 0.0512 obj 0.0211 cls 0.0123", "1.50 GiB")


class Terminal:
    """A pseudo terminal."""

    def __init__(self, columns: int) -> None:
        self.leader, follower = pty.openpty()
        self.resize(columns)
        self.stream = os.fdopen(follower, "w", encoding="utf-8")
        self._text = ""
        threading.Thread(target=self._read, daemon=True).start()

    def connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of standard output and error; pytest would put its own back after a fixture."""
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", self.stream)
        monkeypatch.setattr(sys, "stdout", self.stream)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def take(self) -> list[str]:
        """Everything that was written since the last call, cut where a line was begun anew."""
        self.stream.write(END)
        self.stream.flush()
        while END not in self._text:
            time.sleep(0.001)
        text, self._text = self._text.replace(END, ""), ""
        return [line.rstrip() for line in re.split(r"[\r\n]+", text.replace("\x1b[K", "")) if line.strip()]

    def _read(self) -> None:
        """A terminal that nobody reads makes its writers wait."""
        with contextlib.suppress(OSError):
            while data := os.read(self.leader, 65536):
                self._text += data.decode()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal(120)
    yield terminal
    terminal.stream.close()
    os.close(terminal.leader)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(run_display, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(40, 0), (60, 0), (70, 1), (80, 2), (100, 2), (110, 3), (120, 4), (200, 4), (400, 4)],
)
def test_the_line_fits_and_the_first_parts_stay(columns, shown):
    line = compose(columns, "epoch 3/100", 25, 40, PARTS)
    assert len(line) < columns
    assert line.startswith("epoch 3/100 [")
    assert " 62 % 25/40" in line
    assert [part in line for part in PARTS] == [True] * shown + [False] * (4 - shown)
    assert len(re.search(r"\[([#.]*)\]", line)[1]) >= 6


@pytest.mark.parametrize("columns", range(1, 32))
def test_a_very_narrow_terminal_gets_what_fits(columns):
    assert compose(columns, "epoch 3/100", 25, 40, PARTS) == "epoch 3/100  62 % 25/40"[: columns - 1]


def test_the_bar_grows_with_what_is_done():
    fills = [compose(80, "validation", done, 40, ()).count("#") for done in range(41)]
    assert fills == sorted(fills)
    assert (fills[0], fills[20], fills[40]) == (0, 15, 30)
    assert compose(80, "checkpoint", 0, 0, ()) == "checkpoint"


def test_times_are_short():
    times = [duration(s) for s in (0, 7.4, 59.6, 61, 754, 3600, 3723, 360000)]
    assert times == ["0:00", "0:07", "1:00", "1:01", "12:34", "1:00:00", "1:02:03", "100:00:00"]


def test_the_time_left_has_recent_steps_and_what_comes_between_epochs():
    eta = Eta()
    assert eta.left_s(10) is None
    eta.step(30.0)  # the first step, with all that it sets up
    assert eta.left_s(10) == 300
    for _ in range(3):
        eta.step(2.0)
    assert eta.left_s(10) == pytest.approx(20)
    assert eta.left_s(10, 2) == pytest.approx(20)
    eta.between(7.0)
    eta.between(3.0)
    assert eta.left_s(10, 2) == pytest.approx(20 + 2 * 5)
    for _ in range(200):
        eta.step(4.0)
    assert eta.left_s(10) == pytest.approx(40, rel=1e-3)


def test_a_run_on_a_terminal(
    tmp_path: Path, terminal: Terminal, clock: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """The live epoch, times of epoch and run, the best epoch; and the terminal may change its width."""
    terminal.connect(monkeypatch)
    RunLog(rank=0)
    progress = TrainState()
    tracker = RunTracker(tmp_path, progress, log_every=1, memory_gib=lambda: 1.5)
    tracker.mfu = lambda images_per_s: 0.25
    assert terminal.take()[-1].startswith("epoch 1/4 [")
    for columns, num_parts in ((80, 2), (120, 4), (200, 6)):
        terminal.resize(columns)
        progress.step += 1
        progress.images_seen += BATCH
        clock.now += 2.0
        tracker.step(progress, stats_of(progress.step), lr=0.01, data_wait_s=0.0)
        tracker.display.begin(progress)  # draws at once
        line = terminal.take()[-1]
        assert len(line) < columns
        assert f" {progress.step}/5  ETA epoch" in line
        wanted = ("ETA epoch", " images/s", "box ", "MFU 25 %", "1.50 GiB", "lr 0.01")
        assert [part in line for part in wanted] == [i < num_parts for i in range(6)], line
    assert "ETA epoch 0:04 run 0:34" in line  # 2 and 17 steps of 2 s
    progress.step, progress.images_seen = 5, 5 * BATCH
    clock.now += 4.0
    tracker.step(progress, stats_of(5), lr=0.01, data_wait_s=0.0)
    terminal.take()
    with tracker.display.part("validation", 3):
        assert terminal.take()[-1].startswith("epoch 1/4 validation [......")
        for _ in range(3):
            tracker.display.advance()
            tracker.display._bar._drawn = 0
    assert re.search(r"validation \[#+\.+\]  66 % 2/3  ETA 0:00", " ".join(terminal.take()))
    clock.now += 10.0
    tracker.epoch(progress, some_metrics())
    with tracker.display.part("checkpoint"):
        assert terminal.take()[-1] == "epoch 1/4 checkpoint"
    progress.epoch = 1
    tracker.begin(progress)
    line = terminal.take()[-1]
    assert line.startswith("epoch 2/4 [")
    assert "  0 % 0/5  ETA epoch 0:1" in line
    assert "best mAP50-95 1.0000 (epoch 1)" in line
    run_s = int(re.search(r"run 1:(\d\d)", line)[1])
    assert 0 <= run_s <= 20  # 15 steps of 2 to 3 s, and three ends of epochs of 10 s
    tracker.close()
    assert progress_bar._shown == []


def test_lines_of_the_log_stand_alone_above_the_bar(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    terminal.connect(monkeypatch)
    RunLog(rank=0)
    tracker = RunTracker(tmp_path, TrainState(), log_every=1)
    go_on(tracker, TrainState(), until_step=2 * STEPS_PER_EPOCH)
    tracker.close()
    lines = terminal.take()
    assert sum(line.startswith("epoch 1/4  box ") for line in lines) == 1
    assert not [line for line in lines if "step " in line]  # the bar shows steps
    assert [line.strip() for line in lines if "* best" in line] == ["mAP50 1.0000  mAP50-95 1.0000  * best"]


@pytest.mark.parametrize(("err_is_terminal", "term"), [(False, "xterm"), (True, "dumb")])
def test_nothing_of_the_bar_is_written_elsewhere(
    tmp_path: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    err_is_terminal: bool,
    term: str,
):
    terminal.connect(monkeypatch)
    monkeypatch.setenv("TERM", term)
    if not err_is_terminal:
        file = (tmp_path / "err").open("w", encoding="utf-8")
        monkeypatch.setattr(sys, "stderr", file)
    RunLog(rank=0)
    tracker = RunTracker(tmp_path, TrainState(), log_every=1)
    go_on(tracker, TrainState(), until_step=STEPS_PER_EPOCH)
    with tracker.display.part("validation", 3):
        tracker.display.advance()
    tracker.close()
    lines = terminal.take()
    assert sum(" step " in line and "images/s" in line for line in lines) == STEPS_PER_EPOCH
    assert not [line for line in lines if "[" in line]
    if not err_is_terminal:
        file.close()
        assert (tmp_path / "err").read_text(encoding="utf-8") == ""


def test_steps_are_in_a_file_while_the_bar_is_on_a_terminal(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    """As in `dsyolo train > log`: one has the lines, the other the bar."""
    terminal.connect(monkeypatch)
    with (tmp_path / "out").open("w+", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        RunLog(rank=0)
        tracker = RunTracker(tmp_path, TrainState(), log_every=1)
        go_on(tracker, TrainState(), until_step=3)
        tracker.close()
        file.seek(0)
        text = file.read()
    assert text.count(" images/s  box ") == 3
    assert "[" not in text
    assert any("] " in line for line in terminal.take())


def test_the_best_epoch_is_marked_and_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "dsyolo")
    tracker, progress = RunTracker(tmp_path, TrainState()), TrainState()
    for epoch, shift in enumerate((4, 2, 6, 0)):
        progress.step, progress.epoch = 5 * (epoch + 1), epoch
        metrics = some_metrics()
        object.__setattr__(metrics, "map50_95", 1 - shift / 10)
        tracker.epoch(progress, metrics)
    tracker.close()
    assert ["* best" in line for line in caplog.messages] == [True, True, False, True]


def test_fitness_of_nought_is_the_best_until_there_is_a_better_one(tmp_path: Path):
    tracker = RunTracker(tmp_path, TrainState())
    row = {"epoch": 0, "map50_95": 0.0}
    assert [tracker._is_best({**row, "fitness": f}) for f in (None, 0.0, 0.0, 0.1)] == [
        False,
        True,
        False,
        True,
    ]
    tracker.close()


def test_a_resumed_run_knows_its_best_epoch(tmp_path: Path):
    tracker, progress = RunTracker(tmp_path, TrainState()), TrainState()
    go_on(tracker, progress, until_step=10)
    tracker.close()
    resumed = RunTracker(tmp_path, progress)
    assert resumed.display._best == "best mAP50-95 1.0000 (epoch 2)"
    resumed.close()


def test_lines_of_an_epoch_fit_eighty_columns():
    losses = {f"{prefix}{name}": 0.1234 for prefix in ("", "val_") for name in ("box", "obj", "cls")}
    row = {
        **losses,
        "images_per_s": 38.2,
        "data_wait_share": 0.01,
        "memory_gib": 1.5,
        "train_s": 1,
        "val_s": 2,
    }
    row |= {"map50": 0.5, "map50_95": 0.3}
    text = epoch_lines(TrainState(epoch=9, epochs=300), row, is_best=True)
    assert text.splitlines()[0].startswith("epoch  10/300  box 0.1234  obj 0.1234  cls 0.1234  ")
    assert "val_box 0.1234  val_obj 0.1234  val_cls 0.1234" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_bar_that_is_closed_is_silent(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    terminal.connect(monkeypatch)
    bar = ProgressBar()
    bar.show("epoch 1/2", 1, 3, (), at_once=True)
    assert terminal.take()
    bar.close()
    terminal.take()
    bar.show("epoch 1/2", 2, 3, (), at_once=True)
    bar.close()
    assert terminal.take() == []


def test_a_bar_that_left_the_terminal_draws_and_erases_nothing_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    bar = ProgressBar(stream)
    bar.show("epoch 1/3", 1, 4, PARTS, at_once=True)
    before = stream.getvalue()
    assert "epoch 1/3 [" in before
    progress_bar.leave_terminal()
    log_line = io.StringIO()
    progress_bar.write_above_bar("a line", log_line)
    with bar.part("checkpoint", 0):
        bar.show("epoch 1/3", 2, 4, PARTS, at_once=True)
    bar.close()
    assert stream.getvalue() == before + "\n"
    assert log_line.getvalue() == "a line\n"
