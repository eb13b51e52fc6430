"""Divides the time of a step into phases: data, copy, forward, backward, communication, optimizer, other.

Nothing here waits for a device. On a CPU a phase ends when its work ends. On an accelerator its ends are events on the
stream, read after the device has passed them, so time of the host is not counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

DATA, COPY, FORWARD, BACKWARD = "data", "copy", "forward", "backward"
COMMUNICATION, OPTIMIZER, OTHER = "communication", "optimizer", "other"
PHASES = (DATA, COPY, FORWARD, BACKWARD, COMMUNICATION, OPTIMIZER, OTHER)


class StepTimes(NamedTuple):
    """Seconds of one optimizer step of a rank, from the end of the step before."""

    step: int  # 1-based
    seconds: dict[str, float]  # by phase; they sum up to the step

    @property
    def whole_s(self) -> float:
        return sum(self.seconds.values())


class Clock(Protocol):
    """Takes time stamps, and measures between two of them."""

    def now(self) -> Any:
        """Return a stamp; None if this moment has none."""

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two stamps that have passed."""

    def has_passed(self, stamp: Any) -> bool:
        """Whether `between` needs no wait for this stamp."""

    def wait(self, stamp: Any) -> None:
        """Wait until the stamp has passed."""


class HostClock:
    """The host's clock, for computing on the CPU."""

    def now(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        return second - first

    def has_passed(self, stamp: float) -> bool:
        return True

    def wait(self, stamp: float) -> None: ...


class DeviceClock:
    """Events on the computing stream. Work on other streams gets no stamps.

    Args:
        accelerator: as DeepSpeed's `get_accelerator` returns it.
    """

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


class NoStepTimer:
    """Measures nothing."""

    inside = False

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Wrap a part of a step."""
        return nullcontext()

    def steps(self, steps: Iterator[T], start: int) -> Iterator[T]:
        """Return `steps` unchanged."""
        return steps


class StepTimer:
    """Divides the time of steps among phases. A nested phase is subtracted from the one around it.

    Args:
        every: measure every n-th step.
    """

    def __init__(self, clock: Clock, every: int = 1) -> None:
        self._clock, self._every = clock, every
        self._marks: list[tuple[str, Any]] = []  # (phase, stamp of its begin)
        self._open = [OTHER]  # phases under way, innermost last
        self._waiting: list[
            tuple[int, list[tuple[str, Any]]]
        ] = []  # steps that the device has not finished, perhaps
        self._done: list[StepTimes] = []
        self._measures = False
        self._step, self.inside = 0, False  # the step, and whether it is under way

    def steps(self, steps: Iterator[T], start: int) -> Iterator[T]:
        """Yield from `steps`. A step ends when the next one is requested.

        Args:
            start: steps done before.
        """
        step, steps = start, iter(steps)
        self._measures = False
        self._begin(step + 1)
        while True:
            with self.phase(DATA):
                batches = next(steps, None)
            if batches is None:
                return
            step += 1
            self._step, self.inside = step, True
            yield batches
            self._end()
            self._begin(step + 1)

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
        """Return the steps measured since the last call, after waiting for the device to finish them.

        The last step of a run, after which no other is requested, ends here.
        """
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


def clock_of_device() -> Clock:
    """Return the clock of this rank's device."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return HostClock() if accelerator.device_name() == "cpu" else DeviceClock(accelerator)
