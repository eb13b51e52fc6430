"""What the figures mean: efficiency, and what holds a size back."""

from __future__ import annotations

from dsyolo.scaling.cases import WEAK, Wanted
from dsyolo.scaling.results import COMPUTING, CaseResult

SOME, MUCH = 0.05, 0.15  # shares of a step that are worth a word
REMEDY = {
    "data": "give it more --workers or --cache ram, or smaller images on the disk",
    "copy": "copying to the device: larger micro-batches, pinned memory",
    "communication": "larger micro-batches or more accumulation send less often; a lower ZeRO stage, faster links",
    "optimizer": "a ZeRO stage that shares it, or no offload",
    "other": "larger micro-batches: it is paid once a step",
}
ALONE = (
    "more accumulation, as it is paid once a step, or no offload"  # of the optimizer: nobody to share it with
)
OF = {
    "data": "waiting for data",
    "copy": "copying to the device",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "communication": "communication and waiting for other ranks",
    "optimizer": "the optimizer",
    "other": "the rest (averaged weights, logging)",
}


def efficiency(one: CaseResult, ranks: int, base: CaseResult, base_ranks: int) -> float:
    """Images/s of a rank against those of a rank of the base, under weak and under strong scaling."""
    return (one.images_per_s / ranks) / (base.images_per_s / base_ranks)


def bottleneck(one: CaseResult, ranks: int, base: CaseResult | None, base_ranks: int, scaling: str) -> str:
    """What holds this size back, in a sentence or two.

    Args:
        base: the smallest size; None for itself.
    """
    shares = {name: seconds / one.step_s for name, seconds in one.split.items()}
    worst = max((name for name in shares if name not in COMPUTING), key=lambda name: shares[name])
    computing = sum(shares[name] for name in COMPUTING)
    if shares[worst] >= MUCH:
        remedy = ALONE if worst == "optimizer" and ranks == 1 else REMEDY[worst]
        said = f"{OF[worst].capitalize()} takes {shares[worst]:.0%} of a step: {remedy}."
    else:
        said = f"Computing: forward and backward passes take {computing:.0%} of a step, {OF[worst]} {shares[worst]:.0%}."
    if base is None:
        return said + _others(one)
    return f"{said} {lost(one, ranks, base, base_ranks, scaling)}{_others(one)}"


def lost(one: CaseResult, ranks: int, base: CaseResult, base_ranks: int, scaling: str) -> str:
    """Where the time goes that a perfectly scaling step would not take."""
    share = 1.0 if scaling == WEAK else base_ranks / ranks
    ideal_s = base.step_s * share
    over = one.step_s - ideal_s
    if over < 0.02 * ideal_s:
        return f"Against {base_ranks} rank{'s' if base_ranks > 1 else ''} nothing is lost."
    grown = {name: one.split[name] - base.split[name] * share for name in one.split}
    parts = [
        f"{1000 * seconds:.0f} ms in {OF[name]}"
        for name, seconds in sorted(grown.items(), key=lambda item: -item[1])
        if seconds > 0.1 * over
    ]
    slower = sum(grown[name] for name in COMPUTING)
    why = (
        " Ranks that share a machine compute more slowly than one alone: memory bandwidth, caches, clock, or workers"
        " and other programs on their cores."
        if slower > 0.3 * over and _is_on_cpu(one)
        else ""
    )
    base_words = f"{base_ranks} rank{'s' if base_ranks > 1 else ''}"
    return f"Over what {base_words} would let expect, a step takes {1000 * over:.0f} ms more: {', '.join(parts)}.{why}"


def unlike(one: Wanted, base: Wanted) -> str:
    """What else than its stages tells a pipeline from what it is compared with, as a sentence more."""
    parts = [
        f"{name} {getattr(base.computes, name)} (this pipeline {getattr(one.computes, name)})"
        for name in one.computes.differences(base.computes)
    ]
    if not parts:
        return ""
    return f" Its speedup and efficiency are against {base.strategy}, which has {' and '.join(parts)}: they tell of that too."


def _is_on_cpu(one: CaseResult) -> bool:
    return one.about["device"] == "CPU"


def _others(one: CaseResult) -> str:
    """What was not the run's own."""
    use = one.use
    if use.cpu is None or use.cpu_own is None or use.cpu - use.cpu_own < SOME:
        return ""
    return f" Other programs took {use.cpu - use.cpu_own:.0%} of the machine meanwhile: measure again when it is quiet."
