"""A map over files that all ranks share: each rank reads its part, and none waits long in a collective.

Threads read, and the main threads exchange the results every second or two. So no collective waits longer than that,
even if the whole takes an hour, or a single file ten minutes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from dsyolo.base.environment import terminal_type
from dsyolo.base.errors import UserError

CHUNK = 64  # files per task: large enough that handing out tasks and sending results costs nothing
BAR_AFTER_S = 1.0  # what is over sooner needs no bar

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")


class Communicator(Protocol):
    """One rank's view of the ranks that work together. All make the same calls in the same order."""

    rank: int
    size: int
    keeps_cache: bool  # whether this rank writes its host's cache
    exchange_every_s: float

    def exchange(self, item: Any) -> list[Any]:
        """Return every rank's item, in the order of ranks; waits for all ranks."""

    def broadcast(self, rank: int, item: Any) -> Any:
        """Return the item of `rank` on all ranks."""

    def at(self, where: str) -> None:
        """Report progress: this rank is at `where` now."""


class LocalCommunicator:
    """A single process."""

    rank, size = 0, 1
    keeps_cache = True
    exchange_every_s = 0.2  # only moves the progress bar

    def exchange(self, item: Any) -> list[Any]:
        return [item]

    def broadcast(self, rank: int, item: Any) -> Any:
        return item

    def at(self, where: str) -> None: ...


def run_on_all_ranks(communicator: Communicator, work: Callable[[], R], what: str) -> R:
    """Return what `work` returns on this rank, once all ranks are done.

    Raises:
        UserError: on all ranks, the error of the first rank that has one.
    """
    results: list[R] = []
    tasks = [lambda: results.append(work())]
    for _ in _exchanges(communicator, tasks, what, communicator.size, lambda: len(results), num_threads=1):
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
    """Apply `work` to all items, each on one rank; return the results on all ranks, in the order of the items.

    Args:
        pack: turns the results of `CHUNK` consecutive items into what is sent and returned.
        what: a description for progress messages.
        bar: whether to show a progress bar.

    Raises:
        UserError: on all ranks, the error of the first rank that has one.
    """
    chunks = [items[start : start + CHUNK] for start in range(0, len(items), CHUNK)]
    read: list[None] = []  # one per item: appending is safe in threads

    def task(index: int) -> tuple[int, P]:
        results = []
        for item in chunks[index]:
            results.append(work(item))
            read.append(None)
        return index, pack(results)

    own = [partial(task, index) for index in range(communicator.rank, len(chunks), communicator.size)]
    packs: dict[int, P] = {}
    is_off = True if not bar or terminal_type() == "dumb" else None  # None: off without a terminal
    settings: dict[str, Any] = {"delay": BAR_AFTER_S, "disable": is_off, "dynamic_ncols": True, "ascii": True}
    with tqdm(total=len(items), desc=what, unit=" files", **settings) as shown:
        done = _exchanges(communicator, own, what, len(items), lambda: len(read), num_threads=num_threads)
        for num_done, results in done:
            packs |= dict(results)
            shown.update(num_done - shown.n)
    return [packs[index] for index in range(len(chunks))]


def _exchanges(
    communicator: Communicator,
    tasks: Sequence[Callable[[], R]],
    what: str,
    num_all: int,
    count: Callable[[], int],
    *,
    num_threads: int,
) -> Iterator[tuple[int, list[R]]]:
    """Run the tasks on threads until all ranks are done.

    Args:
        count: returns this rank's progress; that of all ranks adds up to `num_all` at the end.

    Yields:
        After each exchange the progress of all ranks, and their results since the last one.
    """
    pool = ThreadPoolExecutor(max(1, min(num_threads, len(tasks))))
    num_before, all_done, is_waiting = -1, False, False
    try:
        running = {pool.submit(task) for task in tasks}
        while not all_done:
            done, running = wait(running, timeout=communicator.exchange_every_s)
            if not running and not is_waiting:
                is_waiting = True  # reported once: the watchdog sees which ranks are still working
                communicator.at(f"{what}, waiting for the other ranks")
            reports = communicator.exchange((count(), bool(running), *_outcome(done)))
            counts, are_busy, results, errors = zip(*reports, strict=True)
            for rank, error in enumerate(errors):
                if error:
                    headline, problems = error
                    place = [f"Rank {rank} reported this."] if rank else []
                    raise UserError(headline, [*problems, *place])
            num_done, all_done = sum(counts), not any(are_busy)
            if num_done > num_before:
                own = counts[communicator.rank]
                communicator.at(f"{what}: {own:,} here, {num_done:,} of {num_all:,} on all ranks")
                num_before = num_done
            yield num_done, [result for part in results for result in part]
    finally:
        pool.shutdown(wait=all_done, cancel_futures=True)


def _outcome(done: set[Future[R]]) -> tuple[list[R], tuple[str, list[str]] | None]:
    """Return the results, or the parts of a UserError."""
    try:
        return [future.result() for future in done], None
    except UserError as error:
        return [], (error.headline, list(error.problems))
