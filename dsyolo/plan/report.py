"""The plan in words and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsyolo.plan.counts import Counts
from dsyolo.plan.hardware import CONTEXT_GIB, GIB, Hardware
from dsyolo.plan.judge import Judged, best_of_families, why_it_loses

MOST_ROWS = 14
HONEST = (
    "Exact, counted: weights, gradients, optimizer, EMA, buckets, images, saved activations (tensors and dtypes of the",
    "graph), bytes on the wire. Followed on paper: what passes in forward, loss and backward, in a CPU's kernels. Assumed:",
    f"32 MiB of workspace, {CONTEXT_GIB:g} GiB for CUDA outside of torch; of time, shares of the data sheet (40 % of the FLOP/s,",
    "70 % of the bandwidths), nothing overlapping. Against published peaks of YOLOv5 (16 images, fp16 autocast): README, Plan.",
)


def explain(counts: Counts, hardware: Hardware, found: Sequence[Judged], best: Judged | None) -> str:
    """Everything that `dsyolo plan` prints without --json."""
    batch = found[0].strategy.ds.global_batch if found else 0
    lines = [
        f"{counts.model}, {counts.num_parameters:,} parameters, {counts.image_size_px} px, {batch} images a step",
        hardware.describe(),
        *HONEST,
        "",
    ]
    if best is None:
        return "\n".join([*lines, *_nothing_fits(found, counts, hardware)])
    rows = best_of_families(found, MOST_ROWS)
    if best not in rows:
        rows = [best, *[one for one in rows if one.family != best.family]]
    rows.sort(key=lambda one: (one is not best, not one.fits, one.pace.step))
    return "\n".join([*lines, *_table(rows, best), "", *_recommend(best, counts, hardware), *_terms(best)])


def _table(rows: Sequence[Judged], best: Judged) -> list[str]:
    head = f"{'':2}{'strategy':52} {'precision':13} {'batch':>9} {'GiB':>7} {'fits':4} {'step s':>7} {'MB sent':>8}  why not"
    lines = [head]
    for one in rows:
        ds = one.strategy.ds
        why = "recommended" if one is best else why_it_loses(one, best)
        lines.append(
            f"{'->' if one is best else '  '}{one.strategy.in_words():52} {ds.precision:13} "
            f"{f'{ds.micro_batch} x {ds.accumulation}':>9} {one.peak.total / GIB:7.2f} {'yes' if one.fits else 'no':4} "
            f"{one.pace.step:7.3f} {one.wire.total / 1e6:8.1f}  {why}"
        )
    return lines


def _recommend(best: Judged, counts: Counts, hardware: Hardware) -> list[str]:
    ds = best.strategy.ds
    speed = ds.global_batch / best.pace.step
    parts = [f"compute {best.pace.compute:.3f}", f"traffic {best.pace.communication:.3f}"]
    parts += [f"bubble {best.pace.bubble:.3f}"] if ds.stages > 1 else []
    parts += [f"host {best.pace.host:.3f}"] if best.pace.host else []
    host = f" and {best.peak.host_total / GIB:.2f} GiB of host memory a rank" if best.peak.host_total else ""
    return [
        f"Take {best.strategy.in_words()}, {ds.precision}, {ds.micro_batch} per GPU x {ds.accumulation} accumulation: "
        f"{best.peak.total / GIB:.2f} of {hardware.memory_gib:g} GiB{host},",
        f"{best.pace.step:.3f} s a step ({', '.join(parts)}), about {speed:,.0f} images/s. It is the plainest of those that are "
        "at most 5 % slower than the fastest that fits.",
    ]


def _terms(one: Judged) -> list[str]:
    terms = ", ".join(f"{name} {size / GIB:.2f}" for name, size in one.peak.device.items() if size)
    return [f"GiB at its peak: {terms}."]


def _nothing_fits(found: Sequence[Judged], counts: Counts, hardware: Hardware) -> list[str]:
    """The nearest, and what would fit."""
    nearest = max(found, key=lambda one: one.room)
    ds = nearest.strategy.ds
    lines = [
        f"Nothing fits. Nearest: {nearest.strategy.in_words()}, {ds.precision}, {ds.micro_batch} x {ds.accumulation}: "
        f"{nearest.peak.total / GIB:.2f} GiB and {CONTEXT_GIB:g} for CUDA, of {hardware.memory_gib:g}.",
        *_terms(nearest),
        f"GPUs of {math.ceil(nearest.peak.total / GIB + CONTEXT_GIB)} GiB would do.",
    ]
    size = _size_that_fits(nearest, counts)
    lines.append(
        f"So would about --imgsz {size}: what grows with the images' area is then small enough."
        if size
        else "A smaller --imgsz does not help: weights and their states alone are too large. More GPUs share these under ZeRO."
    )
    return lines


def _size_that_fits(nearest: Judged, counts: Counts) -> int | None:
    """The largest side in pixels at which the terms that grow with the area leave room, None where none does."""
    grows = sum(nearest.peak.device[name] for name in ("activations", "passing", "images"))
    room = grows + nearest.room
    stride = counts.network.strides[-1]
    if room <= 0:
        return None
    side = int(counts.image_size_px * math.sqrt(room / grows) // stride * stride)
    return side if side >= 2 * stride else None
