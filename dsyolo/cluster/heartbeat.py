"""Heartbeats of all ranks in a store, by which `rendezvous` and `watchdog` see a rank that is lost.

A rank whose beat stops changing is dead, stopped, or behind a network that is down. Rank 0 judges, and writes one verdict
that all ranks read.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.distributed as torch_dist

STATUS = 70  # exit status of all ranks when one is lost: EX_SOFTWARE of sysexits.h
LOGGING_S = 5.0  # most seconds for the last message of a process
log = logging.getLogger(__name__)


class RankInfo(NamedTuple):
    """Where a rank runs."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def own_info(rank: int) -> RankInfo:
    """Return where this process, rank `rank`, runs."""
    return RankInfo(rank, socket.gethostname(), os.getpid())


def log_last_error(text: str) -> None:
    """Log the reason why this process ends, waiting some seconds only for a disk or a pipe that does not answer."""
    thread = threading.Thread(target=log.error, args=("%s", text), daemon=True)
    try:
        thread.start()
        thread.join(LOGGING_S)
    except RuntimeError:  # no memory is left for a thread
        log.error("%s", text)


class Beat(NamedTuple):
    """The last heartbeat of a rank."""

    info: RankInfo
    silent_s: float  # since this rank has seen it change
    status: dict[str, Any]  # what the rank was doing; empty if it gave none
    has_left: bool


class Heartbeat:
    """This rank's beat, and its view of the others', under keys that begin with `name`.

    Where the store does not answer, torch's RuntimeError is raised.
    """

    def __init__(self, store: torch_dist.Store, name: str, rank: int, size: int) -> None:
        self._store, self._own = store, own_info(rank)
        self._keys = [f"{name}/{rank}" for rank in range(size)]
        self._verdict = f"{name}/verdict"
        self._count = 0
        self._changed: dict[int, tuple[int, float]] = {}  # by rank: the beat's count, and when it was new

    def beat(self, *, has_left: bool = False, **status: Any) -> None:
        """Show that this rank lives and what it is doing, or that it has left in order: then its silence is no loss."""
        self._count += 1
        beat = {"info": self._own, "count": self._count, "status": status, "has_left": has_left}
        self._store.set(self._keys[self._own.rank], json.dumps(beat))

    def read(self, ranks: Iterable[int] | None = None) -> dict[int, Beat]:
        """Return the latest beat of each of `ranks` (default: all) that has sent one, by rank."""
        asked = list(range(len(self._keys)) if ranks is None else ranks)
        if not self._store.check([self._keys[rank] for rank in asked]):  # one request, where all are there
            asked = [rank for rank in asked if self._store.check([self._keys[rank]])]
        keys = [self._keys[rank] for rank in asked]
        now, beats = time.monotonic(), {}
        for rank, text in zip(asked, self._store.multi_get(keys) if keys else [], strict=True):
            beat = json.loads(text)
            if self._changed.get(rank, (None,))[0] != beat["count"]:
                self._changed[rank] = beat["count"], now
            silent_s = now - self._changed[rank][1]
            beats[rank] = Beat(RankInfo(*beat["info"]), silent_s, beat["status"], beat["has_left"])
        return beats

    def give_verdict(self, verdict: dict[str, Any]) -> None:
        """End all ranks: each reads this by `verdict`."""
        self._store.set(self._verdict, json.dumps(verdict))

    def verdict(self) -> dict[str, Any] | None:
        """Return the verdict; None while all is well."""
        return json.loads(self._store.get(self._verdict)) if self._store.check([self._verdict]) else None
