"""Throughput and its causes: shares of step time, MFU, peak memory, and the per-step details that `dsyolo scale` reads."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from dsyolo.base.atomic_file import write_file
from dsyolo.engine.comm_timer import CommTimer, comms_logged
from dsyolo.engine.memory_profile import MemoryMeasurement
from dsyolo.engine.step_timer import COMMUNICATION, DATA, PHASES, StepTimes
from dsyolo.tracking.resource_usage import ResourceUsage

T = TypeVar("T")

LOGGED_STEP = 3  # with DeepSpeed's comms logger on: the first step is slow, the second measures memory
SHARES = {name: "data_wait_share" if name == DATA else f"{name}_share" for name in PHASES}


class StepDetails:
    """The details of each step of a rank, for `dsyolo scale`.

    Args:
        path: of the file that the main process writes; None on other ranks.
        about: facts of the run and of this rank.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any], usage: ResourceUsage) -> None:
        self._path, self._about, self._usage = path, dict(about), usage
        self.times: list[StepTimes] = []
        self.outside: dict[str, list[float]] = {}
        self._step = 0
        self._seen: dict[int, dict[str, Any]] = {}
        self._comms: dict[str, Any] = {}

    def of_each(self, steps: Iterator[T], start: int, collectives: CommTimer) -> Iterator[T]:
        """Yield what `steps` yields, and take a sample of counters after each."""
        self._step = start
        self._about.setdefault("first_step_at", time.time())
        self._look(collectives)
        for batches in steps:
            self._step += 1
            with comms_logged(self._comms) if self._step == LOGGED_STEP else nullcontext():
                yield batches
            self._look(collectives)

    def end(self, collectives: CommTimer) -> None:
        """Take the last sample; the run may have stopped after any step."""
        if self._step not in self._seen:
            self._look(collectives)

    def to_json(self) -> dict[str, Any]:
        """Return this rank's details."""
        steps = [
            {"step": one.step, "seconds": one.seconds, "seen": self._seen.get(one.step, {})}
            for one in self.times
        ]
        return {**self._about, "steps": steps, "outside": self.outside, "comms_logger": self._comms}

    def write(self, ranks: Sequence[Mapping[str, Any]]) -> None:
        """Write the details of all ranks, on the main process."""
        if self._path and any(rank["steps"] for rank in ranks):
            write_file(self._path, (json.dumps({"ranks": ranks}) + "\n").encode())

    def _look(self, collectives: CommTimer) -> None:
        self._seen[self._step] = {
            "at": time.time(),
            "collectives": collectives.calls,
            "collective_bytes": collectives.sizes.total(),
            **self._usage.look(),
        }


def measured_every(log_every: int, steps_of_epoch: int) -> int:
    """Return n to measure every n-th step: at least one in each epoch, even if it has a step less than the first."""
    return min(log_every, max(1, steps_of_epoch // 2))


def shares(ranks: Sequence[Mapping[str, float]], flops: float, peak_flops_per_s: float) -> dict[str, float]:
    """Return each phase's mean share of the time, and the MFU.

    Args:
        ranks: seconds by phase of each rank.
        flops: of all ranks in that time.
        peak_flops_per_s: of all ranks together; 0 where it is not known.
    """
    wholes = [sum(sums.values()) for sums in ranks]
    if not all(wholes):
        return {}  # an epoch too short for a step to be measured
    figures = {
        key: sum(sums[name] / whole for sums, whole in zip(ranks, wholes, strict=True)) / len(ranks)
        for name, key in SHARES.items()
    }
    if peak_flops_per_s:
        figures["mfu"] = flops / (sum(wholes) / len(wholes)) / peak_flops_per_s
    return figures


def peak_figures(measured: Sequence[MemoryMeasurement]) -> dict[str, float]:
    """Return the peak and the maximum of each term, in GiB, of the rank that needs most."""
    most = max(measured, key=lambda one: one.peak or one.terms.combined.total)
    peak = {} if most.peak is None else {"peak_gib": most.peak / 2**30}
    terms = most.terms.combined._asdict()
    return peak | {f"peak_{name}_gib": size / 2**30 for name, size in terms.items()}


def describe(row: Mapping[str, float]) -> str:
    """Return an epoch's throughput as a line; empty where it was not measured."""
    if SHARES[COMMUNICATION] not in row:
        return ""
    data, communication = (f"{100 * row[SHARES[name]]:.0f} %" for name in (DATA, COMMUNICATION))
    parts = [f"{row['images_per_s']:.1f} images/s", f"data {data}, communication {communication}"]
    if "peak_gib" in row:
        parts.append(f"peak {row['peak_gib']:.2f} GiB (activations {row['peak_activations_gib']:.2f})")
    if "mfu" in row:
        parts.append(f"{100 * row['mfu']:.0f} % of peak FLOP/s")
    return "; ".join(parts)
