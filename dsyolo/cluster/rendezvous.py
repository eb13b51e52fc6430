"""Ranks meet before they join: one that dies on the way is noticed, and none waits for ever for one that never comes.

Torch's own rendezvous waits half an hour for each of both. On one machine a launcher ends all ranks once one has failed;
over several hosts nobody does. Each rank beats into the store in which torch will join them, and the first one judges.
"""

from __future__ import annotations

import json
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

BEAT_S = 0.5
LOST_S = 15.0  # without a beat: dead, stopped, or behind a network that is down
STATUS = 70  # as of a rank that is lost later: EX_SOFTWARE of sysexits.h
LEFT = -1  # instead of a beat's number: this rank has joined
VERDICT, ALL_HERE = "meeting/verdict", "meeting/all"


class Rendezvous:
    """Of all ranks at the first one's address, from construction to `close`.

    Args:
        rank, size: this rank, and how many there are.
        address, port: where torch will let the ranks join: the store is shared with it.
        wait_s: so long the others wait for a rank that has not come.
        end: called with the exit status where the meeting fails; it does not return.

    Raises:
        UserError: the first rank cannot listen there.
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
        self._names = [f"meeting/{rank}" for rank in range(size)]
        self._changed: dict[int, tuple[int, float]] = {}  # of a rank's beat: its number, and when it was new
        self._store = None
        options = {"world_size": size, "wait_for_workers": False, "multi_tenant": True}
        if rank == 0:
            try:
                self._store = torch_dist.TCPStore(address, port, is_master=True, **options)
            except RuntimeError as error:
                rule = f"rank 0 cannot listen at {self._place} ({str(error).splitlines()[0][:120]})"
                remedy = "Name another free port there: deepspeed --master_port N"
                raise UserError(
                    "The ranks cannot meet", [f"MASTER_PORT: {port} given, but {rule}. {remedy}."]
                ) from None
        self._connect = partial(self._connected, address, port, options)
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all ranks are there."""
        self._all_here.wait()

    def close(self) -> None:
        """After torch has joined them."""
        self._closed.set()
        self._thread.join()
        if self._rank:
            self._beat(LEFT)

    def _connected(self, address: str, port: int, options: dict[str, Any]) -> torch_dist.TCPStore:
        """To the first rank, once it listens. Torch's own client would tell every try, with a stack, and wait longer."""
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
        self._store = self._store or self._connect()
        self._store.set_timeout(timedelta(seconds=LOST_S))
        began, count = time.monotonic(), 0
        while not self._closed.is_set():
            try:
                self._beat(count)
                if self._store.check([VERDICT]):
                    self._finish(self._store.get(VERDICT).decode(), 0)
                if self._rank == 0:
                    self._judge(time.monotonic() - began)
                if self._store.check([ALL_HERE]):
                    self._all_here.set()
            except RuntimeError:
                if not self._closed.is_set():
                    text = f"Rank 0 at {self._place} is lost: it was there, and does not answer any more."
                    self._finish(text, 1)
            count += 1
            self._closed.wait(0.05 if count < 10 else BEAT_S)

    def _beat(self, count: int) -> None:
        self._store.set(self._names[self._rank], json.dumps([socket.gethostname(), os.getpid(), count]))

    def _judge(self, waited_s: float) -> None:
        """On the first rank: who is here, who was, and who never came."""
        here = [rank for rank, name in enumerate(self._names) if self._store.check([name])]
        now = time.monotonic()
        for rank, said in zip(here, self._store.multi_get([self._names[rank] for rank in here]), strict=True):
            host, pid, count = json.loads(said)
            if self._changed.get(rank, (-1,))[0] != count:
                self._changed[rank] = count, now
            silent_s = now - self._changed[rank][1]
            if silent_s > LOST_S and count != LEFT:
                who = f"rank {rank} (process {pid} on {host})"
                self._tell(f"{who} is lost: it has not answered for {silent_s:.0f} s, while the ranks met.")
        if len(here) == self._size:
            self._store.set(ALL_HERE, "yes")
        elif waited_s > self._wait_s:
            missing = sorted(set(range(self._size)) - set(here))
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            what = f"Of {self._size} ranks {len(missing)} did not come within {waited_s:.0f} s: {some}."
            self._tell(
                f"{what} Look at what they say on their hosts, or give them longer by --rendezvous_timeout_s."
            )

    def _tell(self, text: str) -> None:
        self._store.set(VERDICT, text)
        self._finish(text, 0)

    def _finish(self, text: str, teller: int) -> None:
        if self._rank == teller:
            print(f"\n{text}\nAll ranks end. --resume auto goes on.\n", file=sys.stderr, flush=True)
        if self._rank == 0:
            time.sleep(2 * BEAT_S)  # for the others to read it before the store goes
        self._end(STATUS)
