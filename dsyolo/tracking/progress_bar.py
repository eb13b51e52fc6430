"""The progress bar at the bottom of a terminal: training, validation and checkpoints, in one line that fits its width.

Nothing of it is written where standard error is not a terminal, or one that cannot rewrite a line (TERM=dumb).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

from dsyolo.base.environment import terminal_type

MIN_BAR, MAX_BAR = 6, 30  # characters between the brackets
REDRAW_S = 0.1  # redrawing costs some tenths of a millisecond
RECENT = 0.05  # weight of the last step in the mean time of a step
UNKNOWN_WIDTH = 80  # where the terminal does not give its own
CLEAR = "\r\x1b[K"  # to the start of the line, and erase it
_shown: "list[ProgressBar]" = []  # the bar that is on the terminal, if there is one


class Eta:
    """Estimates the time that is left, from recent steps and from what came between epochs so far."""

    def __init__(self) -> None:
        self.step_s: float | None = None
        self._num_steps = 0
        self._between_s, self._num_between = 0.0, 0

    def step(self, seconds: float) -> None:
        """Take the time of a step. The first one is much slower than the others: the second takes its place."""
        self._num_steps += 1
        weight = max(RECENT, 1 / max(self._num_steps - 1, 1))
        self.step_s = seconds if self.step_s is None else self.step_s + weight * (seconds - self.step_s)

    def between(self, seconds: float) -> None:
        """Take the time from an epoch's last step to the next one's first: validation and checkpoints."""
        self._between_s += seconds
        self._num_between += 1

    def left_s(self, num_steps: int, num_epochs: int = 0) -> float | None:
        """Return the seconds for so many steps and ends of epochs; None before the first step."""
        if self.step_s is None:
            return None
        return num_steps * self.step_s + num_epochs * self._between_s / max(self._num_between, 1)


class ProgressBar:
    """One line that is rewritten; log lines appear above it.

    Args:
        stream: standard error by default.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        stream = stream or sys.stderr
        self.is_on = stream is not None and stream.isatty() and terminal_type() != "dumb"
        self._clock = clock
        self._stream = stream
        if self.is_on:
            _shown[:] = [self]
        self._title = ""
        self._done = self._total = 0
        self._parts: Sequence[str] = ()
        self._drawn = self._since = 0.0

    def show(self, title: str, done: int, total: int, parts: Sequence[str], *, at_once: bool = False) -> None:
        """Show `done` of `total`, and as many of `parts` as fit; at most every tenth of a second unless `at_once`."""
        self._title, self._done, self._total, self._parts = title, done, total, parts
        self._draw(at_once)

    @contextmanager
    def part(self, title: str, total: int) -> Iterator[None]:
        """Show a part beside training with a bar of its own, moved by `advance`; a `total` of 0 has a title only."""
        before = self._title, self._done, self._total, self._parts
        self._since = self._clock()
        self.show(title, 0, total, (), at_once=True)
        try:
            yield
        finally:
            self.show(*before, at_once=True)

    def advance(self) -> None:
        """Count one more batch of a part, which begins now."""
        seconds = self._clock() - self._since
        if self._done:
            left_s = seconds / self._done * (self._total - self._done)
            self._parts = (f"ETA {duration(left_s)}",)
        self._draw(at_once=False)
        self._done = min(self._done + 1, self._total)

    def close(self) -> None:
        """Remove the line. Further calls do nothing."""
        if self in _shown:
            with tqdm.get_lock():
                self.write(CLEAR)
                _shown.clear()

    def line(self) -> str:
        """Return what rewrites the line, for the terminal's present width."""
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or UNKNOWN_WIDTH
        except (OSError, ValueError):
            width = UNKNOWN_WIDTH
        return CLEAR + compose(width, self._title, self._done, self._total, self._parts)

    def write(self, text: str) -> None:
        """Write to the terminal, which may be gone."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()

    def _draw(self, at_once: bool) -> None:
        now = self._clock()
        if self in _shown and (at_once or now - self._drawn >= REDRAW_S):
            self._drawn = now
            with tqdm.get_lock():
                self.write(self.line())


def leave_terminal() -> None:
    """Draw no bar any more, whoever made it, and end its line. Nothing is erased: a shell's prompt may be there already."""
    bars = list(_shown)
    _shown.clear()  # without the lock, which another thread may hold for long
    for bar in bars:
        bar.write("\n")


def write_above_bar(text: str, stream: TextIO) -> None:
    """Write a line to standard output or error; a bar on the terminal stays below it."""
    with tqdm.get_lock():
        for bar in _shown:
            bar.write(CLEAR)
        try:
            tqdm.write(text, file=stream)  # above the bar of an index that is built, too
            stream.flush()  # a log is read while the run goes on
        finally:
            for bar in _shown:
                bar.write(bar.line())


def compose(width: int, title: str, done: int, total: int, parts: Sequence[str]) -> str:
    """Return a line for a terminal of `width` columns: title, bar, share, counts, and the first parts that fit.

    It is in ASCII, and a column shorter than the terminal: some wrap a line that fills them.
    """
    room = width - 1
    text = f" {100 * done // total:3} % {done}/{total}" if total else ""
    bar_room = MIN_BAR + 3 if total else 0
    for part in parts:
        if len(title) + bar_room + len(text) + 2 + len(part) > room:
            break
        text += f"  {part}"
    size = min(room - len(title) - len(text) - 3, MAX_BAR)
    if total and size >= MIN_BAR:
        filled = size * done // total
        title += f" [{'#' * filled}{'.' * (size - filled)}]"
    return (title + text)[:room]


def duration(seconds: float) -> str:
    """Return a time like 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
