"""What the runs of a case left in their steps.json, put together: times, split, use of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsyolo.engine.step_timer import PHASES

COMPUTING = ("forward", "backward")


class Use(NamedTuple):
    """Means over the measured steps. None: nobody told.

    Attributes:
        cpu: share of the cores of all machines that were busy, whoever kept them so.
        cpu_own: the run's own part of it.
        process_gib: the peak of the rank that needs most; activations: of it.
        machine_gib: memory taken on the machine that has most taken, by all.
        sent_mb: over network interfaces, of the host that sends most, in a step; `inside_mb` over the loopback.
        gpu: busy share of the GPUs, `gpu_gib` and `gpu_w` of one.
    """

    cpu: float | None
    cpu_own: float | None
    process_gib: float | None
    activations_gib: float | None
    machine_gib: float | None
    sent_mb: float | None
    inside_mb: float | None
    gpu: float | None
    gpu_gib: float | None
    gpu_w: float | None


class CaseResult(NamedTuple):
    """Of all rounds of a case.

    Attributes:
        rounds: by round the seconds of its measured steps, means over ranks.
        split: seconds of a step by phase; they add up to `step_s`.
        collective_mb: tensors that a rank hands to collectives in a step; `comms_log` as DeepSpeed logs them.
    """

    rounds: list[list[float]]
    split: dict[str, float]
    images_per_step: int
    startup_s: float
    validation_s: float
    checkpoint_s: float
    wall_s: float
    use: Use
    collective_mb: float
    collectives: float
    comms_log: dict[str, dict[str, int]]
    about: dict[str, Any]
    utilisation: float | None

    @property
    def step_s(self) -> float:
        """Median of all rounds' steps."""
        return float(np.median(np.concatenate(self.rounds)))

    @property
    def spread_s(self) -> tuple[float, float]:
        """Quartiles."""
        low, high = np.percentile(np.concatenate(self.rounds), [25, 75])
        return float(low), float(high)

    @property
    def images_per_s(self) -> float:
        return self.images_per_step / self.step_s


def put_together(found: Sequence[Mapping[str, Any]], walls_s: Sequence[float], warmup: int) -> CaseResult:
    """Of one case; `found` are the contents of its rounds' steps.json.

    Raises:
        ValueError: no step was left after the warm-up.
    """
    rounds, splits = [], []
    for one in found:
        ranks = [_after(rank["steps"], warmup) for rank in one["ranks"]]
        if not all(ranks):
            raise ValueError("no step was measured")
        seconds = np.array(
            [[[s["seconds"][name] for name in PHASES] for s in steps] for steps in ranks]
        ).mean(0)
        rounds.append(seconds.sum(1).tolist())
        splits.append(seconds)
    middle = _middle_half(np.concatenate(splits))
    step_s = float(np.median(np.concatenate(rounds)))
    split = dict(zip(PHASES, (middle * step_s / middle.sum()).tolist(), strict=True))
    first = found[0]["ranks"][0]
    outside = [rank["outside"] for one in found for rank in one["ranks"]]
    counted = [_per_step(rank, warmup) for one in found for rank in one["ranks"]]
    peak = sum(rank["peak_flops_per_s"] for rank in found[0]["ranks"])
    flops = first["flops_per_image"] * first["images_per_step"]
    return CaseResult(
        rounds,
        split,
        first["images_per_step"],
        float(np.median([one["ranks"][0]["first_step_at"] - one["ranks"][0]["started_at"] for one in found])),
        *(
            float(np.median([s for of in outside for s in of.get(name, [0.0])]))
            for name in ("validation", "checkpoint")
        ),
        float(np.median(walls_s)),
        _use(found, warmup),
        float(np.mean([one["collective_bytes"] for one in counted])) / 1e6,
        float(np.mean([one["collectives"] for one in counted])),
        first["comms_logger"],
        {key: first[key] for key in ("device", "threads", "workers", "cores", "peak_source", "num_images")},
        flops / step_s / peak if peak else None,
    )


def _after(steps: Sequence[Mapping[str, Any]], warmup: int) -> list[Mapping[str, Any]]:
    return [step for step in steps if step["step"] > warmup]


def _middle_half(seconds: np.ndarray) -> np.ndarray:
    """Means by phase over the steps (steps, phases) that are neither among the fastest nor the slowest quarter."""
    whole = seconds.sum(1)
    low, high = np.percentile(whole, [25, 75])
    return seconds[(whole >= low) & (whole <= high)].mean(0)


def _per_step(rank: Mapping[str, Any], warmup: int) -> dict[str, float]:
    """Growth of a rank's counters in a measured step, and a second's share of them under `..._rate`."""
    seen = {step["step"]: step["seen"] for step in rank["steps"]}
    first, last = seen.get(warmup) or seen[min(seen)], seen[max(seen)]
    steps, seconds = max(1, max(seen) - max(warmup, min(seen))), max(1e-9, last["at"] - first["at"])
    grown = {
        key: last[key] - first[key]
        for key in first.keys() & last.keys()
        if isinstance(first[key], (int, float))
    }
    return {key: value / steps for key, value in grown.items()} | {
        f"{key}_rate": value / seconds for key, value in grown.items()
    }


def _use(found: Sequence[Mapping[str, Any]], warmup: int) -> Use:
    """Over all rounds."""
    ranks = [rank for one in found for rank in one["ranks"]]
    counted = [_per_step(rank, warmup) for rank in ranks]
    machines = [c for c in counted if "machine_cpu_s" in c]
    cores = sum(rank["machine_cores"] for rank, c in zip(ranks, counted, strict=True) if "machine_cpu_s" in c)
    looks = [step["seen"] for rank in ranks for step in _after(rank["steps"], warmup)]
    gpus = [look["gpu"] for look in looks if "gpu" in look]
    memory = [rank.get("memory", {}) for rank in ranks]

    def mean(key: str) -> float | None:
        return float(np.mean([gpu[key] for gpu in gpus])) if gpus else None

    def most(values: Sequence[float], unit: float) -> float | None:
        return max(values) / unit if values else None

    return Use(
        sum(c["machine_cpu_s_rate"] for c in machines) / cores if cores else None,
        min(1.0, sum(c["cpu_s_rate"] for c in counted) / cores) if cores else None,
        most([m["peak_gib"] for m in memory if "peak_gib" in m], 1),
        most([m["peak_activations_gib"] for m in memory if "peak_activations_gib" in m], 1),
        most([look["memory_bytes"] for look in looks if "memory_bytes" in look], 2**30),
        most([c["sent"] for c in machines], 1e6),
        most([c["inside"] for c in machines], 1e6),
        mean("busy"),
        None if not gpus else mean("memory_bytes") / 2**30,  # type: ignore[operator]
        mean("power_w"),
    )
