"""Rendezvous of all ranks before torch joins them: none waits for ever for a rank that died or never comes.

Torch's own rendezvous waits half an hour for either. On one machine a launcher ends all ranks when one fails; over several
hosts nobody does. So each rank beats into the store in which torch will join them, and rank 0 judges.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as torch_dist

from dsyolo.base.errors import UserError
from dsyolo.cluster.heartbeat import STATUS, Heartbeat

BEAT_S = 0.5
LOST_S = 15.0  # without a beat: dead, stopped, or behind a network that is down
NAME, ALL_HERE = "rendezvous", "rendezvous/all"


class Rendezvous:
    """Rendezvous of all ranks at rank 0's address, from construction to `close`.

    Args:
        rank, size: this rank, and the number of ranks.
        address, port: where torch will let the ranks join; it shares the store.
        wait_s: rendezvous timeout in seconds.
        end: called with the exit status if the rendezvous fails; it does not return.

    Raises:
        UserError: rank 0 cannot listen there.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        port: int,
        *,
        wait_s: float,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._rank, self._size, self._place = rank, size, f"{address}:{port}"
        self._wait_s, self._end = wait_s, end
        self._all_here, self._closed = threading.Event(), threading.Event()
        self._heartbeat: Heartbeat | None = None  # once this rank is connected
        options = {"world_size": size, "wait_for_workers": False, "multi_tenant": True}
        self._connect: Callable[[], torch_dist.TCPStore] = partial(self._connected, address, port, options)
        if rank == 0:
            store = _listen(address, port, options)
            self._connect = lambda: store
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self._all_here.wait()

    def close(self) -> None:
        """Leave, after torch has joined the ranks."""
        self._closed.set()
        self._thread.join()
        if self._rank and self._heartbeat:
            self._heartbeat.leave()

    def _connected(self, address: str, port: int, options: dict[str, Any]) -> torch_dist.TCPStore:
        """Connect to rank 0 once it listens. Torch's own client would print a stack at every try, and wait longer."""
        end = time.monotonic() + self._wait_s
        while True:
            try:
                socket.create_connection((address, port), LOST_S).close()
                timeout = timedelta(seconds=LOST_S)
                return torch_dist.TCPStore(address, port, is_master=False, timeout=timeout, **options)
            except (OSError, RuntimeError):
                if time.monotonic() > end:
                    text = f"Rank {self._rank} found no rank 0 at {self._place} within {self._wait_s:.0f} s."
                    self._finish(text, 1)
                time.sleep(BEAT_S)

    def _attend(self) -> None:
        store = self._connect()
        store.set_timeout(timedelta(seconds=LOST_S))
        self._heartbeat = Heartbeat(store, NAME, self._rank, self._size)
        began, turns = time.monotonic(), 0
        while not self._closed.is_set():
            try:
                self._heartbeat.beat()
                if verdict := self._heartbeat.verdict():
                    self._finish(verdict["text"], 0)
                if self._rank == 0:
                    self._judge(store, self._heartbeat, time.monotonic() - began)
                if store.check([ALL_HERE]):
                    self._all_here.set()
            except RuntimeError:
                if not self._closed.is_set():
                    self._finish(f"Rank 0 at {self._place} is lost: it was there, and stopped answering.", 1)
            turns += 1
            self._closed.wait(0.05 if turns < 10 else BEAT_S)

    def _judge(self, store: torch_dist.Store, heartbeat: Heartbeat, waited_s: float) -> None:
        """On rank 0: end all if a rank is lost, or has not come in time."""
        beats = heartbeat.read()
        for beat in beats.values():
            if beat.silent_s > LOST_S and not beat.has_left:
                self._end_all(
                    heartbeat,
                    f"{beat.info} is lost: it has not answered for {beat.silent_s:.0f} s, during the rendezvous.",
                )
        if len(beats) == self._size:
            store.set(ALL_HERE, "yes")
        elif waited_s > self._wait_s:
            missing = sorted(set(range(self._size)) - beats.keys())
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            what = f"{len(missing)} of {self._size} ranks did not come within {waited_s:.0f} s: {some}."
            remedy = "Look at their output on their hosts, or raise --rendezvous_timeout_s."
            self._end_all(heartbeat, f"{what} {remedy}")

    def _end_all(self, heartbeat: Heartbeat, text: str) -> None:
        heartbeat.give_verdict({"text": text})
        self._finish(text, 0)

    def _finish(self, text: str, reporter: int) -> None:
        if self._rank == reporter:
            print(f"\n{text}\nAll ranks end. --resume auto goes on.\n", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(2 * BEAT_S)  # for the others to read the verdict before the store goes
        self._end(STATUS)


def _listen(address: str, port: int, options: dict[str, Any]) -> torch_dist.TCPStore:
    try:
        return torch_dist.TCPStore(address, port, is_master=True, **options)
    except RuntimeError as error:
        rule = f"rank 0 cannot listen at {address}:{port} ({str(error).splitlines()[0][:120]})"
        remedy = "Name another free port there: deepspeed --master_port N"
        problem = f"MASTER_PORT: {port} given, but {rule}. {remedy}."
        raise UserError("The ranks cannot meet", [problem]) from None
