"""The terms of a rank's memory, and their measurement in a training step.

What stays is counted from tensors, each storage once. Activations come from the peaks of the allocator: torch's on an
accelerator, the C library's malloc on a CPU.
"""

import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.device import accelerator
from dsyolo.engine.ema import Ema
from dsyolo.engine.engine import Engine
from dsyolo.engine.partitions import Partitions

EVERY = 8  # parameters' gradients from one look to the next: a look takes some milliseconds


def process_memory_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def peak_memory_gib(device: torch.device) -> float:
    """Return this rank's peak so far in GiB: of the device's allocator, or on a CPU of the process's resident set."""
    return process_memory_gib() if device.type == "cpu" else accelerator().max_memory_allocated() / 2**30


class MemoryTerms(NamedTuple):
    """Bytes by term. Small parts are left out: BatchNorm's buffers, images, targets, scalars."""

    parameters: int = 0  # those that the network computes with
    gradients: int = 0
    optimizer: int = 0  # its states, and fp32 master weights where they are not the parameters themselves
    ema: int = 0
    buckets: int = 0  # copies in which gradients and weights travel
    activations: int = 0

    @property
    def total(self) -> int:
        """Return the sum: an upper bound, since the terms peak at different moments."""
        return sum(self)

    @property
    def states(self) -> int:
        """Return what does not depend on the images: parameters, gradients, optimizer and EMA."""
        return self.parameters + self.gradients + self.optimizer + self.ema


class MemoryEstimate(NamedTuple):
    """The terms of one rank, by place. If the device is the CPU, `host` is still what was offloaded."""

    device: MemoryTerms
    host: MemoryTerms = MemoryTerms()

    @property
    def combined(self) -> MemoryTerms:
        return MemoryTerms(*(a + b for a, b in zip(self.device, self.host, strict=True)))

    def to_json(self) -> dict[str, dict[str, int]]:
        return {"device": self.device._asdict(), "host": self.host._asdict()}


class MemoryMeasurement(NamedTuple):
    """The largest value of each term of one rank in one step, and the peak of all together.

    A `peak` of None is not known, nor are the activations then.
    """

    terms: MemoryEstimate
    peak: int | None


def held(engine: Engine, partitions: Partitions, ema: Ema) -> MemoryEstimate:
    """Return the bytes that this rank holds now, without activations."""
    keys = [partition.key for partition in partitions.flat]
    parameters = list(engine.network.parameters())
    weights, gradients, buckets, rest = internals.memory_held(engine.ds_engine.optimizer, parameters, keys)
    states = [list(partitions.optimizer.state[key].values()) for key in keys]
    seen: set[int] = set()
    parts = {
        "parameters": _sizes(weights, seen),
        "ema": _sizes(ema.tensors, seen),
        "optimizer": _sizes([keys, partitions.masters(), states], seen),
        "buckets": _sizes(buckets, seen),
        "gradients": _sizes(gradients, seen),
    }
    parts["buckets"] = [a + b for a, b in zip(parts["buckets"], _sizes(rest, seen), strict=True)]
    device, host = (MemoryTerms(**{name: sizes[i] for name, sizes in parts.items()}) for i in (0, 1))
    found = MemoryEstimate(device, host)
    return MemoryEstimate(found.combined) if engine.device.type == "cpu" else found


def _sizes(values: Any, seen: set[int]) -> list[int]:
    """Return bytes of (accelerator, host): of the storages of tensors in nested `values` that are not yet `seen`."""
    sizes = [0, 0]
    for tensor in _tensors(values):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if storage.filename:  # all tensors that are offloaded to a file share one storage
            key, size = tensor.data_ptr(), tensor.nbytes
        if key not in seen:
            seen.add(key)
            sizes[storage.device.type == "cpu"] += size
    return sizes


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor) and not values.is_meta:
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
        ema: Ema,
        report: Callable[[list[MemoryMeasurement]], None],
        *,
        again: bool = False,
    ) -> None:
        self._parts = engine, partitions, ema
        self._report, self._again = report, again
        self._steps_left = 2

    def begin_epoch(self) -> None:
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

    def __init__(self, engine: Engine, partitions: Partitions, ema: Ema) -> None:
        self._parts = engine, partitions, ema
        used = malloc_bytes()
        on_host = _MallocPeaks(used) if used else _NoPeaks()
        self._peaks = on_host if engine.device.type == "cpu" else _AllocatorPeaks()
        # What was held, and whether only forward or backward passes ran until the next look.
        self._looks: list[tuple[MemoryEstimate, bool]] = []

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Wrap the step."""
        engine = self._parts[0]
        optimizer = engine.ds_engine.optimizer

        def last_look(*args: Any, **settings: Any) -> Any:
            self._look(in_passes=False)
            return step(*args, **settings)

        step = internals.replace_step(optimizer, last_look)
        hooks = [m.register_forward_hook(lambda *_: self._peaks.sample()) for m in engine.network.modules()]
        for i, parameter in enumerate(engine.network.parameters()):
            # The first parameter's gradient comes last.
            look = self._peaks.sample if i % EVERY else partial(self._look, i > 0)
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
        self._looks.append((held(*self._parts), in_passes))

    def result(self) -> MemoryMeasurement:
        """Return the peak of each term. Activations are what the allocator gave out beyond what is held."""
        device, host = (
            MemoryTerms(*map(max, zip(*(terms[i] for terms, _ in self._looks), strict=True))) for i in (0, 1)
        )
        peaks = self._peaks.above_start()
        if peaks is None:
            return MemoryMeasurement(MemoryEstimate(device, host), None)
        totals = [terms.device.total for terms, _ in self._looks]
        # Not activations: temporaries of the optimizer's step, after the last look, and buckets and gradients that
        # came between two looks.
        beyond = [
            peak + totals[0] - max(two)
            for peak, two, (_, in_passes) in zip(peaks[:-1], pairwise(totals), self._looks[:-1], strict=True)
            if in_passes
        ]
        terms = MemoryEstimate(device._replace(activations=max(beyond)), host)
        return MemoryMeasurement(terms, totals[0] + max(peaks))


class _NoPeaks:
    """Peaks of memory between marks, beyond the level at the first mark. Here the allocator cannot be asked."""

    def mark(self) -> None: ...

    def sample(self) -> None: ...

    def stop(self) -> None: ...

    def above_start(self) -> list[int] | None:
        return None


class _AllocatorPeaks(_NoPeaks):
    """Those of an accelerator's allocator."""

    def __init__(self) -> None:
        self._accelerator = accelerator()
        self._found: list[int] = []

    def mark(self) -> None:
        self._found.append(self._accelerator.max_memory_allocated())
        self._accelerator.reset_peak_memory_stats()
        if len(self._found) == 1:
            self._start = self._accelerator.memory_allocated()

    def stop(self) -> None:
        self.mark()

    def above_start(self) -> list[int]:
        return [peak - self._start for peak in self._found[1:]]


class _MallocPeaks(_NoPeaks):
    """Those of malloc, which torch uses on a CPU. It reports the present level only, so peaks are sampled."""

    def __init__(self, used: Callable[[], int]) -> None:
        self._used = used
        self._levels: list[int] = []  # the largest since each mark

    def mark(self) -> None:
        self._levels.append(self._used())
        if len(self._levels) == 1:
            self._start = self._levels[0]

    def sample(self) -> None:
        self._levels[-1] = max(self._levels[-1], self._used())

    def stop(self) -> None:
        self.sample()

    def above_start(self) -> list[int]:
        return [level - self._start for level in self._levels]


class _Mallinfo(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3))."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    _fields_ = [(name, ctypes.c_size_t) for name in (*_names, "keepcost")]


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
    block = torch.empty(2**26, dtype=torch.uint8)  # no page of it is touched
    # Half of it, as other threads free memory meanwhile. With another malloc preloaded it would be nothing.
    return used if used() - before >= block.nbytes // 2 else None
