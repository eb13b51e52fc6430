"""Rendezvous of all ranks before torch joins them: no rank waits forever for one that died or never comes.

Torch's own waits half an hour, and over several hosts no launcher ends all ranks when one fails. So each rank beats into
the store in which torch will join them, and rank 0 judges.
"""

import logging
import os
import socket
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch.distributed as torch_dist

from dsyolo.base.errors import UserError
from dsyolo.base.resume_words import way_on
from dsyolo.cluster.agreed_port import AgreedPort
from dsyolo.cluster.heartbeat import STATUS, Heartbeat, log_last_error

BEAT_S = 0.5
LOST_S = 15.0  # without a beat: dead, stopped, or behind a network that is down
NAME, ALL_HERE = "rendezvous", "rendezvous/all"
log = logging.getLogger(__name__)


class Rendezvous:
    """Rendezvous of all ranks at rank 0's address, from construction to `close`.

    Args:
        address, port: where torch will let the ranks join; it shares the store.
        wait_s: rendezvous timeout in seconds. After it, this process ends with `heartbeat.STATUS`.
        agreed: where rank 0 may choose another port, if this one is taken, and the others read which.

    Attributes:
        port: where rank 0 listens, once `wait` has returned.

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
        agreed: AgreedPort | None = None,
    ) -> None:
        self._rank, self._size, self._address, self._wait_s = rank, size, address, wait_s
        self.port, self._agreed = port, agreed
        self._all_here, self._closed = threading.Event(), threading.Event()
        options = {"world_size": size, "wait_for_workers": False, "multi_tenant": True}
        self._server = self._listen(options) if rank == 0 else None  # lives as long as this
        connect = partial(self._connect, options)
        self._thread = threading.Thread(target=lambda: self._attend(self._server or connect()), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self._all_here.wait()

    def close(self) -> None:
        """Leave, after torch has joined the ranks."""
        self._closed.set()
        self._thread.join()
        if self._rank == 0 and self._agreed:
            self._agreed.remove()

    @property
    def _place(self) -> str:
        return f"{self._address}:{self.port}"

    def _listen(self, options: dict[str, Any]) -> torch_dist.TCPStore:
        """Listen at the port, or at a free one where it is taken and the others can read which."""
        try:
            store = _listen(self._address, self.port, options)
        except UserError:
            if not self._agreed:
                raise
            store = _listen(self._address, 0, options)
            log.info("port %d is taken, most likely by another run: this one uses %d", self.port, store.port)
        if self._agreed:
            self.port = store.port
            try:
                self._agreed.write(self.port)
            except OSError as error:
                remedy = "Make room there, or name a free port: deepspeed --master_port N"
                problem = f"{error.filename}: {error.strerror}. {remedy}."
                raise UserError("The rendezvous failed", [problem]) from None
        return store

    def _connect(self, options: dict[str, Any]) -> torch_dist.TCPStore:
        """Connect to rank 0 once it listens. Torch's own client prints a stack at every try, and waits longer."""
        began = time.monotonic()
        while True:
            try:
                port = self._agreed.read() if self._agreed else self.port
                if port is None:
                    raise ConnectionError
                self.port = port
                socket.create_connection((self._address, port), LOST_S).close()
                timeout = timedelta(seconds=LOST_S)
                return torch_dist.TCPStore(self._address, port, is_master=False, timeout=timeout, **options)
            except (OSError, RuntimeError):
                waited_s = time.monotonic() - began
                if waited_s > self._wait_s:
                    text = f"Rank {self._rank} found no rank 0 at {self._place} within {self._wait_s:.0f} s."
                    self._finish(f"{text}\n{_end_text()}", 1)
                time.sleep(_pause_s(waited_s))

    def _attend(self, store: torch_dist.TCPStore) -> None:
        store.set_timeout(timedelta(seconds=LOST_S))
        heartbeat = Heartbeat(store, NAME, self._rank, self._size)
        began = time.monotonic()
        while not self._closed.is_set():
            try:
                heartbeat.beat()
                if verdict := heartbeat.verdict():
                    self._finish(verdict["text"], 0)
                if self._rank == 0:
                    self._judge(store, heartbeat, time.monotonic() - began)
                if store.check([ALL_HERE]):
                    self._all_here.set()
            except RuntimeError:
                if not self._closed.is_set():
                    text = f"Rank 0 at {self._place} is lost: it stopped answering during the rendezvous."
                    self._finish(f"{text}\n{_end_text()}", 1)
            self._closed.wait(_pause_s(time.monotonic() - began))
        if self._rank:
            heartbeat.beat(has_left=True)

    def _judge(self, store: torch_dist.Store, heartbeat: Heartbeat, waited_s: float) -> None:
        """On rank 0: end all if a rank is lost, or has not come in time."""
        beats, text = heartbeat.read(), ""
        missing = sorted(set(range(self._size)) - beats.keys())
        if not missing:
            store.set(ALL_HERE, "yes")
        elif waited_s > self._wait_s:
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            text = (
                f"{len(missing)} of {self._size} ranks did not join the rendezvous within {waited_s:.0f} s ({some}), "
                "so all ranks end. Check their hosts' output or raise --rendezvous_timeout_s; "
                f"{way_on()} resumes the run."
            )
        for info, silent_s, _, has_left in beats.values():
            if silent_s > LOST_S and not has_left:
                text = f"{info} is lost: it has not answered for {silent_s:.0f} s during the rendezvous.\n{_end_text()}"
        if text:
            heartbeat.give_verdict({"text": text})
            self._finish(text, 0)

    def _finish(self, text: str, reporter: int) -> NoReturn:
        if self._rank == reporter:
            log_last_error(text)
        if self._rank == 0:
            time.sleep(2 * BEAT_S)  # for the others to read the verdict before the store goes
        os._exit(STATUS)


def _pause_s(waited_s: float) -> float:
    """Seconds until the next try: a tenth of the wait so far, so that no rank comes much later than the last one."""
    return min(BEAT_S, max(0.05, waited_s / 10))


def _listen(address: str, port: int, options: dict[str, Any]) -> torch_dist.TCPStore:
    try:
        return torch_dist.TCPStore(address, port, is_master=True, **options)
    except RuntimeError as error:
        rule = f"rank 0 cannot listen at {address}:{port} ({str(error).splitlines()[0][:120]})"
        remedy = "Name another free port there: deepspeed --master_port N"
        problem = f"MASTER_PORT: {port} given, but {rule}. {remedy}."
        raise UserError("The rendezvous failed", [problem]) from None


def _end_text() -> str:
    return f"All ranks end; {way_on()} resumes the run."
