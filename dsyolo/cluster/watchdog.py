"""Notices a rank that has died, was stopped, or hangs, and ends all ranks with one message that names it.

Without it the others wait in a collective for ten minutes or forever. Every rank beats once a second into a store on
rank 0, which judges. A rank that cannot reach the store takes rank 0 for lost.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch.distributed as torch_dist

from dsyolo.base.environment import RESTARTED, count_restart, read_environment
from dsyolo.base.resume_words import way_on
from dsyolo.cluster.collectives import all_gather_objects
from dsyolo.cluster.heartbeat import STATUS, Beat, Heartbeat, log_last_error, own_info
from dsyolo.cluster.world import World

BEAT_S = 1.0
LOST_S = 20.0  # without a beat: dead, stopped, or behind a network that is down
STACK_FRAMES = 6  # innermost frames of the main thread in a beat
PROCESS_STATES = {
    psutil.STATUS_STOPPED: "stopped",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
    psutil.STATUS_DISK_SLEEP: "waiting for a disk or network",
    psutil.STATUS_ZOMBIE: "dead",
}
NO_STATUS = {"progress": 0, "where": "starting", "stack": ""}  # status of a rank that has not beaten yet
REPORTER_OF_RANK_0 = 1  # the rank that prints the message when rank 0 is lost


class Watchdog:
    """Watches all ranks from construction to `close`.

    Args:
        late_s: seconds without progress of any rank, after which the rank that is furthest behind is named.
        end: called with the exit status when a rank is lost; it does not return.
    """

    def __init__(self, world: World, *, late_s: float, end: Callable[[int], Any] = os._exit) -> None:
        self._world, self._late_s, self._end = world, late_s, end
        self._own = own_info(world.rank)
        self._main = threading.get_ident()
        self.where, self._progress = "starting", 0  # the main thread's
        self._closed = threading.Event()
        self._ended = threading.Lock()
        self._ranks = [self._own]
        self._status_of_rank_0: Mapping[str, Any] = NO_STATUS  # for the rank that reports its loss
        if world.size == 1:
            return
        address = str(read_environment().master_addr)
        self._server = None  # lives as long as this
        if world.is_main_process:
            self._server = torch_dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        gathered = all_gather_objects((self._own, self._server and self._server.port))
        self._ranks = [info for info, _ in gathered]
        timeout = timedelta(seconds=LOST_S)
        store = torch_dist.TCPStore(address, gathered[0][1], is_master=False, timeout=timeout)
        self._heartbeat = Heartbeat(store, "watchdog", world.rank, world.size)
        self._began = self._answered = time.monotonic()  # after the wait for a rank that starts slowly
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def pids_here(self) -> list[int]:
        """Return the processes of the ranks on this machine."""
        return [info.pid for info in self._ranks if info.host == self._own.host]

    def at(self, where: str) -> None:
        """Report that the main thread makes progress, and where it is."""
        self.where = where
        self._progress += 1

    def wait_for_verdict(self) -> None:
        """After an error in a collective, wait for the watchdog to find the rank that caused it, and to end this one."""
        if self._world.size > 1:
            self._closed.wait(LOST_S + 5 * BEAT_S)

    def close(self) -> None:
        """Stop watching. All ranks must call it before the first one leaves."""
        self._closed.set()
        if self._world.size > 1:
            for thread in self._threads:
                thread.join(2 * BEAT_S)

    def end_all(self, text: str, again: Sequence[str] = ()) -> NoReturn:
        """End all ranks with this rank's message; with `again`, restart them with these arguments appended.

        Other ranks may be waiting in a collective.
        """
        verdict = {"rank": self._world.rank, "text": f"{self._own} {text}", "again": again}
        if self._world.size == 1:
            self._finish(verdict)
        self._heartbeat.give_verdict(verdict)
        while True:  # until the thread of `_beat` ends this process
            time.sleep(BEAT_S)

    def _beat(self) -> None:
        """Show that this rank lives; on rank 0, judge all."""
        progress: tuple[list[int], float] = ([], time.monotonic())
        while not self._closed.wait(BEAT_S):
            try:
                self._heartbeat.beat(**self._status())
                if verdict := self._heartbeat.verdict():
                    self._finish(verdict)
                elif self._world.is_main_process:
                    beats, now = self._heartbeat.read(), time.monotonic()
                    counts = [_status_of(beats.get(info.rank))["progress"] for info in self._ranks]
                    if counts != progress[0]:
                        progress = counts, now
                    self._judge(beats, now - progress[1])
                elif self._world.rank == REPORTER_OF_RANK_0:
                    self._status_of_rank_0 = _status_of(self._heartbeat.read([0]).get(0))
                self._answered = time.monotonic()
            except (RuntimeError, OSError):
                return  # `_watch` sees that the store does not answer any more

    def _watch(self) -> None:
        """End this rank if rank 0 does not answer, or its process on this machine has gone."""
        while not self._closed.wait(BEAT_S):
            silent_s = time.monotonic() - self._answered
            gone = not self._world.is_main_process and self._process_state(0) in ("gone", "dead")
            if silent_s > LOST_S or gone:
                self._finish({"rank": 0, "text": self._lost_text(0, silent_s, self._status_of_rank_0)})

    def _status(self) -> dict[str, Any]:
        frame = sys._current_frames().get(self._main)
        stack = traceback.format_stack(frame)[-STACK_FRAMES:] if frame else []
        return {"progress": self._progress, "where": self.where, "stack": "".join(stack)}

    def _judge(self, beats: Mapping[int, Beat], still_s: float) -> None:
        """Find a rank that is lost, or that holds up all. `still_s`: seconds since any rank made progress."""
        statuses = [_status_of(beats.get(info.rank)) for info in self._ranks]
        found: list[tuple[int, str]] = []
        for rank, status in enumerate(statuses):
            # A rank that is lost before its first beat must be missed too.
            silent_s = beats[rank].silent_s if rank in beats else time.monotonic() - self._began
            if silent_s > LOST_S or self._process_state(rank) in ("gone", "dead"):
                found.append((rank, self._lost_text(rank, silent_s, status)))
        # Before any progress nobody is late: indexing a data set may take hours.
        if still_s > self._late_s and any(status["progress"] for status in statuses):
            rank = min(range(len(statuses)), key=lambda rank: statuses[rank]["progress"])
            what = f"late: no rank has made progress for {still_s:.0f} s"
            found.append((rank, self._text(rank, what, statuses[rank])))
        for rank, text in found[:1]:
            verdict = {"rank": rank, "text": text}
            self._heartbeat.give_verdict(verdict)
            self._finish(verdict)

    def _lost_text(self, rank: int, silent_s: float, status: Mapping[str, Any]) -> str:
        state = self._process_state(rank)
        what = f"its process is {state}" if state else f"it has not answered for {silent_s:.0f} s"
        return self._text(rank, f"lost: {what}", status)

    def _text(self, rank: int, what: str, status: Mapping[str, Any]) -> str:
        return f"{self._ranks[rank]} is {what}. It was last at: {status['where']}.\n{status['stack']}"

    def _process_state(self, rank: int) -> str:
        """Return gone, dead, stopped, ... of a rank's process; empty if it runs, or is on another machine."""
        info = self._ranks[rank]
        try:
            status = psutil.Process(info.pid).status() if info.host == self._own.host else ""
        except psutil.NoSuchProcess:
            return "gone"
        return PROCESS_STATES.get(status, "")

    def _finish(self, verdict: dict[str, Any]) -> None:
        """Print the message, on one rank, and end this process."""
        if self._closed.is_set() or not self._ended.acquire(blocking=False):
            return
        lost, again = verdict["rank"], verdict.get("again")
        if self._world.rank == (0 if lost or self._world.size == 1 else REPORTER_OF_RANK_0):
            next_ = "start again." if again else f"end; {way_on()} resumes from the last checkpoint."
            log_last_error(f"{verdict['text'].rstrip()}\nAll ranks {next_}")
        if self._world.size > 1 and self._world.is_main_process:
            time.sleep(2 * BEAT_S)  # for the others to read the verdict before the store goes
        if again:
            self.main_process_ends(LOST_S)  # a rank that restarts before it would meet the old store
            start_again(again)
        if lost != self._world.rank and self._process_state(lost) == "stopped":
            os.kill(self._ranks[lost].pid, signal.SIGKILL)  # a stopped process takes no other signal
        self._end(STATUS)

    def main_process_ends(self, wait_s: float) -> bool:
        """Wait until rank 0's store has gone, at most so long, and return whether it has; False on rank 0 itself."""
        end = time.monotonic() + wait_s
        while not self._world.is_main_process and time.monotonic() < end:
            try:
                self._heartbeat.verdict()
            except (RuntimeError, OSError):
                return True
            time.sleep(0.2)
        return False


def start_again(arguments: Sequence[str]) -> NoReturn:
    """Restart this rank's program in its own process with `arguments` appended. The launcher does not notice."""
    for worker in multiprocessing.active_children():  # they would not notice, since their parent's id stays
        worker.kill()
    for handle in map(int, os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")):
        if handle > 2:  # listening ports, files of the device
            with contextlib.suppress(OSError):  # the listing's own
                os.set_inheritable(handle, False)
    count_restart()
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*sys.orig_argv, RESTARTED, *arguments])


def _status_of(beat: Beat | None) -> Mapping[str, Any]:
    return beat.status if beat else NO_STATUS
