"""What a rank needs of memory, term by term: counted before anything is built, for any number of ranks.

The formulas are those of the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054), with what DeepSpeed 0.19 adds to
them: padding, whole parameters at the borders of a rank's share, buckets, copies in fp32. What a rank really has is
measured by `engine/memory_profile.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.config import DeepSpeedConfig
from dsyolo.config.spec import OffloadSpec
from dsyolo.engine.memory_terms import MemoryEstimate, MemoryTerms

ALIGNMENT = 2  # elements: DeepSpeed pads a group of weights to a multiple of it times the ranks


class RankLoad(NamedTuple):
    """What a rank trains, whatever the strategy.

    Attributes:
        groups: number of elements of each parameter, in the optimizer's groups.
        activations: bytes that autograd keeps at once; without recompute, and with all blocks recomputed.
        activations_host: bytes of inputs of recomputed blocks that wait in host memory.
        dp_rank, dp_size: among how many ranks that hold the same parameters, and which of them.
    """

    groups: tuple[tuple[int, ...], ...]
    activations: int
    activations_plain: int
    activations_least: int
    dp_rank: int
    dp_size: int
    ema: bool
    activations_host: int = 0

    @property
    def num_elements(self) -> int:
        return sum(map(sum, self.groups))


def predict(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    """The account of a rank.

    Args:
        zero: the block `zero_optimization` that DeepSpeed gets: `DeepSpeedConfig.deepspeed_json`.
    """
    by_stage = (_nothing_sharded, _states_sharded, _states_sharded, _all_sharded)
    account = by_stage[ds.zero_stage](load, ds, zero)
    if not load.ema:
        account = MemoryEstimate(*(terms._replace(ema=0) for terms in account))
    return MemoryEstimate(
        account.device._replace(activations=load.activations),
        account.host._replace(activations=load.activations_host),
    )


def _nothing_sharded(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    whole = 4 * load.num_elements
    # All-reduced as one tensor, flattened from the gradients; the average is shared by the replicas.
    bucket = whole if load.dp_size > 1 else 0
    return MemoryEstimate(
        MemoryTerms(whole, whole, ds.optimizer.states_per_param * whole, whole // load.dp_size, bucket)
    )


def _states_sharded(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    """ZeRO 1 and 2."""
    weight, summed = ds.precision.params_bytes, ds.precision.grads_bytes
    step = ALIGNMENT * load.dp_size
    shares = [math.ceil(sum(group) / step) * ALIGNMENT for group in load.groups]
    share = sum(shares)
    own = 4 * share * (1 + ds.optimizer.states_per_param)
    # ZeRO 1 sends what it has summed, ZeRO 2 what a micro-batch gives; a kind of number each has a bucket.
    buckets = _bucket_bytes(zero, summed if ds.zero_stage == 1 else weight) * ds.num_gradient_types
    if ds.zero_stage == 1:
        gradients = max(weight, summed) * load.num_elements
    else:
        gradients = summed * share + weight * _waiting(load, zero, shares)
    device = MemoryTerms(weight * share * load.dp_size, gradients, own, 4 * share, buckets)
    if not ds.parallelism.offload.optimizer:
        return MemoryEstimate(device)
    # The optimizer gets its gradients in fp32, and its weights come back through a copy.
    largest = weight * max(map(max, load.groups))
    waiting = 0
    if ds.zero_stage == 2:
        met = sum(_met(group, size, load.dp_rank) for group, size in zip(load.groups, shares, strict=True))
        waiting = summed * share if summed != weight else weight * met if ds.accumulation > 1 else 0
    host = MemoryTerms(0, 4 * share + waiting, own, 4 * share, largest + weight * share)
    stays = gradients if ds.zero_stage == 1 else 0
    return MemoryEstimate(
        device._replace(gradients=stays, optimizer=0, ema=0, buckets=buckets + largest), host
    )


def _all_sharded(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    """ZeRO 3."""
    weight, summed = ds.precision.params_bytes, ds.precision.grads_bytes
    numels = [numel for group in load.groups for numel in group]
    share = sum(math.ceil(numel / load.dp_size) for numel in numels)
    whole = 0  # that are never freed
    for numel in numels:
        if numel <= zero["stage3_param_persistence_threshold"]:
            fits = whole + numel <= zero.get("stage3_model_persistence_threshold", math.inf)
            # As it was gathered: with what fills up the last rank's part.
            whole += math.ceil(numel / load.dp_size) * load.dp_size if fits else 0
    gathered = min(load.num_elements, max(int(zero["stage3_max_live_parameters"]), max(numels)))
    # What arrives is one flat tensor, from which each weight is copied: no look at what is held sees it.
    arriving = min(load.num_elements, int(zero.get("stage3_prefetch_bucket_size", 0)))
    if load.dp_size == 1:  # its share is the whole, and is used as it is
        gathered, arriving = gathered if ds.parallelism.offload.params else 0, 0
    device = MemoryTerms(
        weight * (share + whole),
        summed * share + weight * _waiting(load, zero),
        4 * share * (1 + ds.optimizer.states_per_param),
        4 * share,
        _bucket_bytes(zero, weight) + weight * (gathered + arriving),
    )
    host = MemoryTerms()
    if ds.parallelism.offload.optimizer:
        host = MemoryTerms(0, device.gradients + 4 * share, device.optimizer, device.ema)
        device = device._replace(gradients=0, optimizer=0, ema=0)
    if ds.parallelism.offload.params:
        host = host._replace(parameters=weight * share)
        device = device._replace(parameters=weight * whole)
    return MemoryEstimate(device, host)


def _bucket_bytes(zero: dict[str, Any], weight_bytes: int) -> int:
    if not zero.get("contiguous_gradients", True):
        return 0
    return int(zero["reduce_bucket_size"]) * weight_bytes * (2 if zero.get("overlap_comm") else 1)


def _waiting(load: RankLoad, zero: dict[str, Any], shares: Sequence[int] | None = None) -> int:
    """The most elements of a micro-batch's gradients that lie whole at once, outside of buckets.

    There are some without `contiguous_gradients` alone: then a bucket is the list of the gradients themselves, until it
    is sent.

    Args:
        shares: of ZeRO 2, of each group: gradients that reach into this rank's stay.
    """
    if zero.get("contiguous_gradients", True):
        return 0
    most = 0
    for i, group in enumerate(load.groups):
        stays, listed, largest, stop = 0, 0, 0, sum(group)
        foreign = 0
        for numel in reversed(group):  # as backward makes them
            start = stop - numel
            is_own = shares is not None and _reaches(start, stop, shares[i], load.dp_rank)
            if listed + numel > zero["reduce_bucket_size"]:
                listed = foreign = 0
            listed += numel
            stays += numel if is_own else 0
            foreign += 0 if is_own else numel
            largest, stop = max(largest, stays + foreign), start
        most += largest
    return most


def _reaches(start: int, stop: int, share: int, dp_rank: int) -> bool:
    return start < share * (dp_rank + 1) and stop > share * dp_rank


def _met(group: Sequence[int], share: int, dp_rank: int) -> int:
    """Elements of the parameters of a flattened group that reach into a rank's share of it."""
    bounds = pairwise(accumulate(group, initial=0))
    return sum(stop - start for start, stop in bounds if _reaches(start, stop, share, dp_rank))


def verdict(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any], alone: RankLoad) -> str:
    """What the strategy saves of the memory of a rank, in a sentence.

    Args:
        load: of the rank that needs most.
        alone: of a rank with the whole network; the same as `load` where there is no pipeline.
    """
    unsharded = replace(ds, parallelism=replace(ds.parallelism, zero_stage=0, offload=OffloadSpec()))
    plain = load._replace(activations=load.activations_plain, activations_host=0)
    of_stage = predict(plain, unsharded, {}).together.total
    base = of_stage if ds.stages == 1 else predict(alone, unsharded, {}).together.total
    unit, divisor = ("GiB", 2**30) if base >= 2**30 else ("MiB", 2**20)

    def amount(size: int) -> str:
        return f"{size / divisor:.{2 if unit == 'GiB' else 0}f}"

    def effect(what: str, gain: int) -> str:
        return f"{what} {'saves' if gain >= 0 else 'adds'} {amount(abs(gain))}"

    says = [effect("the pipeline", base - of_stage)] if ds.stages > 1 else []
    if ds.zero_stage:
        says.append(effect(f"ZeRO {ds.zero_stage}", of_stage - predict(plain, ds, zero).together.total))
    if load.activations != load.activations_plain:
        kept = load.activations + load.activations_host
        says.append(effect("recompute", load.activations_plain - kept))
    else:
        says.append(f"recompute would save {amount(load.activations_plain - load.activations_least)}")
    account = predict(load, ds, zero)
    if account.host.total:
        says.append(f"offload moves {amount(account.host.total)} to the host")
    whose = "the rank that needs most" if ds.stages > 1 else "a rank"
    return f"memory: {amount(account.together.total)} {unit} on {whose}, {amount(base)} without all this: {', '.join(says)}"


def shortage(accounts: Sequence[MemoryEstimate], device_bytes: int | None, host_bytes: int) -> str:
    """A warning where less memory is there than the ranks of a machine are expected to need; empty where there is enough.

    Args:
        accounts: of those ranks.
        device_bytes: memory of a rank's device; None: ranks compute on the host.
    """
    on_host = [account.together.total if device_bytes is None else account.host.total for account in accounts]
    needs = [("the machine", sum(on_host), host_bytes)]
    if device_bytes is not None:
        needs.append(("a rank's device", max(account.device.total for account in accounts), device_bytes))
    short = [
        f"{needed / 2**30:.2f} GiB of {where}, which has {there / 2**30:.2f}"
        for where, needed, there in needs
        if needed > there
    ]
    if not short:
        return ""
    remedy = "dsyolo plan tells what fits, and --deepspeed_config auto takes it"
    return f"WARNING: this run is expected to need {' and '.join(short)}. It may run out of memory. {remedy}."


def table(rows: Iterable[tuple[str, MemoryTerms]]) -> str:
    """A line for each (title, terms), in MiB."""
    rows = list(rows)
    width = max(len(title) for title, _ in rows)
    head = f"{'memory, MiB':{width}}  " + "  ".join(
        f"{name:>11}" for name in (*MemoryTerms._fields, "together")
    )
    lines = [
        f"{title:{width}}  " + "  ".join(f"{size / 2**20:11.1f}" for size in (*terms, terms.total))
        for title, terms in rows
    ]
    return "\n".join([head, *lines])
