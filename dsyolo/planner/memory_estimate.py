"""The memory that a rank needs, term by term: estimated before anything is built, for any number of ranks.

The formulas are those of the ZeRO paper (Rajbhandari et al. 2020, arXiv:1910.02054), and what DeepSpeed 0.19 adds to
them: padding, whole parameters at the borders of a rank's share, buckets, copies in fp32. `engine/memory_profile.py`
measures what a rank really holds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from dsyolo.config.deepspeed.config import DeepSpeedConfig
from dsyolo.config.spec import BYTES, OffloadSpec
from dsyolo.engine.memory_profile import MemoryEstimate, MemoryTerms

ALIGNMENT = 2  # elements: DeepSpeed pads a group of weights to a multiple of it times the ranks


class RankLoad(NamedTuple):
    """The part of the training that a rank does, whatever the strategy.

    Attributes:
        groups: number of elements of each parameter, in the optimizer's groups.
        activations: bytes that autograd keeps at once; without recompute, and with all blocks recomputed.
        dp_rank, dp_size: which rank this is of how many that hold the same parameters.
        activations_host: bytes of inputs of recomputed blocks that wait in host memory.
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
    """Estimate the memory of a rank; `zero` is the block `zero_optimization` of `DeepSpeedConfig.deepspeed_json`."""
    by_stage = (_nothing_sharded, _states_sharded, _states_sharded, _all_sharded)
    device, host = by_stage[ds.zero_stage](load, ds, zero)
    if not load.ema:
        device, host = device._replace(ema=0), host._replace(ema=0)
    device = device._replace(activations=load.activations)
    return MemoryEstimate(device, host._replace(activations=load.activations_host))


def _nothing_sharded(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    """Return the terms under ZeRO 0, which shards only the EMA."""
    whole = 4 * load.num_elements
    # All-reduced as one tensor, flattened from the gradients, or as a copy of it in the type that is sent.
    bucket = whole + _sent_copy(load.num_elements, ds, "fp32") if load.dp_size > 1 else 0
    states = ds.optimizer.states_per_param * whole
    return MemoryEstimate(MemoryTerms(whole, whole, states, whole // load.dp_size, bucket))


def _states_sharded(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    """Return the terms under ZeRO 1 and 2, which shard optimizer states; ZeRO 2 shards gradients too."""
    weight, summed = ds.precision.params_bytes, ds.precision.grads_bytes
    step = ALIGNMENT * load.dp_size
    shares = [math.ceil(sum(group) / step) * ALIGNMENT for group in load.groups]
    share = sum(shares)
    own = 4 * share * (1 + ds.optimizer.states_per_param)
    # ZeRO 1 sends sums, ZeRO 2 the gradients of a micro-batch; each type of number has a bucket.
    kind = ds.precision.grads if ds.zero_stage == 1 else ds.precision.params
    doubled = 2 if zero.get("overlap_comm") else 1
    buckets = _bucket_bytes(zero, BYTES[kind]) * doubled * ds.num_gradient_types
    buckets += _sent_copy(min(load.num_elements, int(zero["reduce_bucket_size"])), ds, kind)
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
        whole = sum(
            stop - start
            for group, size in zip(load.groups, shares, strict=True)
            for start, stop in _spans(group)
            if _overlaps(start, stop, size, load.dp_rank)
        )
        waiting = summed * share if summed != weight else weight * whole if ds.accumulation > 1 else 0
    host = MemoryTerms(0, 4 * share + waiting, own, 4 * share, largest + weight * share)
    stays = gradients if ds.zero_stage == 1 else 0
    device = device._replace(gradients=stays, optimizer=0, ema=0, buckets=buckets + largest)
    return MemoryEstimate(device, host)


def _all_sharded(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> MemoryEstimate:
    """Return the terms under ZeRO 3, which shards everything."""
    weight, summed = ds.precision.params_bytes, ds.precision.grads_bytes
    numels = [numel for group in load.groups for numel in group]
    share = sum(math.ceil(numel / load.dp_size) for numel in numels)
    whole = 0  # elements that are never freed
    for numel in numels:
        if numel <= zero["stage3_param_persistence_threshold"]:
            fits = whole + numel <= zero.get("stage3_model_persistence_threshold", math.inf)
            # As it was gathered: including the padding of the last rank's part.
            whole += math.ceil(numel / load.dp_size) * load.dp_size if fits else 0
    gathered = min(load.num_elements, max(int(zero["stage3_max_live_parameters"]), max(numels)))
    # Weights arrive in one flat tensor, and are copied out of it.
    arriving = min(load.num_elements, int(zero.get("stage3_prefetch_bucket_size", 0)))
    if load.dp_size == 1:  # its share is the whole, and is used as it is
        gathered, arriving = gathered if ds.parallelism.offload.params else 0, 0
    device = MemoryTerms(
        weight * (share + whole),
        summed * share + weight * _waiting(load, zero),
        4 * share * (1 + ds.optimizer.states_per_param),
        4 * share,
        # One bucket, in the type that is sent; `overlap_comm` takes no second one.
        _bucket_bytes(zero, BYTES[ds.sent_type or ds.precision.params]) + weight * (gathered + arriving),
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
    return int(zero["reduce_bucket_size"]) * weight_bytes if zero.get("contiguous_gradients", True) else 0


def _sent_copy(elements: int, ds: DeepSpeedConfig, kind: str) -> int:
    """Return the bytes of the copy that is sent where `communication_data_type` is not the gradients' type."""
    return elements * BYTES[ds.sent_type] if ds.sent_type not in (None, kind) else 0


def large_buckets(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> list[str]:
    """Return a warning for each bucket of the JSON that is larger than what a rank trains: it is allocated whole."""
    found = []
    key, given = "reduce_bucket_size", ds.source.get("zero_optimization", {})
    if ds.zero_stage and key in given and int(given[key]) > load.num_elements:
        small = {**zero, key: load.num_elements}
        empty = _buckets_alone(load, ds, zero) - _buckets_alone(load, ds, small)
        size = empty * int(given[key]) / (int(given[key]) - load.num_elements)
        if empty > 0:
            twice = (
                ", twice as overlap_comm is true" if ds.zero_stage < 3 and zero.get("overlap_comm") else ""
            )
            found.append(
                f"zero_optimization.{key}: {int(given[key]):,} elements given, but a rank trains {load.num_elements:,}: "
                f"the bucket takes {size / 2**30:.2f} GiB{twice}, of which {empty / 2**30:.2f} stay empty. "
                f'Set it to {load.num_elements + load.num_elements % 2}, or "auto".'
            )
    return found


def _buckets_alone(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any]) -> int:
    stages = (_nothing_sharded, _states_sharded, _states_sharded, _all_sharded)
    return stages[ds.zero_stage](load, ds, zero).device.buckets


def _waiting(load: RankLoad, zero: dict[str, Any], shares: Sequence[int] | None = None) -> int:
    """Return the peak number of unsharded gradient elements of a micro-batch held outside of buckets.

    There are some only without `contiguous_gradients`: then a bucket is the list of the gradients, until it is sent.
    Under ZeRO 2 those that overlap this rank's share stay; `shares` are the elements of each group's.
    """
    if zero.get("contiguous_gradients", True):
        return 0
    most = 0
    for i, group in enumerate(load.groups):
        stays = listed = foreign = largest = 0
        for start, stop in reversed(_spans(group)):  # as backward makes them
            numel = stop - start
            if listed + numel > zero["reduce_bucket_size"]:
                listed = foreign = 0
            listed += numel
            if shares is not None and _overlaps(start, stop, shares[i], load.dp_rank):
                stays += numel
            else:
                foreign += numel
            largest = max(largest, stays + foreign)
        most += largest
    return most


def _spans(group: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each parameter of a flattened group begins and ends."""
    return list(pairwise(accumulate(group, initial=0)))


def _overlaps(start: int, stop: int, share: int, dp_rank: int) -> bool:
    return start < share * (dp_rank + 1) and stop > share * dp_rank


def verdict(load: RankLoad, ds: DeepSpeedConfig, zero: dict[str, Any], alone: RankLoad) -> str:
    """Return what the strategy saves of a rank's memory, as a sentence.

    Args:
        load: of the rank that needs most.
        alone: of a rank with the whole network; the same as `load` without a pipeline.
    """
    unsharded = replace(ds, parallelism=replace(ds.parallelism, zero_stage=0, offload=OffloadSpec()))
    plain = load._replace(activations=load.activations_plain, activations_host=0)
    of_stage = predict(plain, unsharded, {}).combined.total
    base = of_stage if ds.stages == 1 else predict(alone, unsharded, {}).combined.total
    unit, divisor, digits = ("GiB", 2**30, 2) if base >= 2**30 else ("MiB", 2**20, 0)

    def amount(size: int) -> str:
        return f"{size / divisor:.{digits}f}"

    def effect(what: str, gain: int) -> str:
        return f"{what} {'saves' if gain >= 0 else 'adds'} {amount(abs(gain))}"

    hint = ""
    effects = [effect("the pipeline", base - of_stage)] if ds.stages > 1 else []
    if ds.zero_stage:
        saved = of_stage - predict(plain, ds, zero).combined.total
        if load.dp_size == 1 and saved < 0:
            hint = f". {_nothing_to_shard(ds, f'{amount(-saved)} {unit}')}"
        else:
            effects.append(effect(f"ZeRO {ds.zero_stage}", saved))
    if load.activations != load.activations_plain:
        kept = load.activations + load.activations_host
        effects.append(effect("recompute", load.activations_plain - kept))
    else:
        effects.append(f"recompute would save {amount(load.activations_plain - load.activations_least)}")
    estimate = predict(load, ds, zero)
    if estimate.host.total:
        effects.append(f"offload moves {amount(estimate.host.total)} to the host")
    whose = "the rank that needs most" if ds.stages > 1 else "a rank"
    total = amount(estimate.combined.total)
    return f"memory: {total} {unit} on {whose}, {amount(base)} without all this: {', '.join(effects)}{hint}"


def _nothing_to_shard(ds: DeepSpeedConfig, added: str) -> str:
    """Return what a ZeRO stage costs where no other rank holds the same weights, and what to use instead."""
    stage = ds.zero_stage
    cost = f"ZeRO {stage} has nothing to shard on one data-parallel rank, and its buffers take {added}"
    if any(ds.parallelism.offload.devices):
        return f"{cost}: here its offload alone can pay"
    if ds.precision.params != "fp32":
        return f'{cost}: take torch_autocast at "stage": 0 as in ds_configs/zero0.json, or more ranks'
    return f'{cost}: set "stage": 0 in zero_optimization, or start more ranks'


def shortage(estimates: Sequence[MemoryEstimate], device_bytes: int | None, host_bytes: int) -> str:
    """Return a warning if the ranks of a machine are expected to need more memory than it has, or nothing.

    Args:
        estimates: of those ranks.
        device_bytes: memory of a rank's device; None: ranks compute on the host.
    """
    on_host = [one.combined.total if device_bytes is None else one.host.total for one in estimates]
    needs = [("the machine", sum(on_host), host_bytes)]
    if device_bytes is not None:
        needs.append(("a rank's device", max(one.device.total for one in estimates), device_bytes))
    short = [
        f"{needed / 2**30:.2f} GiB of {where}, which has {there / 2**30:.2f}"
        for where, needed, there in needs
        if needed > there
    ]
    if not short:
        return ""
    remedy = "`dsyolo plan` shows what fits, and --deepspeed_config auto takes it"
    return f"this run is expected to need {' and '.join(short)}, and may run out of memory. {remedy}."


def table(rows: Iterable[tuple[str, MemoryTerms]]) -> str:
    """Return a line for each (title, terms), in MiB."""
    cells: list[tuple[str, ...]] = [("memory, MiB", *MemoryTerms._fields, "total")]
    cells += [(title, *(f"{size / 2**20:.1f}" for size in (*terms, terms.total))) for title, terms in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]  # fits 80 columns for one stage
    lines = [
        " ".join([title.ljust(widths[0]), *map(str.rjust, sizes, widths[1:])]) for title, *sizes in cells
    ]
    return "\n".join(lines)
