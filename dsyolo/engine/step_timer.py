"""Divides the time of a step into phases: data, copy, forward, backward, communication, optimizer, other.

Nothing here waits for a device: on an accelerator a phase's ends are events on the stream, read after it has passed them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any, NamedTuple, TypeVar

from dsyolo.engine.device import accelerator, pins_memory

T = TypeVar("T")
Marks = list[tuple[str, Any]]  # (phase, stamp of its begin)

DATA, COPY, FORWARD, BACKWARD = "data", "copy", "forward", "backward"
COMMUNICATION, OPTIMIZER, OTHER = "communication", "optimizer", "other"
PHASES = (DATA, COPY, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER, OTHER)


class StepTimes(NamedTuple):
    """Seconds of one optimizer step of a rank, from the end of the step before."""

    step: int  # 1-based
    seconds: dict[str, float]  # by phase; they sum up to the step


class HostClock:
    """The host's clock, for computing on the CPU."""

    def now(self) -> Any:
        """Return a time stamp; None if this moment has none."""
        return time.perf_counter()

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two stamps that have passed."""
        return second - first

    def has_passed(self, stamp: Any) -> bool:
        """Return whether `between` needs no wait for this stamp."""
        return True

    def wait(self, stamp: Any) -> None:
        """Wait until the stamp has passed."""


class DeviceClock(HostClock):
    """Events on the computing stream of DeepSpeed's `accelerator`. Work on other streams gets no stamps."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._stream = accelerator.current_stream()

    def now(self) -> Any:
        if self._accelerator.current_stream() != self._stream:
            return None
        event = self._accelerator.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1000

    def has_passed(self, stamp: Any) -> bool:
        return stamp.query()

    def wait(self, stamp: Any) -> None:
        stamp.synchronize()


class StepTimer:
    """Divides the time of every n-th step among phases. A nested phase is subtracted from the one around it."""

    def __init__(self, clock: HostClock, every: int = 1) -> None:
        self._clock, self._every = clock, every
        self._marks: Marks = []
        self._open = [OTHER]  # phases under way, innermost last
        self._waiting: list[tuple[int, Marks]] = []  # steps that the device may not have finished
        self._done: list[StepTimes] = []
        self._measures = False
        self._step, self.inside = 0, False  # whether the step is under way

    def steps(self, steps: Iterator[T], start: int) -> Iterator[T]:
        """Yield from `steps`, of which `start` were done before. A step ends when the next one is requested."""
        steps, self._measures = iter(steps), False
        for step in count(start + 1):
            self._begin(step)
            with self.phase(DATA):
                batches = next(steps, None)
            if batches is None:
                return
            self._step, self.inside = step, True
            yield batches
            self._end()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Wrap a part of a step."""
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1])

    def take(self) -> list[StepTimes]:
        """Return the steps measured since the last call, after waiting for the device. The last step of a run ends here."""
        if self.inside:
            self._end()
        if self._waiting:
            self._clock.wait(self._waiting[-1][1][-1][1])
        self._read()
        taken, self._done = self._done, []
        return taken

    def _mark(self, name: str) -> None:
        if self._measures and (stamp := self._clock.now()) is not None:
            self._marks.append((name, stamp))

    def _begin(self, step: int) -> None:
        last = self._marks[-1:] if self._measures else []
        self._measures = step % self._every == 0
        self._marks = last if last and self._measures else []
        if not last:
            self._mark(OTHER)

    def _end(self) -> None:
        self.inside = False
        self._mark(OTHER)
        if self._measures:
            self._waiting.append((self._step, self._marks))
            self._read()

    def _read(self) -> None:
        while self._waiting and self._clock.has_passed(self._waiting[0][1][-1][1]):
            step, marks = self._waiting.pop(0)
            seconds = dict.fromkeys(PHASES, 0.0)
            for (name, first), (_, second) in pairwise(marks):
                seconds[name] += self._clock.between(first, second)
            self._done.append(StepTimes(step, seconds))


def clock_of_device() -> HostClock:
    """Return the clock of this rank's device."""
    return DeviceClock(accelerator()) if pins_memory() else HostClock()
