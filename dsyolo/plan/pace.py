"""How long a step takes: a model, from counted work and bytes and the stated figures of the hardware.

Nothing overlaps in it, so real steps are rather faster; strategies are compared on one scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dsyolo.ds_config import DsConfig
from dsyolo.model.activations import ActivationPlan
from dsyolo.model.cuts import crossing_elements
from dsyolo.plan.hardware import COMPUTE_SHARE, LINK_SHARE, MEMORY_SHARE, START_S, Hardware
from dsyolo.plan.memory import Ledger, Peak, spans
from dsyolo.wire import Wire, step_bytes

BACKWARD = 2  # times the forward pass: gradients of inputs and of weights
HOST_STEP_GB_S = 20.0  # of host memory that an optimizer on the CPU moves, assumed
HOST_STEP_BYTES = 20  # per element there: gradient, weight and momentum read, weight and momentum written


class Pace(NamedTuple):
    """Seconds of a step."""

    compute: float
    communication: float
    bubble: float  # of a pipeline: waiting for its first and last micro-batches
    host: float  # transfers to host memory and the optimizer's step there

    @property
    def step(self) -> float:
        return sum(self)


def pace(
    ledger: Ledger, ds: DsConfig, plan: ActivationPlan, peak: Peak, wire: Wire, hardware: Hardware
) -> Pace:
    """Of the slowest stage, which sets the pace."""
    bounds = ledger.bounds(ds.stages, ds.micro_batch)
    micro = max(_micro_batch_s(ledger, ds, plan, hardware, *span) for span in spans(bounds))
    link = hardware.device.link_gb_s if hardware.nodes == 1 else hardware.node_gb_s
    communication = wire.total / (link * 1e9 * LINK_SHARE)
    return Pace(
        micro * ds.accumulation, communication, micro * (ds.stages - 1), _host_s(ledger, ds, peak, hardware)
    )


def wire_of(ledger: Ledger, ds: DsConfig, zero: dict[str, Any]) -> Wire:
    """Bytes that a rank sends in a step; of a pipeline, a rank of the stage that sends most."""
    counts = ledger.counts
    if ds.stages == 1:
        return step_bytes(counts.modules, ds, zero, num_statistics=counts.num_statistics)
    costs, bounds = ledger.costs(ds.micro_batch), ledger.bounds(ds.stages, ds.micro_batch)
    wires = []
    for start, stop in spans(bounds):
        modules = tuple((cost.num_parameters,) for cost in costs[start:stop])
        borders = sum(crossing_elements(costs, cut) for cut in (start, stop) if 0 < cut < len(costs))
        share = counts.num_statistics * (stop - start) // len(costs)
        wires.append(step_bytes(modules, ds, zero, num_statistics=share, border_elements=borders))
    return max(wires, key=lambda wire: wire.total)


def _micro_batch_s(
    ledger: Ledger, ds: DsConfig, plan: ActivationPlan, hardware: Hardware, start: int, stop: int
) -> float:
    """Forward and backward of a stage."""
    costs = ledger.costs(ds.micro_batch)
    device, is_whole = hardware.device, ds.precision == "fp32"
    flops_s = (device.fp32_tflops if is_whole else device.half_tflops) * 1e12 * COMPUTE_SHARE
    bytes_s = device.memory_gb_s * 1e9 * MEMORY_SHARE
    seconds = 0.0
    for cost in costs[start:stop]:
        times = 1 + BACKWARD + (cost.name in plan.recomputed)
        seconds += times * (cost.flops / flops_s + cost.elements * (4 if is_whole else 2) / bytes_s)
    share = (stop - start) / len(costs)
    starts = len(ledger.counts.plain.fixed) * (1 + bool(plan.recomputed) / 3)
    return max(seconds, starts * share * START_S)


def _host_s(ledger: Ledger, ds: DsConfig, peak: Peak, hardware: Hardware) -> float:
    """What offload adds."""
    link = hardware.device.host_gb_s * 1e9
    moved, stepped = 0, 0
    if ds.offload_optimizer:
        share = ledger.counts.num_parameters // ds.data_parallel_size
        stepped = share * HOST_STEP_BYTES
        moved += 2 * 4 * share  # gradients there, weights back
    if ds.offload_param:
        moved += 2 * peak.host["parameters"] * ds.accumulation
    moved += 2 * peak.host["activations"] * ds.accumulation
    return moved / link + stepped / (HOST_STEP_GB_S * 1e9)
