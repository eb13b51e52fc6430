"""Measures a rank's memory in a training step, term by term.

What stays is counted from the tensors of the engine, the optimizer and the EMA, each storage once. Activations come from
the allocator's peaks: torch's own on an accelerator, the C library's malloc on a CPU.
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

EVERY = 8  # look after every eighth parameter's gradient: a look takes some milliseconds


def process_memory_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def peak_memory_gib(device: torch.device) -> float:
    """Return this rank's peak so far in GiB: of the device's allocator, or on a CPU of the process's resident set."""
    from deepspeed.accelerator import get_accelerator

    return process_memory_gib() if device.type == "cpu" else get_accelerator().max_memory_allocated() / 2**30


class MemoryMeasurement(NamedTuple):
    """The largest value of each term of one rank in one step, and of all together.

    If the allocator cannot be asked, `peak` is None and activations are 0.
    """

    terms: MemoryEstimate
    peak: int | None  # bytes; less than the sum: the terms peak at different moments


def held(engine: Engine, partitions: Partitions, ema: Ema | NoEma) -> MemoryEstimate:
    """Return the bytes that this rank holds now, without activations."""
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
    """Return bytes of (accelerator, host): of the storages of tensors in nested `values` that are not yet `seen`."""
    sizes = [0, 0]
    for tensor in _tensors(values):
        storage = tensor.untyped_storage()
        # All tensors that are offloaded to a file share one storage.
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
    """Measures the second step of a run on all ranks; the first one creates the optimizer's states.

    Args:
        report: takes the measurements of all ranks, in their order; called on all ranks after the step.
        again: measure the first step of every later epoch too.
    """

    def __init__(
        self,
        engine: Engine,
        partitions: Partitions,
        ema: Ema | NoEma,
        report: Callable[[list[MemoryMeasurement]], None],
        *,
        again: bool = False,
    ) -> None:
        self._parts = engine, partitions, ema
        self._report, self._again = report, again
        self._steps_left = 2

    def begin_epoch(self) -> None:
        """Measure this epoch's first step, if `again`."""
        if self._again and self._steps_left <= 0:
            self._steps_left = 1

    def step(self) -> AbstractContextManager[None]:
        """Wrap a training step."""
        self._steps_left -= 1
        return nullcontext() if self._steps_left else self._measured()

    @contextmanager
    def _measured(self) -> Iterator[None]:
        probe = Probe(*self._parts)
        with probe.looking():
            yield
        self._report(self._parts[0].all_gather(probe.result()))


class Probe:
    """Samples what a rank holds after forward passes and gradients of one step."""

    def __init__(self, engine: Engine, partitions: Partitions, ema: Ema | NoEma) -> None:
        self._parts = engine, partitions, ema
        self._peaks = _peaks_of(engine.device)
        self._looks: list[_Look] = []

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Wrap the step."""
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
        """Return the peak of each term. Activations are what the allocator gave out beyond what is held."""
        device, host = (
            MemoryTerms(*map(max, zip(*(look.terms[i] for look in self._looks), strict=True))) for i in (0, 1)
        )
        peaks = self._peaks.above_start()
        if peaks is None:
            return MemoryMeasurement(MemoryEstimate(device, host), None)
        start = self._looks[0].terms.device.total
        # Not activations: temporaries of the optimizer's step, after the last look, and buckets and gradients that
        # came between two looks.
        beyond = [
            peak - (max(look.terms.device.total, after.terms.device.total) - start)
            for peak, (look, after) in zip(peaks[:-1], pairwise(self._looks), strict=True)
            if look.in_passes
        ]
        terms = MemoryEstimate(device._replace(activations=max(beyond)), host)
        return MemoryMeasurement(terms, start + max(peaks))


class _Look(NamedTuple):
    terms: MemoryEstimate
    in_passes: bool  # only forward or backward passes run between it and the next look


class _AllocatorPeaks:
    """Peaks of an accelerator's allocator between marks, beyond its level at the first mark."""

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
    """The same for malloc, which torch uses on a CPU. It reports the present level only, so peaks are sampled."""

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
    """The allocator cannot be asked."""

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
    """Return a function for the bytes that malloc has given out; None before glibc 2.33 and with other libraries."""
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
    )  # more than other threads free meanwhile; no page is touched
    return used if used() - before >= block.nbytes else None  # else another malloc is preloaded
