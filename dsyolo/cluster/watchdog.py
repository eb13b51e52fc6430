"""Notices a rank that has died, was stopped, or hangs, and ends all ranks with one message that names it.

Without it the others wait in a collective: ten minutes under gloo and NCCL, or for ever. Every rank beats once a
second into a store that the first rank keeps, with what its main thread is doing; the first rank reads all beats and
gives the verdict. Whoever cannot reach the store takes the first rank for lost.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as torch_dist

from dsyolo.base.environment import read_environment
from dsyolo.cluster.collectives import all_gather_objects
from dsyolo.cluster.restart import start_again
from dsyolo.cluster.world import World

BEAT_S = 1.0
LOST_S = 20.0  # without a beat: dead, stopped, or behind a network that is down
STATUS = 70  # of all ranks then: EX_SOFTWARE of sysexits.h
STACK_FRAMES = 6  # of the main thread, innermost, in a beat
STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk or network", "Z": "dead"}
NO_BEAT = {"count": 0, "progress": 0, "where": "starting", "stack": ""}  # of a rank that has not told one yet
TELLS_OF_FIRST = 1  # the rank that says so when the first one is lost
T = TypeVar("T")


class RankInfo(NamedTuple):
    """Where a rank runs."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watchdog:
    """Watches all ranks from construction to `close`.

    Args:
        late_s: so long may all ranks make no progress together: then the one that is furthest behind is named.
        end: called with the exit status when a rank is lost; it does not return.
    """

    def __init__(self, world: World, *, late_s: float, end: Callable[[int], Any] = os._exit) -> None:
        self._world, self._late_s, self._end = world, late_s, end
        self._seat = RankInfo(world.rank, socket.gethostname(), os.getpid())
        self._main = threading.get_ident()
        self._where, self._progress, self._count = "starting", 0, 0
        self._closed = threading.Event()
        self._ended = threading.Lock()
        self._answered = time.monotonic()
        self._seats = [self._seat]
        # The first rank's last beat, where this one would have to tell of it.
        self._first: dict[str, Any] = NO_BEAT
        if world.size == 1:
            return
        address = str(read_environment().master_addr)
        keeper = (
            torch_dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
            if world.is_main_process
            else None
        )
        told = all_gather_objects((self._seat, keeper.port if keeper else None))
        self._seats = [seat for seat, _ in told]
        timeout = timedelta(seconds=LOST_S)
        self._keeper = keeper  # lives as long as this
        self._store = torch_dist.TCPStore(address, told[0][1], is_master=False, timeout=timeout)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def at(self, where: str) -> None:
        """The main thread is there now, and so makes progress."""
        self._where = where
        self._progress += 1

    @property
    def where(self) -> str:
        """As `at` was told last."""
        return self._where

    def calls(self, work: Callable[..., T], where: str) -> Callable[..., T]:
        """`work`, telling at each call where it is."""

        def told(*args: Any) -> T:
            self.at(where)
            return work(*args)

        return told

    def wait_for_verdict(self) -> None:
        """After an error in a collective: gives the watch the time to find the rank that caused it, which ends this one."""
        if self._world.size > 1:
            self._closed.wait(LOST_S + 5 * BEAT_S)

    def close(self) -> None:
        """No rank is watched any more. Call it on all ranks before the first one leaves."""
        self._closed.set()
        if self._world.size > 1:
            for thread in self._threads:
                thread.join(2 * BEAT_S)

    def _beat(self) -> None:
        """Says that this rank lives; on the first one, judges all."""
        changed: dict[int, tuple[int, float]] = {}
        still: tuple[list[int], float] = ([], time.monotonic())
        keys = [f"beat/{rank}" for rank in range(self._world.size)]
        while not self._closed.wait(BEAT_S):
            try:
                self._count += 1
                self._store.set(keys[self._world.rank], json.dumps(self._told()))
                if self._store.check(["verdict"]):
                    self._finish(json.loads(self._store.get("verdict")))
                elif self._world.is_main_process:
                    beats = self._beats(keys)
                    now = time.monotonic()
                    for rank, beat in enumerate(beats):
                        if changed.get(rank, (-1,))[0] != beat["count"]:
                            changed[rank] = beat["count"], now
                    progress = [beat["progress"] for beat in beats]
                    if progress != still[0]:
                        still = progress, now
                    self._judge(beats, {rank: now - at for rank, (_, at) in changed.items()}, now - still[1])
                elif self._world.rank == TELLS_OF_FIRST:
                    self._first = self._beats(keys[:1])[0]
                self._answered = time.monotonic()
            except (RuntimeError, OSError):
                return  # `_watch` sees that nothing answers any more

    def _beats(self, keys: list[str]) -> list[dict[str, Any]]:
        """The last one of each rank; one that was lost before its first must be missed too."""
        here = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        told = dict(zip(here, map(json.loads, self._store.multi_get(here)), strict=True))
        return [told.get(key, NO_BEAT) for key in keys]

    def _watch(self) -> None:
        """Whether the first rank answers; and, beside it, whether the other processes of this machine live."""
        while not self._closed.wait(BEAT_S):
            silent_s = time.monotonic() - self._answered
            gone = not self._world.is_main_process and self._state(self._seats[0]) in ("gone", "dead")
            if silent_s > LOST_S or gone:
                self._finish({"rank": 0, "text": self._lost_text(0, silent_s, _at(self._first))})

    def _told(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main)
        stack = traceback.format_stack(frame)[-STACK_FRAMES:] if frame else []
        return {
            "count": self._count,
            "progress": self._progress,
            "where": self._where,
            "stack": "".join(stack),
        }

    def _judge(self, beats: list[dict[str, Any]], silent_s: dict[int, float], still_s: float) -> None:
        for rank, seconds in silent_s.items():
            if seconds > LOST_S or self._state(self._seats[rank]) in ("gone", "dead"):
                self._tell(rank, self._lost_text(rank, seconds, _at(beats[rank])))
        if still_s > self._late_s and any(beat["progress"] for beat in beats):  # a first scan may take hours
            rank = min(range(len(beats)), key=lambda rank: beats[rank]["progress"])
            text = f"{self._seats[rank]} is late: no rank has made progress for {still_s:.0f} s. {_at(beats[rank])}"
            self._tell(rank, text)

    def _tell(self, rank: int, text: str) -> None:
        verdict = {"rank": rank, "text": text}
        self._store.set("verdict", json.dumps(verdict))
        self._finish(verdict)

    def end_all(self, text: str, again: Sequence[str] = ()) -> NoReturn:
        """Ends all ranks with this rank's message; with `again` they start again, with these words behind their own.

        It may be called where other ranks wait in a collective, by the main thread of one rank.
        """
        verdict = {"rank": self._world.rank, "text": f"{self._seat} {text}", "again": again}
        if self._world.size == 1:
            self._finish(verdict)
        self._store.set("verdict", json.dumps(verdict))
        while True:  # the thread that beats ends this process
            time.sleep(BEAT_S)

    def _lost_text(self, rank: int, silent_s: float, at: str) -> str:
        state = self._state(self._seats[rank])
        what = f"its process is {state}" if state else f"it has not answered for {silent_s:.0f} s"
        return f"{self._seats[rank]} is lost: {what}. {at}"

    def _state(self, seat: RankInfo) -> str:
        """Of a process on this machine: gone, dead, stopped ...; empty: it runs, or is elsewhere."""
        if seat.host != self._seat.host or not os.path.isdir("/proc/self"):
            return ""
        try:
            with open(f"/proc/{seat.pid}/stat", "rb") as file:
                letter = file.read().rsplit(b") ", 1)[1][:1].decode()
        except OSError:
            return "gone"
        return STATES.get(letter, "")

    def _finish(self, verdict: dict[str, Any]) -> None:
        """Prints, on one rank, and ends this process."""
        if self._closed.is_set() or not self._ended.acquire(blocking=False):
            return
        lost, again = verdict["rank"], verdict.get("again")
        if self._world.rank == (0 if lost or self._world.size == 1 else TELLS_OF_FIRST):
            remedy = (
                "All ranks start again."
                if again
                else "All ranks end. --resume auto goes on from the last checkpoint."
            )
            print(f"\n{verdict['text'].rstrip()}\n{remedy}\n", file=sys.stderr, flush=True)
        if self._world.size > 1 and self._world.is_main_process:
            time.sleep(2 * BEAT_S)  # for the others to read it before the store goes
        if again:
            self._wait_for_the_first()
            start_again(again)
        seat = self._seats[lost]
        if seat.host == self._seat.host and lost != self._world.rank and self._state(seat) == "stopped":
            os.kill(seat.pid, signal.SIGKILL)  # a stopped process hears nothing else
        self._end(STATUS)

    def _wait_for_the_first(self) -> None:
        """Until its store has gone: whoever starts again before it would meet the old one."""
        end = time.monotonic() + LOST_S
        while not self._world.is_main_process and time.monotonic() < end:
            try:
                self._store.check(["verdict"])
            except (RuntimeError, OSError):
                return
            time.sleep(0.2)


def _at(beat: dict[str, Any]) -> str:
    return f"Its last place: {beat['where']}.\n{beat['stack']}"
