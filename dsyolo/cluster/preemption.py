"""Stops a run when it is asked to, by SIGTERM, by SIGHUP or by the end of its deepspeed launcher: all ranks at the same place."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as torch_dist

from dsyolo.cluster.world import World

STATUS = 75  # of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h
LOOK_S = 1.0
STOPS = (signal.SIGTERM, signal.SIGHUP)  # of a scheduler; of a terminal or an ssh session that ends
OVER = 0  # no signal has this number
# What started the program that starts the ranks, on one machine: a script, or a module behind python's -m.
_RUNNER = re.compile(r"deepspeed(\.pt)?|ds|deepspeed\.launcher\.runner")


class Preempted(Exception):
    """The run ends here, since a rank was asked to stop. Raised on all ranks at the same place."""


class PreemptionHandler:
    """Hears SIGTERM, as schedulers send it before they take a machine away, and SIGHUP, as a terminal that ends does.

    Ranks hear it at different moments, or only one of them does. So they exchange whether they did, on the host: after
    every step without waiting, as a step reads the answer of the one before it.
    """

    def __init__(self, world: World) -> None:
        self._heard, self._launcher = False, _Launcher()
        self._group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        for number in _heeded():
            signal.signal(number, self._hear)

    def _hear(self, *_: Any) -> None:
        self._heard = True

    def asked(self) -> bool:
        """Whether this rank was asked; the others may not know of it."""
        return self._heard or self._launcher.has_gone()

    def agreed(self, *, wait: bool = False) -> bool:
        """Whether to stop here. All ranks must call it after every step, and get the same answer.

        Args:
            wait: for what the others answer now.
        """
        if self._group is None:
            return self.asked()
        before = self._take()
        asked = torch.tensor([self.asked()], dtype=torch.uint8)
        work = torch_dist.all_reduce(asked, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, asked
        return (self._take() or before) if wait else before

    def raise_if_requested(self, *, wait: bool = False) -> None:
        """As `agreed`, but stops by raising Preempted."""
        if self.agreed(wait=wait):
            raise Preempted

    def close(self) -> None:
        """Waits for what is on its way."""
        self._take()

    def _take(self) -> bool:
        if self._pending is None:
            return False
        work, asked = self._pending
        work.wait()
        self._pending = None
        return bool(asked)


@contextlib.contextmanager
def ends_at_once(world: World) -> Iterator[None]:
    """Inside, a rank that is asked to stop ends: there is nothing to save yet. Make the `PreemptionHandler` inside too.

    A thread hears, since the main one may wait for other ranks in C++, where Python takes no signals.
    """
    launcher = _Launcher()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        said = b""
        while OVER not in said:
            is_said, *_ = select.select([reader], [], [], LOOK_S)
            said = os.read(reader, 64) if is_said else b""
            if any(number in said for number in STOPS) or launcher.has_gone():
                leave_at_once(world)

    thread = threading.Thread(target=listen, daemon=True)
    for number in _heeded():
        signal.signal(number, lambda *_: None)  # else the kernel ends this process, with a status of its own
    before = signal.set_wakeup_fd(writer)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, bytes([OVER]))
        thread.join()
        os.close(reader)
        os.close(writer)


def _heeded() -> list[signal.Signals]:
    """The signals that ask to stop, but for one that nohup has this process ignore."""
    return [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]


def leave_at_once(world: World) -> NoReturn:
    """Ends this process: without the wait for threads that read, since a slow disk may hold them for minutes."""
    if world.is_main_process:
        print("\nStopped as asked before the first step. --resume auto goes on.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)


class _Launcher:
    """The deepspeed launcher on this machine, where it started this rank.

    `deepspeed` starts `deepspeed.launcher.launch`, and this one the ranks. SIGTERM ends the first without a word to the
    others, and SIGKILL each of them: then nobody is left who waits for the ranks, or could stop them.
    """

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}  # by the id of a process
        launch = os.getppid()
        if "deepspeed.launcher.launch" in _words(launch):
            self._parents[os.getpid()] = launch
            runner = _parent(launch)
            if any(_RUNNER.fullmatch(Path(word).name) for word in _words(runner)[:3]):
                self._parents[launch] = runner

    def has_gone(self) -> bool:
        return any(_parent(child) != parent for child, parent in self._parents.items())


def _words(pid: int) -> list[str]:
    """Its command line; nothing of a process that has gone, and where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    """0 of a process that has gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(") ")[2].split()[1])
    except OSError:
        return 0
