"""Bytes on the wire per training step between two hosts, beside the ZeRO paper's formulas. As root:

    PYTHONPATH=tests python benchmarks/traffic.py [--model yolov5s] [--hosts 2] [--steps 6] [--accumulation 1]

The hosts are a cluster in a box (tests/cluster.py), of one rank each, started by the deepspeed launcher over pdsh and ssh.
A rank reads its host's counters (/proc/net/dev) between steps: no start, validation or checkpoint is in the figures, but
headers, and what a step sends beside gradients: losses, counts of targets, averaged BatchNorm statistics, heartbeats.

For G bytes of gradients on N ranks, each way and rank, with one micro-batch a step: ZeRO 0 to 2 2 (N - 1) / N G, of which
ZeRO 1 and 2 send half as gradients to their owners and half as new weights; ZeRO 3 1.5 times that, as it gathers weights
for forward and backward. With A micro-batches ZeRO 0 and 1 send the same, ZeRO 2 gradients A times, and ZeRO 3 all A times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from dry_run import one_batch
from hosts import Cluster, Traffic, read_traffic

from dsyolo.cluster import collectives
from dsyolo.cluster.preemption import PreemptionHandler
from dsyolo.cluster.watchdog import Watchdog
from dsyolo.cluster.world import World
from dsyolo.config.deepspeed.config import check
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine import process_group
from dsyolo.engine.ema import Ema
from dsyolo.engine.optimizer import Schedule
from dsyolo.engine.parallelize import parallelize
from dsyolo.models.yolov5 import VARIANTS, build_yolov5
from dsyolo.planner.comm_volume import comm_bytes

NUM_CLASSES, SIZE_PX, IMAGES = 80, 64, 2  # images of a rank: small ones, gradients are as large for them
SCHEDULE = Schedule(10**6, 1, 0.01, 0.1, "linear", 0.9, 0.0, 0.1, 0.8, is_adam=False)
LINE = "traffic of rank"


def formula(stage: int, gradient_bytes: int, ranks: int, accumulation: int = 1) -> float:
    """Bytes that a rank sends in a step, and receives."""
    times = {0: 2, 1: 2, 2: 1 + accumulation, 3: 3 * accumulation}[stage]
    return times * (ranks - 1) / ranks * gradient_bytes


def planned(stage: int, args: argparse.Namespace) -> float:
    """The same, as `dsyolo plan` has it."""
    numels = [p.numel() for p in build_yolov5(args.model, NUM_CLASSES).parameters()]
    ds = check(
        {"train_batch_size": args.hosts, "zero_optimization": {"stage": stage}},
        world_size=args.hosts,
        accelerator="cpu",
    )
    zero = ds.deepspeed_json(sum(numels), cpu=True)["zero_optimization"]
    return comm_bytes(zero, numels, args.hosts, args.accumulation)


def measure(stage: int, args: argparse.Namespace, world: World) -> Traffic:
    """Return the bytes of this host in `args.steps` steps, on a rank of it."""
    source = {
        "train_micro_batch_size_per_gpu": IMAGES,
        "gradient_accumulation_steps": args.accumulation,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    }
    ds = check(source, world_size=world.size, accelerator="cpu")
    network = build_yolov5(args.model, NUM_CLASSES)
    batch = one_batch(network, IMAGES, SIZE_PX)
    loss = DetectionLoss(network.anchors, NUM_CLASSES, SIZE_PX)
    engine, partitions, *_ = parallelize(
        network, loss, SCHEDULE, ds, world, image_size_px=SIZE_PX, statistics_move=True
    )
    ema, request = Ema(partitions, engine.buffers, 0.999, 100), PreemptionHandler(world)

    def step(number: int) -> None:
        engine.train_step([batch] * args.accumulation, number)
        ema.update()
        request.raise_if_requested()

    for number in range(2):  # the first ones trace and link what later ones use
        step(number)
    collectives.barrier()
    before = read_traffic()
    for number in range(args.steps):
        step(2 + number)
    collectives.barrier()
    after = read_traffic()
    request.close()
    collectives.barrier()
    return Traffic(after.sent - before.sent, after.received - before.received)


def on_a_rank(args: argparse.Namespace) -> None:
    """Prints what each stage sent and received, as JSON on a line of its own."""
    torch.set_num_threads(1)
    world = process_group.init_process_group()
    watch = Watchdog(world, late_s=600)
    found = {stage: measure(stage, args, world) for stage in args.stages}
    watch.close()
    print(f"{LINE} {world.rank}: {json.dumps(found)}", flush=True)
    process_group.destroy_process_group()


def across(cluster: Cluster, *words: str, place: Path) -> dict[int, list[Traffic]]:
    """Runs this file with `words` on all hosts; by stage the traffic of each host in its steps."""
    command = [*cluster.deepspeed(), str(Path(__file__).resolve()), "--on_a_rank", *words]
    finds = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # ranks import what this process does
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = cluster.popen(command, env=finds, cwd=place, **streams)
    said = process.communicate(timeout=600)[0]
    ranks: dict[int, dict[str, Any]] = {}
    for line in said.splitlines():
        if LINE in line:
            rank, _, found = line.partition(LINE)[2].partition(":")
            ranks[int(rank)] = json.loads(found)
    if process.returncode or len(ranks) != len(cluster.names):
        raise RuntimeError(said)
    stages = [int(stage) for stage in ranks[0]]
    return {stage: [Traffic(*ranks[rank][str(stage)]) for rank in sorted(ranks)] for stage in stages}


def gradient_bytes(model: str) -> int:
    return 4 * sum(p.numel() for p in build_yolov5(model, NUM_CLASSES).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=VARIANTS, default="yolov5s")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--on_a_rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_a_rank:
        return on_a_rank(args)
    words = ["--model", args.model, "--steps", args.steps, "--accumulation", args.accumulation]
    words += ["--stages", *args.stages]
    with Cluster(args.hosts) as cluster:
        found = across(cluster, *map(str, words), place=cluster.folder)
    size = gradient_bytes(args.model)
    print(
        f"{args.model}, {args.hosts} hosts of one rank, {args.accumulation} micro-batches, "
        f"{size / 1e6:.2f} MB of gradients; MB per step and host\n"
    )
    print(
        "| | formula | planned | sent, least and most | received, least and most | off the formula | off the plan |"
    )
    print("|---|---|---|---|---|---|---|")
    for stage, hosts in found.items():
        wanted = planned(stage, args)
        expected = formula(stage, size, args.hosts, args.accumulation)
        sent, received = ([number / args.steps for number in way] for way in zip(*hosts, strict=True))
        off = [max((number / of - 1 for number in (*sent, *received)), key=abs) for of in (expected, wanted)]
        ways = " | ".join(f"{min(way) / 1e6:.2f} to {max(way) / 1e6:.2f}" for way in (sent, received))
        offs = " | ".join(f"{one:+.1%}" for one in off)
        print(f"| ZeRO {stage} | {expected / 1e6:.2f} | {wanted / 1e6:.2f} | {ways} | {offs} |")
    return None


if __name__ == "__main__":
    sys.exit(main())
