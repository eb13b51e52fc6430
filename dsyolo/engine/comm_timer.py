"""Times collectives and counts their bytes, by wrapping torch.distributed, which DeepSpeed and dsyolo both call."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as torch_dist

from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.step_timer import COMMUNICATION, StepTimer

NAMES = (
    *("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier"),
    *("all_gather", "all_gather_into_tensor", "all_to_all_single", "send", "recv", "isend", "irecv"),
)


class CommTimer:
    """Times the collectives of steps as communication, waiting for other ranks included.

    Attributes:
        sizes: bytes so far by function, of the whole tensors: in a gather, of all ranks' parts together.
        calls: collectives so far.
    """

    def __init__(self, timer: StepTimer) -> None:
        self._timer = timer
        self.calls = 0
        self.sizes: Counter[str] = Counter()
        self._replaced = contextlib.ExitStack()
        for name in NAMES:
            plain = getattr(torch_dist, name)
            self._replaced.callback(setattr, torch_dist, name, plain)
            setattr(torch_dist, name, self._timed(name, plain))
        self._replaced.enter_context(internals.rebound_collectives())

    def close(self) -> None:
        self._replaced.close()

    def _timed(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def timed(*args: Any, **settings: Any) -> Any:
            if not self._timer.inside:
                return plain(*args, **settings)
            self.calls += 1
            self.sizes[name] += max(map(_bytes_of, (*args, *settings.values())), default=0)
            with self._timer.phase(COMMUNICATION):
                work = plain(*args, **settings)
            return work if work is None or isinstance(work, int) else _Timed(work, self._timer)

        return timed


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_bytes_of, argument)) if isinstance(argument, (list, tuple)) else 0


class _Timed:
    """An asynchronous collective: waiting for it counts as communication."""

    def __init__(self, work: Any, timer: StepTimer) -> None:
        self._work, self._timer = work, timer

    def wait(self, *args: Any) -> Any:
        with self._timer.phase(COMMUNICATION):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def comms_logged(found: dict[str, dict[str, int]]) -> Iterator[None]:
    """Inside, DeepSpeed's comms logger is on, which waits for the device at every collective.

    At the end `found` gets calls and bytes by operation, bytes of the tensors and not of what is sent.
    """
    is_ours = not internals.comms_logger_is_on()  # else the JSON has it on for the whole run
    if is_ours:
        internals.set_comms_logger(True)
    yield
    found |= internals.logged_collectives()
    if is_ours:
        internals.set_comms_logger(False)
