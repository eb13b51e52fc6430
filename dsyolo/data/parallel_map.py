"""Processes that read a data set together, each its share, so that no slow disk makes the others wait in silence.

Threads read. The main threads meet every second or two and exchange what was read since: no collective waits longer
than that, whether a scan takes an hour or a single file of one member takes ten minutes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from dsyolo.base.errors import UserError

CHUNK = 64  # files per task: large enough that handing out tasks and sending results costs nothing
BAR_AFTER_S = 1.0  # what is over sooner needs no bar

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")


class Communicator(Protocol):
    """One member's view of the processes that read together. All make the same calls in the same order."""

    rank: int
    size: int
    keeps_cache: bool  # of its machine's members the one that writes what all of them may read
    meets_every_s: float

    def exchange(self, item: Any) -> list[Any]:
        """Every member's item, in the order of ranks; waits for all members."""

    def given_by(self, rank: int, item: Any) -> Any:
        """That member's item, on all members."""

    def at(self, where: str) -> None:
        """This member has made progress, and is there now."""


class LocalCommunicator:
    """A crew of one."""

    rank, size = 0, 1
    keeps_cache = True
    meets_every_s = 0.2  # moves the progress bar, no more

    def exchange(self, item: Any) -> list[Any]:
        return [item]

    def given_by(self, rank: int, item: Any) -> Any:
        return item

    def at(self, where: str) -> None: ...


def run_on_all_ranks(communicator: Communicator, work: Callable[[], R], what: str) -> R:
    """What `work` gives this member, once all members are done with theirs.

    Raises:
        UserError: that of the first member that has one, on all of them.
    """
    results: list[R] = []
    tasks = [lambda: results.append(work())]
    for _ in _meetings(communicator, tasks, what, communicator.size, lambda: len(results), num_threads=1):
        pass
    return results[0]


def parallel_map(
    communicator: Communicator,
    work: Callable[[T], R],
    items: Sequence[T],
    pack: Callable[[list[R]], P],
    what: str,
    *,
    num_threads: int,
    bar: bool = False,
) -> list[P]:
    """Applies `work` to all items, each on one member; the results on all members, in the items' order.

    Args:
        pack: makes of the results of `CHUNK` items in a row what is sent and returned.
        what: is done, in words.
        bar: show one.

    Raises:
        UserError: that of the first member that has one, on all of them.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    tally = _Tally()

    def task(index: int) -> tuple[int, P]:
        return index, pack([tally.counted(work(item)) for item in chunks[index]])

    own = [
        lambda index=index: task(index) for index in range(communicator.rank, len(chunks), communicator.size)
    ]
    packs: dict[int, P] = {}
    with tqdm(total=len(items), desc=what, unit=" files", delay=BAR_AFTER_S, disable=not bar) as shown:
        for num_done, results in _meetings(
            communicator, own, what, len(items), lambda: tally.count, num_threads=num_threads
        ):
            packs |= dict(results)
            shown.update(num_done - shown.n)
    return [packs[index] for index in range(len(chunks))]


def _meetings(
    communicator: Communicator,
    tasks: Sequence[Callable[[], R]],
    what: str,
    num_all: int,
    count: Callable[[], int],
    *,
    num_threads: int,
) -> Iterator[tuple[int, list[R]]]:
    """Runs the tasks on threads until all members are done with theirs.

    Args:
        count: how far this member is; all members' add up to `num_all` in the end.

    Yields:
        at each meeting how far all are together, and the results of all members since the last one.
    """
    pool = ThreadPoolExecutor(max(1, min(num_threads, len(tasks))))
    num_before, all_done, is_waiting = -1, False, False
    try:
        running = {pool.submit(task) for task in tasks}
        while not all_done:
            done, running = wait(running, timeout=communicator.meets_every_s)
            if not running and not is_waiting:
                is_waiting = (
                    True  # one step further than those that are not: of these is who holds up the others
                )
                communicator.at(f"{what}, waiting for the other ranks")
            meeting = communicator.exchange((count(), bool(running), *_outcome(done)))
            counts, are_busy, results, errors = zip(*meeting, strict=True)
            _raise_first(errors)
            num_done, all_done = sum(counts), not any(are_busy)
            if num_done > num_before:
                communicator.at(
                    f"{what}: {counts[communicator.rank]:,} here, {num_done:,} of {num_all:,} together"
                )
                num_before = num_done
            yield num_done, [result for part in results for result in part]
    finally:
        pool.shutdown(wait=all_done, cancel_futures=True)


def _outcome(done: set[Future[R]]) -> tuple[list[R], tuple[str, list[str]] | None]:
    """Results, and a UserError in parts where there is one."""
    try:
        return [future.result() for future in done], None
    except UserError as error:
        return [], (error.headline, list(error.problems))


def _raise_first(errors: Sequence[tuple[str, list[str]] | None]) -> None:
    for rank, error in enumerate(errors):
        if error:
            headline, problems = error
            raise UserError(headline, [*problems, f"This is what rank {rank} found."] if rank else problems)


class _Tally:
    """Counts what threads have done."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def counted(self, result: R) -> R:
        with self._lock:
            self.count += 1
        return result
