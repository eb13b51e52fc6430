"""Explain the figures of a size: efficiency, what limits it, and what it loses against the smallest size."""

from dsyolo.config.messages import counted
from dsyolo.scaling.cases import WEAK, Wanted
from dsyolo.scaling.results import COMPUTING, CaseResult

SOME, MUCH = 0.05, 0.15  # shares worth mentioning, and worth a remedy
NO_LOSS = 0.02  # share of the ideal time; less is noise
REMEDY = {
    "data": "raise --workers, use --cache ram, or store smaller images",
    "copy": "use larger micro-batches",
    "communication": "send less often by larger micro-batches or more accumulation, or use a lower ZeRO stage "
    "or faster links",
    "optimizer": "use a ZeRO stage that shards it, or no offload",
    "other": "use larger micro-batches, as it is paid once a step",
}
SINGLE_RANK_OPTIMIZER = "use more accumulation steps (the optimizer runs once per step), or no offload"
PHASE_TEXT = {
    "data": "waiting for data",
    "copy": "copying to the device",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "communication": "communication and waiting for other ranks",
    "optimizer": "the optimizer",
    "other": "the rest (EMA, logging)",
}


def efficiency(one: CaseResult, ranks: int, base: CaseResult, base_ranks: int) -> float:
    """Return images/s per rank relative to the base's, for weak and strong scaling alike."""
    return (one.images_per_s / ranks) / (base.images_per_s / base_ranks)


def bottleneck(one: CaseResult, ranks: int, base: CaseResult | None, base_ranks: int, scaling: str) -> str:
    """Return what limits a size. `base` is the smallest size; None for itself."""
    shares = {name: seconds / one.step_s for name, seconds in one.split_s.items()}
    computing = sum(shares.pop(name) for name in COMPUTING)
    worst = max(shares, key=shares.__getitem__)
    if shares[worst] >= MUCH:
        remedy = SINGLE_RANK_OPTIMIZER if worst == "optimizer" and ranks == 1 else REMEDY[worst]
        text = f"{PHASE_TEXT[worst].capitalize()} takes {shares[worst]:.0%} of a step: {remedy}."
    else:
        text = f"Computing: forward and backward take {computing:.0%} of a step, "
        text += f"{PHASE_TEXT[worst]} {shares[worst]:.0%}."
    if base is not None:
        text += f" {_loss_of_scaling(one, ranks, base, base_ranks, scaling)}"
    cpu, cpu_own = one.use.cpu, one.use.cpu_own
    if cpu is not None and cpu_own is not None and cpu - cpu_own >= SOME:
        text += f" Other programs used {cpu - cpu_own:.0%} of the machine: measure again when it is quiet."
    return text


def _loss_of_scaling(one: CaseResult, ranks: int, base: CaseResult, base_ranks: int, scaling: str) -> str:
    """Return where the time goes that a perfectly scaling step would not take."""
    share = 1.0 if scaling == WEAK else base_ranks / ranks
    ideal_s = base.step_s * share
    over_s = one.step_s - ideal_s
    if over_s < NO_LOSS * ideal_s:
        return f"No scaling loss against {counted(base_ranks, 'rank')}."
    grown = {name: one.split_s[name] - base.split_s[name] * share for name in one.split_s}
    parts = ", ".join(
        f"{1000 * seconds:.0f} ms in {PHASE_TEXT[name]}"
        for name, seconds in sorted(grown.items(), key=lambda item: -item[1])
        if seconds > 0.1 * over_s
    )
    text = f"A step takes {1000 * over_s:.0f} ms more than ideal scaling from {counted(base_ranks, 'rank')}: {parts}."
    if sum(grown[name] for name in COMPUTING) > 0.3 * over_s and one.about["device"] == "CPU":
        shared = "memory bandwidth, caches, clock and cores for workers"
        text += f" Ranks that share a machine also share {shared}."
    return text


def unlike(one: Wanted, base: Wanted) -> str:
    """Return a sentence on other differences than its stages between a pipeline and its base; empty without."""
    parts = [
        f"{name} {getattr(base.computes, name)} (this pipeline {getattr(one.computes, name)})"
        for name in one.computes.differences(base.computes)
    ]
    but = "so speedup and efficiency include that difference"
    return f" Its base {base.strategy} has {' and '.join(parts)}, {but}." if parts else ""
