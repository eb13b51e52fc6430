"""Stops all ranks at the same step on SIGTERM, on SIGHUP, or when their deepspeed launcher has gone."""

import contextlib
import os
import re
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as torch_dist

from dsyolo.cluster.heartbeat import log_last_error
from dsyolo.cluster.world import World

STATUS = 75  # exit status of a run that can be resumed: EX_TEMPFAIL of sysexits.h
POLL_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # a scheduler's; a terminal's or an ssh session's that ends
END = 0  # ends the listening thread; no signal has this number
# The program that starts `deepspeed.launcher.launch` on one machine: a script, or a module after python -m.
_RUNNER = re.compile(r"deepspeed(\.pt)?|ds|deepspeed\.launcher\.runner")


class Preempted(Exception):
    """A rank was asked to stop. Raised on all ranks at the same step."""


class PreemptionHandler:
    """Handles SIGTERM, which schedulers send before they take a machine away, and SIGHUP of a terminal that ends.

    The signal reaches ranks at different moments, or only one of them. So after every step they exchange on the host
    whether they got it, and read the answer after the next step: nobody waits.
    """

    def __init__(self, world: World) -> None:
        self._is_signalled, self._launcher = False, _Launcher()
        self._group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        for number in _handled_signals():
            signal.signal(number, self._handle)

    def _handle(self, *_: Any) -> None:
        self._is_signalled = True

    def is_requested(self) -> bool:
        """Return whether this rank was asked to stop; the others may not know yet."""
        return self._is_signalled or self._launcher.has_gone()

    def raise_if_requested(self, *, wait: bool = False) -> None:
        """Raise Preempted on all ranks if one was asked to stop. All of them must call it after every step.

        With `wait`, wait for the answer of this step too.
        """
        is_requested = self._take_answer() if self._group else self.is_requested()
        if self._group:
            request = torch.tensor([self.is_requested()], dtype=torch.uint8)
            work = torch_dist.all_reduce(request, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = work, request
            is_requested = (wait and self._take_answer()) or is_requested
        if is_requested:
            raise Preempted

    def close(self) -> None:
        """Wait for the exchange under way."""
        self._take_answer()

    def _take_answer(self) -> bool:
        """Wait for the exchange under way; return whether a rank was asked to stop."""
        if self._pending is None:
            return False
        work, request = self._pending
        work.wait()
        self._pending = None
        return bool(request)


@contextlib.contextmanager
def ends_at_once(world: World) -> Iterator[None]:
    """Inside, a rank that is asked to stop ends at once. Create the `PreemptionHandler` inside.

    A thread listens, since the main thread may wait for other ranks in C++, where Python handles no signals.
    """
    launcher = _Launcher()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        received = b""
        while END not in received:
            ready, *_ = select.select([reader], [], [], POLL_S)
            received = os.read(reader, 64) if ready else b""
            if any(number in received for number in SIGNALS) or launcher.has_gone():
                leave_at_once(world)

    thread = threading.Thread(target=listen, daemon=True)
    for number in _handled_signals():
        signal.signal(number, lambda *_: None)  # else the kernel ends this process with another exit status
    before = signal.set_wakeup_fd(writer)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, bytes([END]))
        thread.join()
        os.close(reader)
        os.close(writer)


def _handled_signals() -> list[signal.Signals]:
    """Return the signals to handle: not one that nohup makes this process ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_at_once(world: World) -> NoReturn:
    """End this process without waiting for reading threads, which a slow disk may hold for minutes."""
    if world.is_main_process:
        log_last_error(
            "Preempted before the first step: nothing to save. Run the same command again with --resume auto."
        )
    os._exit(STATUS)


class _Launcher:
    """The deepspeed launcher on this machine, if it started this rank.

    `deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. SIGTERM ends the first alone, and SIGKILL
    either: then nobody could stop the ranks.
    """

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}  # by process id
        launch = os.getppid()
        if "deepspeed.launcher.launch" in _command_line(launch):
            self._parents[os.getpid()] = launch
            runner = _parent(launch)
            if any(_RUNNER.fullmatch(Path(word).name) for word in _command_line(runner)[:3]):
                self._parents[launch] = runner

    def has_gone(self) -> bool:
        return any(_parent(child) != parent for child, parent in self._parents.items())


def _command_line(pid: int) -> list[str]:
    """Return a process's arguments; none if it has gone, or without /proc."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    """Return the id of a process's parent; 0 if it has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()[1])
    except OSError:
        return 0
