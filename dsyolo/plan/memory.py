"""The peak of a GPU, term by term, at the moment of a step that needs most."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dsyolo.account import Account, Load, predict
from dsyolo.ds_config import DsConfig
from dsyolo.errors import UserError
from dsyolo.model.activations import ActivationPlan, choose
from dsyolo.model.costs import NodeCost
from dsyolo.model.cuts import ACCELERATOR, balanced_cuts
from dsyolo.model.moments import Moments
from dsyolo.plan.counts import CAPACITY, FOLLOWED, Counts, Groups

# cuBLAS asks torch's allocator for a workspace: 32 MiB on Hopper, 8 before. cuDNN's and fragmentation are not known
# on paper: see the errors against published peaks in README.md, "Plan".
WORKSPACE_BYTES = 32 * 2**20
TARGET_BYTES = 8 + 16 + 8 + 4  # of a match: cell, box, class, weight
MANY_REPLICAS = 16  # beyond, of the shares of ZeRO so many are looked at


class Peak(NamedTuple):
    """Of the GPU that needs most. `device` and `host` in bytes, by term."""

    device: dict[str, int]
    host: dict[str, int]
    at_start: Account  # what a run prints at its start, of the same rank

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


class Ledger:
    """Peaks of a model's strategies; keeps what several of them share.

    Args:
        counts: of the model.
    """

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.of_batch = lru_cache(None)(counts.of_batch)
        self.costs = lru_cache(None)(self._costs)
        self.bounds = lru_cache(None)(self._bounds)
        self._groups = lru_cache(None)(counts.groups)
        self._passing = lru_cache(None)(self._passing_bytes)
        self._stage_kept = lru_cache(None)(self._kept_by_stage)

    def _costs(self, micro_batch: int) -> list[NodeCost]:
        """Of a micro-batch, by node."""
        return [cost_of(one, two, micro_batch) for one, two in zip(*self.counts.costs, strict=True)]

    def plan(self, ds: DsConfig) -> ActivationPlan | None:
        """What is recomputed; None where no choice keeps its budget."""
        try:
            counted = self.of_batch(ds.precision, ds.micro_batch)
            return choose(counted, ds.recompute, offload=ds.offload_activations)
        except UserError:
            return None

    def peak(self, ds: DsConfig, zero: dict[str, Any], plan: ActivationPlan) -> Peak:
        """Of the rank that needs most, with gradients and buckets as DeepSpeed holds them."""
        bounds = self.bounds(ds.stages, ds.micro_batch)
        stages = range(ds.stages)
        peaks = [
            self._peak_of_stage(ds, zero, plan, stage, bounds[stage], bounds[stage + 1]) for stage in stages
        ]
        return max(peaks, key=lambda peak: peak.total)

    def _peak_of_stage(
        self, ds: DsConfig, zero: dict[str, Any], plan: ActivationPlan, stage: int, start: int, stop: int
    ) -> Peak:
        kept, kept_on_host = self._activations(ds, plan, stage, start, stop)
        groups = self._groups(start, stop)
        account = max(
            (
                predict(Load(groups, kept, kept, kept, replica, replicas, True, kept_on_host), ds, zero)
                for replica, replicas in _shares(ds)
            ),
            key=lambda one: one.device.total,
        )
        held = {**account.device._asdict(), "passing": 0, "images": 0, "workspace": WORKSPACE_BYTES}
        if stage in (0, ds.stages - 1):
            held["images"] = self._images(ds)
        moments = [
            {**held, **self._in_passes(ds, plan, account)},
            {**held, "activations": 0, "passing": self._in_step(ds, groups)},
        ]
        if ds.zero_stage == 0:  # its bucket comes when the activations are gone
            moments[0]["buckets"] = moments[1]["buckets"] = 0
            moments.append({**held, "activations": 0})
        most = max(moments, key=lambda terms: sum(terms.values()))
        return Peak(most, account.host._asdict(), account)

    def _activations(
        self, ds: DsConfig, plan: ActivationPlan, stage: int, start: int, stop: int
    ) -> tuple[int, int]:
        in_flight = min(ds.stages - stage, ds.accumulation)
        key = (ds.precision, ds.micro_batch, ds.offload_activations, plan.recomputed, start, stop, in_flight)
        return self._stage_kept(*key)

    def _kept_by_stage(
        self,
        precision: str,
        micro_batch: int,
        offload: bool,
        recomputed: frozenset[str],
        start: int,
        stop: int,
        in_flight: int,
    ) -> tuple[int, int]:
        plan = ActivationPlan(self.of_batch(precision, micro_batch), recomputed, offload)
        nodes = self.counts.network.order[start:stop]
        return plan.stage_bytes(nodes, in_flight), plan.host_bytes(nodes, in_flight)

    def _in_passes(self, ds: DsConfig, plan: ActivationPlan, account: Account) -> dict[str, int]:
        """At the moment of a forward or backward pass when most lives."""
        kept, gradients = account.device.activations, account.device.gradients
        moments = self._moments(ds, plan)
        if moments is None:
            level = "none" if not plan.recomputed else "blocks" if ds.recompute == "blocks" else "some"
            return {"passing": self._passing(ds.precision, ds.micro_batch, level)}
        live = moments.live(ds.micro_batch)
        # With accumulation the sums of the micro-batches before are there from the beginning.
        made = gradients * moments.gradients if ds.accumulation == 1 else np.full(live.shape, gradients)
        i = int((live + made).argmax())
        kept = min(kept, int(live[i]))
        return {"activations": kept, "passing": int(live[i]) - kept, "gradients": int(made[i])}

    def _moments(self, ds: DsConfig, plan: ActivationPlan) -> Moments | None:
        """Those that were followed for just this, if any."""
        if ds.stages > 1 or plan.offload or not ds.precision.startswith("autocast"):
            return None
        if not plan.recomputed:
            return self.counts.plain
        return self.counts.recomputed if plan.recomputed == plan.counted.blocks else None

    def _passing_bytes(self, precision: str, micro_batch: int, level: str) -> int:
        """What lives beside saved activations, where just this was not followed: a model.

        In weights of two bytes it is what it is in autocast, and in fp32 twice that.
        """
        counted = self.of_batch(FOLLOWED, micro_batch)
        plain, recomputed = (
            max(0, int(moments.live(micro_batch).max()) - counted.peak_bytes(names))
            for moments, names in (
                (self.counts.plain, frozenset[str]()),
                (self.counts.recomputed, counted.blocks),
            )
        )
        most = {"none": plain, "blocks": recomputed, "some": max(plain, recomputed)}[level]
        return most * (2 if precision == "fp32" else 1)

    def _in_step(self, ds: DsConfig, groups: Groups) -> int:
        """The optimizer's step makes a copy of the gradients that it takes."""
        elements = sum(map(sum, groups))
        return 4 * (elements if ds.zero_stage == 0 else -(-elements // ds.data_parallel_size))

    def _images(self, ds: DsConfig) -> int:
        side = self.counts.image_size_px
        return 3 * side * side * ds.micro_batch + len(self.counts.network.strides) * CAPACITY * TARGET_BYTES

    def _bounds(self, stages: int, micro_batch: int) -> list[int]:
        costs = self.costs(micro_batch)
        return [0, *balanced_cuts(costs, stages, ACCELERATOR), len(costs)]


def cost_of(one: NodeCost, two: NodeCost, micro_batch: int) -> NodeCost:
    """A node's cost at a micro-batch, from those at 1 and at 2: it is linear."""
    flops, elements = (
        first + (second - first) * (micro_batch - 1)
        for first, second in ((one.flops, two.flops), (one.elements, two.elements))
    )
    carry = tuple((micro_batch, *shape[1:]) for shape in one.carry)
    return NodeCost(one.name, one.num_parameters, flops, elements, carry)


def _shares(ds: DsConfig) -> list[tuple[int, int]]:
    """(replica, replicas) to look at: under ZeRO 2 some keep more whole gradients at their borders."""
    num = ds.data_parallel_size
    if ds.zero_stage != 2:
        return [(0, num)]
    return [(replica, num) for replica in sorted({i * num // MANY_REPLICAS for i in range(MANY_REPLICAS)})]


def spans(bounds: list[int]) -> list[tuple[int, int]]:
    """(first node, one beyond the last) of each stage."""
    return list(pairwise(bounds))
