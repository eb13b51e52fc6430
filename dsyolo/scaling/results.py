"""Combine the steps.json files of a case's runs: times, split, use of the machine."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsyolo.engine.step_timer import PHASES

COMPUTING = ("forward", "backward")


class Use(NamedTuple):
    """Use of the machines, over the measured steps. None: not measured."""

    cpu: float | None  # busy share of the cores of all machines, by all programs
    cpu_own: float | None  # the run's part of it
    process_gib: float | None  # peak of the rank that needs most
    activations_gib: float | None  # its part in that
    machine_gib: float | None  # memory in use by all programs, on the machine that uses most
    sent_mb: float | None  # a step, over network interfaces, of the host that sends most
    inside_mb: float | None  # the same over the loopback
    gpu: float | None  # busy share of the GPUs
    gpu_gib: float | None  # mean per GPU, as `gpu_w`
    gpu_w: float | None


class CaseResult(NamedTuple):
    """The results of all rounds of a case; the times are medians over the rounds."""

    rounds_s: list[list[float]]  # seconds of each round's measured steps, means over ranks
    split_s: dict[str, float]  # seconds of a step by phase; they add up to `step_s`
    images_per_step: int
    startup_s: float
    validation_s: float
    checkpoint_s: float
    wall_s: float
    use: Use
    collectives_a_step: float  # collectives that a rank takes part in
    collective_mb_a_step: float  # tensors that it hands to them
    comms_logger: dict[str, dict[str, int]]  # the same as DeepSpeed logs them
    about: dict[str, Any]
    mfu: float | None

    @property
    def step_s(self) -> float:
        """Return the median of all rounds' steps."""
        return float(np.median(np.concatenate(self.rounds_s)))

    @property
    def spread_s(self) -> tuple[float, float]:
        """Return the quartiles of all rounds' steps."""
        low, high = np.percentile(np.concatenate(self.rounds_s), [25, 75])
        return float(low), float(high)

    @property
    def images_per_s(self) -> float:
        return self.images_per_step / self.step_s


def combine_rounds(found: Sequence[Mapping[str, Any]], walls_s: Sequence[float], warmup: int) -> CaseResult:
    """Combine the steps.json of one case's rounds. Raise ValueError where no step is left after the warm-up."""
    rounds = [_phase_seconds(one["ranks"], warmup) for one in found]
    seconds_s = [one.sum(1).tolist() for one in rounds]
    middle, step_s = _middle_half(np.concatenate(rounds)), float(np.median(np.concatenate(seconds_s)))
    ranks = [rank for one in found for rank in one["ranks"]]
    counted = [_per_step(rank, warmup) for rank in ranks]
    first = ranks[0]
    peak = sum(rank["peak_flops_per_s"] for rank in found[0]["ranks"])
    flops = first["flops_per_image"] * first["images_per_step"]
    startups = [one["ranks"][0]["first_step_at"] - one["ranks"][0]["started_at"] for one in found]
    about = ("device", "threads", "workers", "cores", "peak_source", "num_images")
    return CaseResult(
        rounds_s=seconds_s,
        split_s=dict(zip(PHASES, (middle * step_s / middle.sum()).tolist(), strict=True)),
        images_per_step=first["images_per_step"],
        startup_s=float(np.median(startups)),
        validation_s=_median_outside(ranks, "validation"),
        checkpoint_s=_median_outside(ranks, "checkpoint"),
        wall_s=float(np.median(walls_s)),
        use=_use(ranks, counted, warmup),
        collectives_a_step=float(np.mean([one["collectives"] for one in counted])),
        collective_mb_a_step=float(np.mean([one["collective_bytes"] for one in counted])) / 1e6,
        comms_logger=first["comms_logger"],
        about={key: first[key] for key in about},
        mfu=flops / step_s / peak if peak else None,
    )


def _phase_seconds(ranks: Sequence[Mapping[str, Any]], warmup: int) -> np.ndarray:
    """Return seconds of shape (steps, phases), means over the ranks of a round."""
    steps = [_after(rank["steps"], warmup) for rank in ranks]
    if not all(steps):
        raise ValueError("no step was measured")
    return np.array([[[step["seconds"][name] for name in PHASES] for step in one] for one in steps]).mean(0)


def _median_outside(ranks: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median seconds of what ranks did between steps; 0 for what never happened."""
    return float(np.median([seconds for rank in ranks for seconds in rank["outside"].get(name, [0.0])]))


def _after(steps: Sequence[Mapping[str, Any]], warmup: int) -> list[Mapping[str, Any]]:
    return [step for step in steps if step["step"] > warmup]


def _middle_half(seconds: np.ndarray) -> np.ndarray:
    """Return means by phase over (steps, phases), without the fastest and the slowest quarter of the steps."""
    whole = seconds.sum(1)
    low, high = np.percentile(whole, [25, 75])
    return seconds[(whole >= low) & (whole <= high)].mean(0)


def _per_step(rank: Mapping[str, Any], warmup: int) -> dict[str, float]:
    """Return the growth of a rank's counters in a measured step, and in a second as `..._rate`."""
    seen = {step["step"]: step["seen"] for step in rank["steps"]}
    first, last = seen.get(warmup) or seen[min(seen)], seen[max(seen)]
    steps, seconds = max(1, max(seen) - max(warmup, min(seen))), max(1e-9, last["at"] - first["at"])
    keys = [key for key in first.keys() & last.keys() if isinstance(first[key], (int, float))]
    grown = {key: last[key] - first[key] for key in keys}
    rates = {f"{key}_rate": value / seconds for key, value in grown.items()}
    return {key: value / steps for key, value in grown.items()} | rates


def _use(ranks: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, float]], warmup: int) -> Use:
    """Return the use of the machines over all rounds; `counted` is per rank, from `_per_step`."""
    machines = [one for one in counted if "machine_cpu_s" in one]
    cores = sum(r["machine_cores"] for r, one in zip(ranks, counted, strict=True) if "machine_cpu_s" in one)
    looks = [step["seen"] for rank in ranks for step in _after(rank["steps"], warmup)]
    gpus = [look["gpu"] for look in looks if "gpu" in look]
    memory = [rank.get("memory", {}) for rank in ranks]

    def mean(key: str, unit: float = 1.0) -> float | None:
        return float(np.mean([gpu[key] for gpu in gpus])) / unit if gpus else None

    def most(rows: Sequence[Mapping[str, Any]], key: str, unit: float = 1.0) -> float | None:
        return max((row[key] / unit for row in rows if key in row), default=None)

    return Use(
        cpu=sum(one["machine_cpu_s_rate"] for one in machines) / cores if cores else None,
        cpu_own=min(1.0, sum(one["cpu_s_rate"] for one in counted) / cores) if cores else None,
        process_gib=most(memory, "peak_gib"),
        activations_gib=most(memory, "peak_activations_gib"),
        machine_gib=most(looks, "memory_bytes", 2**30),
        sent_mb=most(machines, "sent", 1e6),
        inside_mb=most(machines, "inside", 1e6),
        gpu=mean("busy"),
        gpu_gib=mean("memory_bytes", 2**30),
        gpu_w=mean("power_w"),
    )
