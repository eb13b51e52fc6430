"""What a rank sends in a training step, and receives as much: counted for any number of ranks.

The formulas are those of the ZeRO paper (arXiv:1910.02054, section 7) for rings: of G bytes on N ranks an all-reduce sends
2 (N - 1) / N G, a reduce-scatter or all-gather half of it. What ZeRO 3 gathers follows DeepSpeed's own bookkeeping
(partitioned_param_coordinator.py), which keeps weights that are needed again soon.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from dsyolo.account import gradient_bytes, weight_bytes
from dsyolo.ds_config import DsConfig

Modules = Sequence[tuple[int, ...]]  # elements of each one's parameters, in the order of the forward pass


class Wire(NamedTuple):
    """Bytes that a rank sends in a step, by what they are."""

    gradients: int = 0
    weights: int = 0
    borders: int = 0  # activations and their gradients, to the neighbours in a pipeline
    statistics: int = 0  # of BatchNorm

    @property
    def total(self) -> int:
        return sum(self)


def step_bytes(
    modules: Modules, ds: DsConfig, zero: dict[str, Any], *, num_statistics: int = 0, border_elements: int = 0
) -> Wire:
    """Of a rank, whose parameters are those of `modules`.

    Args:
        zero: the block `zero_optimization` that DeepSpeed gets: `DsConfig.deepspeed_json`.
        num_statistics: elements of BatchNorm's running means and variances.
        border_elements: what a micro-batch sends over both borders of a pipeline's stage, forward only.
    """
    ranks = ds.data_parallel_size
    elements = sum(map(sum, modules))
    weight, summed = weight_bytes(ds), gradient_bytes(ds)
    if ds.zero_stage == 3:
        each, once = gathered_elements(modules, zero)
        sent = elements * ds.accumulation * weight
        gathered = (each * ds.accumulation + once) * weight
    else:
        sends = ds.accumulation if ds.zero_stage == 2 else 1
        sent = elements * sends * (weight if ds.zero_stage == 2 else summed)
        gathered = elements * (4 if ds.zero_stage == 0 else weight)
    crossing = border_elements * (4 if ds.precision == "fp32" else 2) * ds.accumulation

    def share(size: int) -> int:
        return size * (ranks - 1) // ranks

    # One sends on what it has, the other its gradient: over two borders a stage sends what crosses each once.
    return Wire(share(sent), share(gathered), crossing, share(2 * 4 * num_statistics))


def gathered_elements(modules: Modules, zero: dict[str, Any]) -> tuple[int, int]:
    """(elements that ZeRO 3 gathers in a micro-batch, and after the optimizer's step)."""
    return _gathered(tuple(modules), *(int(zero.get(key, default)) for key, default in _KEYS.items()))


_KEYS = {
    "stage3_param_persistence_threshold": 10**5,  # DeepSpeed's defaults
    "stage3_model_persistence_threshold": 2**63,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
}


@lru_cache(maxsize=64)
def _gathered(
    modules: Modules, threshold: int, room: int, ahead: int, most: int, reuse: int
) -> tuple[int, int]:
    persistent, used = set(), 0
    for number, numel in _numbered(modules):
        if numel <= threshold and used + numel <= room:
            persistent.add(number)
            used += numel
    return _Coordinator(modules, frozenset(persistent), ahead, most, reuse).gathered(), used


def _numbered(modules: Modules) -> list[tuple[int, int]]:
    return list(enumerate(numel for module in modules for numel in module))


class _Coordinator:
    """Fetches ahead and releases as DeepSpeed's PartitionedParameterCoordinator does, of whose rules each is one here."""

    def __init__(
        self, modules: Modules, persistent: frozenset[int], ahead: int, most: int, reuse: int
    ) -> None:
        self._ahead, self._most, self._reuse = ahead, most, reuse
        self._persistent = persistent
        self._numel = dict(_numbered(modules))
        numbers = iter(self._numel)
        forward = [[next(numbers) for _ in module] for module in modules]
        self._order = forward + forward[::-1]
        self._queue = deque((number, i) for i, used in enumerate(self._order) for number in used)
        self._last_use = dict.fromkeys(self._numel, -1)
        self._here: set[int] = set()
        self._gathered = 0

    def gathered(self) -> int:
        for step, module in enumerate(self._order):
            self._fetch(step, module)
            self._release(step + 1, module)
        return self._gathered

    def _gather(self, numbers: Sequence[int]) -> None:
        self._here.update(numbers)
        self._gathered += sum(self._numel[number] for number in numbers)

    def _is_away(self, number: int) -> bool:
        return number not in self._here and number not in self._persistent

    def _fetch(self, step: int, module: Sequence[int]) -> None:
        self._gather([number for number in module if self._is_away(number)])
        awaited = sum(self._last_use[number] < step for number in module)
        for number, use in [self._queue.popleft() for _ in range(min(awaited, len(self._queue)))]:
            self._last_use[number] = use
        room = min(self._most - sum(self._numel[number] for number in self._here), self._ahead)
        ahead: list[int] = []
        while self._queue and sum(self._numel[number] for number in ahead) < room:
            number, use = self._queue.popleft()
            self._last_use[number] = max(self._last_use[number], use)
            if self._is_away(number) and number not in ahead:
                ahead.append(number)
        self._gather(ahead)

    def _release(self, step: int, module: Sequence[int]) -> None:
        leaves = {number for number in module if self._last_use[number] <= step} - self._persistent
        passed = 0
        for later in self._order[step:]:
            if passed >= self._reuse:
                break
            leaves -= set(later)
            passed += sum(self._numel[number] for number in later)
        self._here -= leaves
