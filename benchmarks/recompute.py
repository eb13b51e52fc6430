"""Activations and time of a training step with and without recomputed blocks, on the CPU.

    python benchmarks/recompute.py --model yolov5m --imgsz 640 --batch 4

"counted" is what `dsyolo.models.activation_memory` foretells. "measured" is the most that torch's CPU allocator gave out
at once in a forward and backward pass, beyond weights, gradients of the parameters and images, which were there
before: every allocation and release is an event of torch.profiler. It has more in it than activations: gradients
on their way back, and work space. Times are of one thread, medians over alternating rounds: of the processor (which
others on the machine disturb least), and by the clock.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from dsyolo.config import spec
from dsyolo.models.activation_memory import choose, count_activations
from dsyolo.models.network import Network
from dsyolo.models.yolov5 import VARIANTS, build_yolov5

PRECISIONS = ("fp32", "autocast_bf16")
MIB = 2**20


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """(bytes that `work` left allocated in what it returned, the most at once), of torch's CPU allocator."""
    gc.collect()  # else what others left may be collected, and counted as given back, in the midst of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del kept
    return live[-1], max(live)


def images_of(batch: int, size_px: int) -> torch.Tensor:
    """Noise, as uint8 and channels-last."""
    images = torch.randint(0, 256, (batch, 3, size_px, size_px), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def forward(network: Network, images: torch.Tensor, precision: str) -> tuple[torch.Tensor, ...]:
    """The raw maps, with what autograd saved for them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast_bf16"):
        return network(images)


def step(network: Network, images: torch.Tensor, precision: str) -> None:
    """Forward and backward with a loss that keeps next to nothing; gradients are added up."""
    sum(raw.float().mean() for raw in forward(network, images, precision)).backward()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """(of the processor, by the clock)."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def compare(options: argparse.Namespace, precision: str) -> None:
    """Prints the two rows of a precision, and their ratios."""
    network, images = build_yolov5(options.model, 80), images_of(options.batch, options.imgsz)
    counted = count_activations(network, tuple(images.shape), spec.PRECISIONS[precision])
    wanted = int(options.budget_gib * 2**30) if options.budget_gib else "blocks"
    names = (frozenset[str](), choose(counted, wanted, offload=False).checkpointed)
    step(network, images, precision)  # the gradients of the parameters are allocated here
    peaks, times = [], ([], [])

    def run(checkpointed: frozenset[str]) -> None:
        network.checkpointed = checkpointed
        step(network, images, precision)

    for checkpointed in names:
        peaks.append(allocations(partial(run, checkpointed))[1])
    for _ in range(options.rounds):
        for checkpointed, spent in zip(names, times, strict=True):
            spent.append(seconds(partial(run, checkpointed)))
    print(f"{options.model}, {options.imgsz} px, {options.batch} images, {precision}, 1 thread")
    rows = []
    for checkpointed, peak, spent in zip(names, peaks, times, strict=True):
        cpu_s, clock_s = (statistics.median(column) for column in zip(*spent, strict=True))
        rows.append((counted.peak_bytes(checkpointed), peak, cpu_s, clock_s))
        title = f"{len(checkpointed)} of {len(counted.blocks)} blocks recomputed"
        print(f"  {title:28}", row_of(rows[-1]))
    ratios = [after / before for before, after in zip(*rows, strict=True)]
    print(f"  {'ratio':28}", "  ".join(f"{ratio:>14.2f}" for ratio in ratios))


def row_of(row: Sequence[float]) -> str:
    """Counted and measured MiB, seconds of the processor and by the clock."""
    counted, peak, cpu_s, clock_s = row
    return f"{counted / MIB:>6.0f} counted  {peak / MIB:>5.0f} measured  {cpu_s:>8.2f} s CPU  {clock_s:>6.2f} s clock"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=VARIANTS, default="yolov5m")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget_gib", type=float, help="the fewest blocks that fit it, instead of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for precision in PRECISIONS:
        compare(options, precision)


if __name__ == "__main__":
    main()
