"""A step of the engine that trains, as one of thousands of ranks: what it holds and sends, beside what is expected.

    python benchmarks/dry_run.py --model yolov5n --ranks 8,4096

torch's fake process group sends nothing and leaves tensors as they are, so results mean nothing, but the sizes of tensors
and messages are right.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsyolo.base.batch import Batch
from dsyolo.config.deepspeed.config import check
from dsyolo.detection.assigner import Assigner
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine.comm_timer import CommTimer
from dsyolo.engine.ema import Ema
from dsyolo.engine.memory_profile import Probe
from dsyolo.engine.optimizer import Schedule
from dsyolo.engine.parallelize import parallelize
from dsyolo.engine.process_group import join_store
from dsyolo.engine.step_timer import HostClock, StepTimer
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.yolov5 import VARIANTS, build_yolov5
from dsyolo.planner.comm_volume import comm_bytes
from dsyolo.planner.memory_estimate import RankLoad, predict

NUM_CLASSES = 80
SIZE_PX, IMAGES = 128, 2  # of a micro-batch: states and what is sent do not depend on them
SGD = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.937, "nesterov": True}}


class DryRunCase(NamedTuple):
    """One rank of a training. It is 0 under ZeRO 3, whose ranks compare themselves with rank 0, which nobody sends."""

    model: str
    zero_stage: int
    ranks: int
    rank: int


class DryRunResult(NamedTuple):
    """Bytes of one rank: parameters, gradients, optimizer and EMA; buckets; what it sends in a step of one micro-batch.

    `..._expected`: as the memory estimate and the plan have it.
    """

    states: int
    states_expected: int
    buckets: int
    buckets_expected: int
    sent: int
    sent_expected: int


def dry_run_case(model: str, zero_stage: int, ranks: int) -> DryRunCase:
    """Return the case of a rank in the middle, where ZeRO 2 has a share with borders at both ends."""
    return DryRunCase(model, zero_stage, ranks, ranks // 2 if zero_stage in (1, 2) else 0)


def dry_run(cases: Sequence[DryRunCase], processes: int = 2) -> list[DryRunResult]:
    """Run each case in a process of its own, `processes` at a time: a process cannot be a rank of two worlds."""
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
        return pool.map(_run, cases, chunksize=1)


def _run(case: DryRunCase) -> DryRunResult:
    torch.set_num_threads(1)
    world = join_store("fake", FakeStore(), case.rank, case.ranks)
    source = {
        "train_micro_batch_size_per_gpu": IMAGES,
        "zero_optimization": {"stage": case.zero_stage},
        "optimizer": SGD,
    }
    ds = check(source, world_size=case.ranks, accelerator="cpu")
    network = build_yolov5(case.model, NUM_CLASSES)
    batch = one_batch(network, IMAGES, SIZE_PX)
    loss = DetectionLoss(network.anchors, NUM_CLASSES, SIZE_PX)
    schedule = Schedule(10, 1, 0.01, 0.1, "linear", 0.9, 0.0, 0.1, 0.8, is_adam=False)
    numels = [parameter.numel() for parameter in network.parameters()]  # ZeRO 3 takes them apart
    engine, partitions, _, groups, _ = parallelize(
        network, loss, schedule, ds, world, image_size_px=SIZE_PX, statistics_move=True
    )
    ema = Ema(partitions, engine.buffers, 0.999, 100)
    phases = StepTimer(HostClock())
    collectives = CommTimer(phases)
    engine.train_step([batch], 0)  # makes the optimizer's states
    probe = Probe(engine, partitions, ema)
    for batches in phases.steps(iter([[batch]]), 1):
        with probe.looking():
            engine.train_step(batches, 1)
    collectives.close()
    held = probe.result().terms.combined
    zero = engine.deepspeed_json["zero_optimization"]
    load = RankLoad(groups, 0, 0, 0, engine.dp_rank, engine.dp_size, True)
    expected = predict(load, ds, zero).combined
    return DryRunResult(
        held.states,
        expected.states,
        held.buckets,
        expected.buckets,
        int(sent_bytes(collectives.sizes, case.ranks)),
        int(comm_bytes(zero, numels, case.ranks, 1)),
    )


def sent_bytes(sizes: Mapping[str, int], ranks: int) -> float:
    """Return the bytes that one of N ranks sent, if every collective was a ring (Patarasu and Yuan 2009).

    An all-reduce sends 2 (N - 1) / N of its tensor; a gather, scatter, or reduction to one rank half of that.
    """
    ring = (ranks - 1) / ranks
    return ring * sum((2 if name == "all_reduce" else 1) * size for name, size in sizes.items())


def one_batch(network: DetectionNetwork, images: int, size_px: int) -> Batch:
    """Return noise (images, 3, size_px, size_px) with a box in each image: as much work as real images."""
    anchors_px = network.anchors * torch.tensor(network.strides).view(-1, 1, 1)
    assign = Assigner(anchors_px.numpy(), network.strides, 4.0)
    boxes = np.full((images, 4), size_px / 4, np.float32)
    owners = np.arange(images)
    targets = assign(owners, np.zeros_like(owners), boxes, images, (size_px, size_px))
    return Batch(torch.randint(0, 256, (images, 3, size_px, size_px), dtype=torch.uint8), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take a step as one of many ranks.")
    parser.add_argument("--model", default="yolov5n", choices=VARIANTS)
    parser.add_argument("--ranks", default="8,64,512,4096", metavar="N,N", help="numbers of ranks")
    args = parser.parse_args()
    cases = [dry_run_case(args.model, stage, int(n)) for n in args.ranks.split(",") for stage in range(4)]
    print("ranks  ZeRO  of rank  states MiB  expected  buckets MiB  expected  MB sent  expected")
    for case, found in zip(cases, dry_run(cases), strict=True):
        print(
            f"{case.ranks:5d}  {case.zero_stage:4d}  {case.rank:7d}  {found.states / 2**20:10.1f}  "
            f"{found.states_expected / 2**20:8.1f}  {found.buckets / 2**20:11.1f}  {found.buckets_expected / 2**20:8.1f}  "
            f"{found.sent / 1e6:7.1f}  {found.sent_expected / 1e6:8.1f}"
        )


if __name__ == "__main__":
    main()
