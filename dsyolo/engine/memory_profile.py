"""How much memory a rank takes, term by term, measured in a step of its training.

What lies there is found at the tensors that the engine, the optimizer and the average hold, each storage once. What
comes and goes beside it is told by the allocator: an accelerator's is torch's own, a CPU's is the C library's malloc.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch

from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.ema import Ema, NoEma
from dsyolo.engine.engine import Engine
from dsyolo.engine.memory_terms import MemoryEstimate, MemoryTerms
from dsyolo.engine.partitions import Partitions

EVERY = 8  # of the parameters' gradients, one is an occasion to look: a look takes some milliseconds


def process_memory_gib() -> float:
    """Peak resident memory of this process, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory of this rank so far: the device's allocator, or on a CPU the process's resident set."""
    from deepspeed.accelerator import get_accelerator

    return process_memory_gib() if device.type == "cpu" else get_accelerator().max_memory_allocated() / 2**30


class MemoryMeasurement(NamedTuple):
    """Of one rank in one step: the most that each term came to, and of all together.

    Where nobody tells what comes and goes, `peak` is None and activations are 0.
    """

    account: MemoryEstimate
    peak: int | None  # bytes; at no moment is everything at its most


def held(engine: Engine, partitions: Partitions, ema: Ema | NoEma) -> MemoryEstimate:
    """The bytes that this rank holds now, but for activations."""
    optimizer = engine.deepspeed.optimizer
    keys = [key for key, _ in partitions.optimizer_keys()]
    parameters = list(engine.network.parameters())
    gradients = [
        [tensor.grad for tensor in chain(parameters, keys)],
        internals.gradient_buffers(optimizer, chain(parameters, keys)),
    ]
    states = [list(partitions.optimizer.state[key].values()) for key in keys]
    seen: set[int] = set()
    parts = {
        "parameters": _sizes([internals.weights_held(p) for p in parameters], seen),
        "ema": _sizes(ema.tensors, seen),
        "optimizer": _sizes([keys, partitions.masters(), states], seen),
        "buckets": _sizes(internals.bucket_buffers(optimizer), seen),
        "gradients": _sizes(gradients, seen),
    }
    rest = _sizes([[p.data for p in parameters], internals.all_attributes(optimizer)], seen)
    parts["buckets"] = [a + b for a, b in zip(parts["buckets"], rest, strict=True)]
    device, host = (MemoryTerms(**{name: sizes[i] for name, sizes in parts.items()}) for i in (0, 1))
    return (
        MemoryEstimate(device, host)
        if engine.device.type != "cpu"
        else MemoryEstimate(MemoryEstimate(device, host).together)
    )


def _sizes(values: Any, seen: set[int]) -> list[int]:
    """Bytes of the storages of the tensors in nested `values` that are not yet `seen`: (accelerators', the host's)."""
    sizes = [0, 0]
    for tensor in _tensors(values):
        storage = tensor.untyped_storage()
        # In a file that is mapped to memory everything that was offloaded shares one storage.
        key, size = (
            (tensor.data_ptr(), tensor.nbytes) if storage.filename else (storage._cdata, storage.nbytes())
        )
        if key not in seen:
            seen.add(key)
            sizes[storage.device.type == "cpu"] += size
    return sizes


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if not values.is_meta:
            yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


class MemoryProfiler:
    """Measures the second step of a run, all ranks together, and hands what it found to `tell`.

    The first one makes the optimizer's states.

    Args:
        tell: gets every rank's measurement, in their order; called on all ranks, after the step.
        again: measure the first step of every later epoch too.
    """

    def __init__(
        self,
        engine: Engine,
        partitions: Partitions,
        ema: Ema | NoEma,
        tell: Callable[[list[MemoryMeasurement]], None],
        *,
        again: bool = False,
    ) -> None:
        self._parts = engine, partitions, ema
        self._tell, self._again = tell, again
        self._steps_left = 2

    def begin_epoch(self) -> None:
        """Its first step is measured too, where every epoch's is."""
        if self._again and self._steps_left <= 0:
            self._steps_left = 1

    def step(self) -> AbstractContextManager[None]:
        """Around a training step."""
        self._steps_left -= 1
        return nullcontext() if self._steps_left else self._measured()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        probe = Probe(*self._parts)
        with probe.looking():
            yield
        self._tell(self._parts[0].all_gather(probe.result()))


class NoMemoryProfiler:
    """In the place of a watch: measures nothing."""

    def begin_epoch(self) -> None:
        """Nothing to do."""

    def step(self) -> AbstractContextManager[None]:
        """Around a training step."""
        return nullcontext()


class Probe:
    """Looks at what a rank holds whenever a forward pass has ended or a gradient is there, in one step."""

    def __init__(self, engine: Engine, partitions: Partitions, ema: Ema | NoEma) -> None:
        self._parts = engine, partitions, ema
        self._peaks = _peaks_of(engine.device)
        self._looks: list[_Look] = []

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Around the step."""
        engine, *_ = self._parts
        optimizer = engine.deepspeed.optimizer

        def last_look(*args: Any, **settings: Any) -> Any:
            self._look(in_passes=False)
            return step(*args, **settings)

        step = internals.replace_step(optimizer, last_look)
        hooks = []
        for module in engine.network.modules():
            hooks.append(module.register_forward_hook(lambda *_: self._peaks.sample()))
        for i, parameter in enumerate(engine.network.parameters()):
            look = (
                partial(self._look, i > 0) if i % EVERY == 0 else self._peaks.sample
            )  # the first one's comes last
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda _, look=look: look()))
        hooks.append(engine.network.register_forward_hook(lambda *_: self._look()))
        self._look()
        try:
            yield
        finally:
            self._peaks.stop()
            internals.replace_step(optimizer, step)
            for hook in hooks:
                hook.remove()

    def _look(self, in_passes: bool = True) -> None:
        self._peaks.mark()
        self._looks.append(_Look(held(*self._parts), in_passes))

    def result(self) -> MemoryMeasurement:
        """The most of each term. Activations: what the allocator gave out beyond what is held, between two looks."""
        device, host = (
            MemoryTerms(*map(max, zip(*(look.account[i] for look in self._looks), strict=True)))
            for i in (0, 1)
        )
        peaks = self._peaks.above_start()
        if peaks is None:
            return MemoryMeasurement(MemoryEstimate(device, host), None)
        start = self._looks[0].account.device.total
        # What the optimizer's step takes in passing, after the last look, are no activations; nor are buckets and
        # gradients that came between two looks.
        beyond = [
            peak - (max(look.account.device.total, after.account.device.total) - start)
            for peak, (look, after) in zip(peaks[:-1], pairwise(self._looks), strict=True)
            if look.in_passes
        ]
        account = MemoryEstimate(device._replace(activations=max(beyond)), host)
        return MemoryMeasurement(account, start + max(peaks))


class _Look(NamedTuple):
    account: MemoryEstimate
    in_passes: bool  # between it and the next one runs a forward or backward pass, and nothing of ZeRO's


class _AllocatorPeaks:
    """The most that an accelerator's allocator gave out after each mark, beyond what it had at the first one."""

    def __init__(self) -> None:
        from deepspeed.accelerator import get_accelerator

        self._accelerator = get_accelerator()
        self._found: list[int] = []

    def mark(self) -> None:
        self._found.append(self._accelerator.max_memory_allocated())
        self._accelerator.reset_peak_memory_stats()
        if len(self._found) == 1:
            self._start = self._accelerator.memory_allocated()

    def sample(self) -> None: ...

    def stop(self) -> None:
        self.mark()

    def above_start(self) -> list[int]:
        return [peak - self._start for peak in self._found[1:]]


class _MallocPeaks:
    """The same of the C library's, of which torch takes a CPU's memory. It tells what is given out, not its peaks."""

    def __init__(self, used: Callable[[], int]) -> None:
        self._used = used
        self._start: int | None = None
        self._found: list[int] = []

    def mark(self) -> None:
        now = self._used()
        self._start = now if self._start is None else self._start
        self._found.append(now - self._start)

    def sample(self) -> None:
        assert self._start is not None
        self._found[-1] = max(self._found[-1], self._used() - self._start)

    def stop(self) -> None:
        self.sample()

    def above_start(self) -> list[int]:
        return self._found


class _NoPeaks:
    """Where nobody tells."""

    def mark(self) -> None: ...

    def sample(self) -> None: ...

    def stop(self) -> None: ...

    def above_start(self) -> None:
        return None


def _peaks_of(device: torch.device) -> _AllocatorPeaks | _MallocPeaks | _NoPeaks:
    if device.type != "cpu":
        return _AllocatorPeaks()
    used = malloc_bytes()
    return _MallocPeaks(used) if used else _NoPeaks()


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3))."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def malloc_bytes() -> Callable[[], int] | None:
    """Tells the bytes that malloc has given out; None where it cannot be asked (before glibc 2.33, other libraries)."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo.restype = _Mallinfo

    def used() -> int:
        info = mallinfo()
        return info.uordblks + info.hblkhd

    before = used()
    block = torch.empty(
        2**26, dtype=torch.uint8
    )  # more than other threads give back meanwhile; no page is touched
    return used if used() - before >= block.nbytes else None  # else another malloc was loaded before this one
