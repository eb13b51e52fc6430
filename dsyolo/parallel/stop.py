"""Stops a run between two steps when it is asked to by SIGTERM, all ranks after the same one."""

from __future__ import annotations

import signal
from typing import Any

import torch
import torch.distributed as torch_dist

from dsyolo.parallel.dist import World

STATUS = 75  # of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h


class StopRequest:
    """Hears SIGTERM, as schedulers send it before they take a machine away.

    Ranks hear it at different moments, or only one of them does. So in every step they exchange whether they did, on
    the host and without waiting: a step reads the answer of the one before it.
    """

    def __init__(self, world: World) -> None:
        self._asked = False
        self._group = torch_dist.new_group(backend="gloo") if world.size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether to stop here. All ranks must call it after every step, and get the same answer."""
        if self._group is None:
            return self._asked
        answer = self._take()
        asked = torch.tensor([self._asked], dtype=torch.uint8)
        work = torch_dist.all_reduce(asked, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, asked
        return answer

    def close(self) -> None:
        """Waits for what is on its way."""
        self._take()

    def _take(self) -> bool:
        if self._pending is None:
            return False
        work, asked = self._pending
        work.wait()
        self._pending = None
        return bool(asked)
