"""Stops all ranks at the same step on SIGTERM, SIGHUP or Ctrl-C, or when their deepspeed launcher has gone."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as torch_dist

from dsyolo.base.launcher import INTERRUPTED, Launcher
from dsyolo.base.resume_words import same_command
from dsyolo.cluster.heartbeat import log_last_error
from dsyolo.cluster.still_saving import announce
from dsyolo.cluster.world import World

STATUS = 75  # exit status of a run that can be resumed: EX_TEMPFAIL of sysexits.h
POLL_S = 1.0
AGAIN_S = 0.5  # a second Ctrl-C within is the first one, which a program between has passed on as well
# A scheduler's; a terminal's or an ssh session's that ends; Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
END = 0  # ends the listening thread; no signal has this number
LAUNCHER_KILLS = "SIGTERM: the run saves, and ends. If the deepspeed launcher sent it, it kills what still saves after 30 s."
log = logging.getLogger(__name__)


class Preempted(Exception):
    """A rank was asked to stop. Raised on all ranks at the same step.

    Attributes:
        status: the exit status of all ranks, `STATUS`, or `INTERRUPTED` where one of them got Ctrl-C.
    """

    def __init__(self, status: int = STATUS) -> None:
        super().__init__(status)
        self.status = status


class PreemptionHandler:
    """Handles SIGTERM, which schedulers send before they take a machine away, SIGHUP of a terminal that ends, and Ctrl-C.

    A second Ctrl-C ends this process at once. The signal reaches ranks at different moments, or only one of them. So
    after every step they exchange on the host whether they got it, and read the answer after the next step: nobody
    waits.

    Args:
        on_interrupt: called at Ctrl-C, before this rank ends the launcher and a shell has the terminal again. Must
            be quick: the launcher kills ranks meanwhile.
    """

    def __init__(self, world: World, on_interrupt: Callable[[], None] = lambda: None) -> None:
        self._on_interrupt = on_interrupt
        self._world, self._launcher = world, Launcher()
        self._request, self._interrupted_at = 0, 0.0  # an exit status; seconds
        if world.is_main_process and (fault := self._launcher.container_fault()):
            log.warning("%s", fault)
        self._group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        for number in _handled_signals():
            signal.signal(number, self._handle)
        if signal.SIGINT in _handled_signals():
            self._listen()

    def _handle(self, number: int, _frame: Any) -> None:
        self._request = max(self._request, _status_of(number))

    def _listen(self) -> None:
        """Notice Ctrl-C at once, in a thread: the main one may be in a long call of C++."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def listen() -> None:
            has_logged = False
            while received := os.read(reader, 64):
                if signal.SIGINT in received:
                    self._interrupt()
                elif signal.SIGTERM in received and self._launcher.launch and not has_logged:
                    has_logged = True
                    if self._world.is_main_process:
                        log.warning("%s", LAUNCHER_KILLS)

        threading.Thread(target=listen, daemon=True).start()

    def _interrupt(self) -> None:
        now, before = time.monotonic(), self._interrupted_at
        if before and now - before < AGAIN_S:
            return
        self._interrupted_at = now
        self._on_interrupt()
        outlives_launcher = self._launcher.end()
        if outlives_launcher:
            announce()
        self._request = INTERRUPTED
        if before:
            leave_at_once(self._world, INTERRUPTED, "Interrupted again: this rank ends without saving.")
        if self._world.is_main_process:
            log.warning("%s", _while_saving(in_background=outlives_launcher))

    def is_requested(self) -> bool:
        """Return whether this rank was asked to stop; the others may not know yet."""
        return bool(self.requested_status())

    def requested_status(self) -> int:
        """Return the exit status that this rank was asked to stop with; 0 if it was not."""
        return self._request or (STATUS if self._launcher.has_gone() else 0)

    def raise_if_requested(self, *, wait: bool = False) -> None:
        """Raise Preempted on all ranks if one was asked to stop. All of them must call it after every step.

        With `wait`, wait for the answer of this step too.
        """
        status = self._take_answer() if self._group else self.requested_status()
        if self._group:
            request = torch.tensor(
                [self.requested_status()], dtype=torch.uint8
            )  # Ctrl-C has the larger status
            work = torch_dist.all_reduce(request, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = work, request
            status = (self._take_answer() if wait else 0) or status
        if status:
            if self._launcher.has_gone():
                announce()
            raise Preempted(status)

    def close(self) -> None:
        """Wait for the exchange under way."""
        self._take_answer()

    def _take_answer(self) -> int:
        """Wait for the exchange under way; return the exit status if a rank was asked to stop, else 0."""
        if self._pending is None:
            return 0
        work, request = self._pending
        work.wait()
        self._pending = None
        return int(request)


@contextlib.contextmanager
def ends_at_once(world: World) -> Iterator[None]:
    """Inside, a rank that is asked to stop ends at once. Create the `PreemptionHandler` inside.

    A thread listens, since the main thread may wait for other ranks in C++, where Python handles no signals.
    """
    launcher = Launcher()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        received = b""
        while END not in received:
            ready, *_ = select.select([reader], [], [], POLL_S)
            received = os.read(reader, 64) if ready else b""
            if signal.SIGINT in received:
                launcher.end()
                leave_at_once(world, INTERRUPTED)
            if any(number in received for number in SIGNALS) or launcher.has_gone():
                leave_at_once(world)

    thread = threading.Thread(target=listen, daemon=True)
    # Else the kernel ends this process with another exit status.
    handlers = {number: signal.signal(number, _leave_it_to_the_thread) for number in _handled_signals()}
    before = signal.set_wakeup_fd(writer)
    thread.start()
    try:
        yield
    finally:
        now = signal.set_wakeup_fd(before)
        if now not in (writer, -1):  # that of the PreemptionHandler, which listens from now on
            signal.set_wakeup_fd(now, warn_on_full_buffer=False)
        for number, handler in handlers.items():
            if signal.getsignal(number) is _leave_it_to_the_thread:  # no PreemptionHandler came
                signal.signal(number, handler)
        os.write(writer, bytes([END]))
        thread.join()
        os.close(reader)
        os.close(writer)


def _leave_it_to_the_thread(*_: Any) -> None:
    pass


def _while_saving(*, in_background: bool) -> str:
    """Return what follows on Ctrl-C. In the background: the launcher has ended, and the user's prompt is back."""
    if not in_background:
        return "Interrupted: the run saves, and ends. Ctrl-C again ends it at once."
    rule = (
        "Interrupted: the run saves in the background, after the prompt is back. Wait for 'saved after step'"
    )
    return f"{rule}; `kill -INT -{os.getpgrp()}` ends it at once."


def _handled_signals() -> list[signal.Signals]:
    """Return the signals to handle: not one that nohup makes this process ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_at_once(world: World, status: int = STATUS, text: str = "") -> NoReturn:
    """End this process without waiting for reading threads, which a slow disk may hold for minutes.

    Args:
        text: the reason; empty before the first step.
    """
    if world.is_main_process:
        word = "Interrupted" if status == INTERRUPTED else "Preempted"
        log_last_error(text or f"{word} before the first step: nothing to save. Run {same_command()}.")
    os._exit(status)


def _status_of(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else STATUS
