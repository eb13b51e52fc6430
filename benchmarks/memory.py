"""Bytes of model states on each rank, measured in a step of training, beside the ZeRO paper's formulas.

    PYTHONPATH=tests python benchmarks/memory.py --model yolov5m --imgsz 640 --batch 4 --ranks 4

Ranks are gloo processes of one thread on this machine; each has `batch` / `ranks` images. Weights and sums of gradients
are fp32 (with --bf16 of two bytes), the optimizer is SGD with momentum. Formulas, for P parameters of w bytes on N ranks:
ZeRO 1  w P + w P + (4 + 4 + 4) P / N: weights, gradients; fp32 masters, momentum, average of the weights
ZeRO 2  w P + (w + 4 + 4 + 4) P / N
ZeRO 3  (w + w + 4 + 4 + 4) P / N
ZeRO 0  w P + w P + 4 P + 4 P / N: no masters; momentum; the average
"""

from __future__ import annotations

import argparse
from typing import Any

from dry_run import one_batch
from ranks import run_ranks

from dsyolo.config.deepspeed.config import check
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine import process_group
from dsyolo.engine.ema import Ema
from dsyolo.engine.memory_profile import MemoryProfiler
from dsyolo.engine.optimizer import Schedule
from dsyolo.engine.parallelize import parallelize
from dsyolo.models.yolov5 import VARIANTS, build_yolov5
from dsyolo.planner.memory_estimate import RankLoad, predict, table

NUM_CLASSES = 80
SCHEDULE = Schedule(10, 1, 0.01, 0.1, "linear", 0.9, 0.0, 0.1, 0.8, is_adam=False)


def measure(stage: int, args: argparse.Namespace) -> tuple[Any, Any, int]:
    """(predicted, measured, parameters) of this rank."""
    world = process_group.init_process_group()
    source = {
        "train_batch_size": args.batch,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD"},
        **({"bf16": {"enabled": True}} if args.bf16 and stage else {}),
    }
    ds = check(source, world_size=world.size, accelerator="cpu")
    network = build_yolov5(args.model, NUM_CLASSES)
    num_parameters = sum(p.numel() for p in network.parameters())
    loss = DetectionLoss(network.anchors, NUM_CLASSES, args.imgsz)
    batch = one_batch(network, ds.micro_batch, args.imgsz)
    engine, partitions, _, groups, _ = parallelize(
        network, loss, SCHEDULE, ds, world, image_size_px=args.imgsz, statistics_move=True
    )
    ema = Ema(partitions, engine.buffers, 0.999, 100)
    found: list = []
    watch = MemoryProfiler(engine, partitions, ema, found.append)
    for step in range(2):
        with watch.step():
            engine.train_step([batch], step)
        ema.update()
    load = RankLoad(groups, 0, 0, 0, engine.dp_rank, engine.dp_size, True)
    wanted = predict(load, ds, engine.deepspeed_json["zero_optimization"])
    return wanted, found[0][world.rank], num_parameters


def formula(stage: int, num_parameters: int, ranks: int, weight_bytes: int) -> float:
    """Bytes of a rank, as above."""
    p, w = num_parameters, weight_bytes
    whole = {0: (w + w + 4) * p, 1: (w + w) * p, 2: w * p, 3: 0}[stage]
    shared = {0: 4, 1: 12, 2: w + 12, 3: w + w + 12}[stage] * p
    return whole + shared / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=VARIANTS, default="yolov5m")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="weights of two bytes, from ZeRO 1 on")
    args = parser.parse_args()
    for stage in range(4):
        results = run_ranks(args.ranks, measure, stage, args, timeout_s=900)
        print(f"\nZeRO {stage}, {args.model}, ranks: {args.ranks}")
        print(table((f"rank {i}", found.terms.combined) for i, (_, found, _) in enumerate(results)))
        weight_bytes = 2 if args.bf16 and stage else 4
        for i, (wanted, found, num_parameters) in enumerate(results):
            expected = formula(stage, num_parameters, args.ranks, weight_bytes)
            states = found.terms.combined.states
            print(
                f"rank {i}: states {states / 2**20:.1f} MiB; formula {expected / 2**20:.1f}, {states / expected - 1:+.1%}; "
                f"predicted {wanted.combined.states / 2**20:.1f}, {states / wanted.combined.states - 1:+.2%}; "
                f"average {found.terms.combined.ema / num_parameters / 4:.3f} P"
            )


if __name__ == "__main__":
    main()
