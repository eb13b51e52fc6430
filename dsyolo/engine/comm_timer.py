"""The time and bytes of collectives, by a seam at torch.distributed's own functions: DeepSpeed's calls and dsyolo's meet there."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist

from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.step_timer import COMMUNICATION, StepTimer

NAMES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
    "barrier",
)


class CommTimer:
    """Counts the collectives of steps as communication, with the waiting for other ranks in it.

    Attributes:
        sizes: by function, bytes of the whole tensors that it has reduced, gathered or sent so far: of a gathered one
            all ranks' parts together.
        calls: so far.
    """

    def __init__(self, phases: StepTimer) -> None:
        self._phases = phases
        self.calls = 0
        self.sizes: Counter[str] = Counter()
        self._plain = {name: getattr(torch_dist, name) for name in NAMES}
        for name, plain in self._plain.items():
            setattr(torch_dist, name, self._timed(name, plain))
        self._rebound = contextlib.ExitStack()
        self._rebound.enter_context(internals.rebound_collectives())

    def close(self) -> None:
        """Puts everything back."""
        for name, plain in self._plain.items():
            setattr(torch_dist, name, plain)
        self._rebound.close()

    def _timed(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        phases = self._phases

        @functools.wraps(plain)
        def timed(*args: Any, **settings: Any) -> Any:
            if not phases.inside:
                return plain(*args, **settings)
            self.calls += 1
            self.sizes[name] += max(map(_bytes_of, (*args, *settings.values())), default=0)
            with phases.phase(COMMUNICATION):
                work = plain(*args, **settings)
            return work if work is None or isinstance(work, int) else _Timed(work, phases)

        return timed


def _bytes_of(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_bytes_of, argument)) if isinstance(argument, (list, tuple)) else 0


class _Timed:
    """A collective that goes on: the time in which somebody waits for it is communication."""

    def __init__(self, work: Any, phases: StepTimer) -> None:
        self._work, self._phases = work, phases

    def wait(self, *args: Any) -> Any:
        with self._phases.phase(COMMUNICATION):
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class CommsLog:
    """DeepSpeed's comms logger, on for one step: on an accelerator it waits for the device at every collective."""

    def __init__(self) -> None:
        self._is_free = not internals.comms_logger_is_on()  # else the JSON has it on for the whole run

    def start(self) -> None:
        """From here on it logs."""
        if self._is_free:
            internals.set_comms_logger(True)

    def stop(self) -> dict[str, dict[str, int]]:
        """By operation how many calls, and bytes as DeepSpeed counts them: of the tensors, not of the wire."""
        found = internals.logged_collectives()
        if self._is_free:
            internals.set_comms_logger(False)
        return found
