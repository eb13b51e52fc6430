"""A pipeline of two stages on two cores: its step against the bubble formula, and its cut against DeepSpeed's own.

    PYTHONPATH=tests python benchmarks/pipeline.py [--model yolov5s] [--imgsz 320] [--micro 4] [--num_micro 8] [--rounds 3]
    PYTHONPATH=tests python benchmarks/pipeline.py --nodes   # each node's time, and what the counted costs were fitted to

The formula: with stage times t (forward and backward of one micro-batch, measured alone, on one thread) a step of m
micro-batches takes sum(t) + (m - 1) max(t), GPipe's (Huang et al. 2019, arXiv:1811.06965) for stages of unequal length.
DeepSpeed's "parameters" halves the parameters, its "uniform" the number of layers.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
from ranks import run_ranks

from dsyolo.base.batch import Batch, Targets
from dsyolo.config.deepspeed.config import check
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine.optimizer import Schedule
from dsyolo.models.flops import node_costs
from dsyolo.models.pipeline_cuts import CPU, balanced_cuts
from dsyolo.models.yolov5 import build_yolov5

NUM_CLASSES, NUM_MATCHES = 80, 64
SCHEDULE = Schedule(100, 0, 0.01, 0.01, "linear", 0.937, 0.0005, 0.1, 0.8, is_adam=False)


def batch(micro: int, size_px: int) -> Batch:
    """Noise, with as many matches per level as a usual image gives."""
    images = torch.randint(0, 256, (micro, 3, size_px, size_px), dtype=torch.uint8)
    shape = (3, NUM_MATCHES * micro)
    cells = torch.randint(0, micro * 3 * (size_px // 32) ** 2, shape)
    boxes = torch.cat((torch.rand(*shape, 2), torch.rand(*shape, 2) * 4 + 1), -1)
    counts = torch.full((3,), float(shape[1])), torch.tensor(float(micro))
    classes = torch.randint(0, NUM_CLASSES, shape)
    return Batch(
        images.contiguous(memory_format=torch.channels_last),
        Targets(cells, boxes, classes, torch.ones(shape), *counts),
    )


def stage_time_s(stage: torch.nn.Module, x: torch.Tensor, rounds: int) -> float:
    """Forward and backward of one micro-batch through a stage, the fastest of `rounds`."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        out = stage(x)
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [torch.ones_like(o) for o in out])
        times.append(time.perf_counter() - begin)
    stage.zero_grad()
    return min(times)


def run_cut(cut: int, args: argparse.Namespace) -> dict[str, Any]:
    """On a rank: seconds of a step, and of this rank's stage alone."""
    from dsyolo.cluster import collectives
    from dsyolo.cluster.world import world_from_environment
    from dsyolo.engine import process_group
    from dsyolo.engine.parallelize import parallelize

    world = world_from_environment()
    if not torch.distributed.is_initialized():
        process_group.init_process_group()
    torch.manual_seed(0)
    network = build_yolov5(args.model, NUM_CLASSES)
    ds = check(
        {
            "train_micro_batch_size_per_gpu": args.micro,
            "gradient_accumulation_steps": args.num_micro,
            "zero_optimization": {"stage": 0},
            "pipeline": {"stages": 2, "partition": [cut]},
        },
        world_size=2,
        accelerator="cpu",
    )
    loss = DetectionLoss(network.anchors, NUM_CLASSES, args.imgsz)
    engine, *_ = parallelize(
        network, loss, SCHEDULE, ds, world, image_size_px=args.imgsz, statistics_move=True
    )
    batches = [batch(args.micro, args.imgsz)] * args.num_micro
    engine.train_step(batches, 1)
    steps = []
    for _ in range(args.rounds):
        collectives.barrier()
        begin = time.perf_counter()
        engine.train_step(batches, 1)
        steps.append(time.perf_counter() - begin)
    x = batches[0].images
    alone = 0.0
    for rank in range(2):  # one after the other: a stage's own time is that without the other beside it
        collectives.barrier()
        if rank == world.rank:
            if rank:
                x = torch.randn(sum(np.prod(shape) for shape in engine.network.incoming), requires_grad=True)
            alone = stage_time_s(engine.network, x, args.rounds + 1)
    collectives.barrier()
    return {"step_s": min(steps), "stage_s": alone}


def run_cuts(cuts: dict[str, int], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    os.environ["DEEPSPEED_LOG_LEVEL"] = "error"
    return {name: run_cut(cut, args) for name, cut in cuts.items()}


def compare_cuts(args: argparse.Namespace) -> None:
    network = build_yolov5(args.model, NUM_CLASSES)
    costs = node_costs(network, (args.micro, 3, args.imgsz, args.imgsz))
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    cuts = {
        "balanced": balanced_cuts(costs, 2, CPU)[0],
        "parameters": int(partition_balanced([cost.num_parameters for cost in costs], 2)[1]),
        "uniform": partition_uniform(len(costs), 2)[1],
    }
    ranks = run_ranks(2, run_cuts, cuts, args, timeout_s=1800)
    print(
        f"{args.model}, {args.num_micro} micro-batches of {args.micro} x {args.imgsz} px, fp32, one thread a rank"
    )
    print("cut          before layer   stages alone (s)   step (s)   formula (s)   ratio")
    for name, cut in cuts.items():
        stages = [rank[name]["stage_s"] for rank in ranks]
        step = max(rank[name]["step_s"] for rank in ranks)
        formula = sum(stages) + (args.num_micro - 1) * max(stages)
        print(
            f"{name:12s} {cut:3d} {costs[cut].name:9s}  {stages[0]:6.3f}  {stages[1]:6.3f}   "
            f"{step:8.3f}   {formula:11.3f}   {step / formula:5.2f}"
        )


def fit_nodes(args: argparse.Namespace) -> None:
    """Fits seconds of each node = a flops + b elements, relative errors weighing alike."""
    torch.set_num_threads(1)
    network = build_yolov5(args.model, NUM_CLASSES)
    costs = node_costs(network, (args.micro, 3, args.imgsz, args.imgsz))
    for autocast in (False, True):
        times = np.min([_node_times(network, args, autocast) for _ in range(args.rounds + 1)], 0)
        counted = np.array([(cost.flops, cost.elements) for cost in costs], float)
        weight = 1 / np.maximum(times, 1e-3)
        (per_flop, per_element), *_ = np.linalg.lstsq(counted * weight[:, None], times * weight, rcond=None)
        print(f"{'bf16 autocast' if autocast else 'fp32'}: {per_element / per_flop:.1f} flops per element")
        for cost, seconds, fitted in zip(costs, times, counted @ [per_flop, per_element], strict=True):
            print(f"  {cost.name:8s} {seconds * 1e3:7.1f} ms, fitted {fitted * 1e3:7.1f}")


def _node_times(network: torch.nn.Module, args: argparse.Namespace, autocast: bool) -> np.ndarray:
    boundary: tuple = (batch(args.micro, args.imgsz).images,)
    times = np.zeros(len(network.order))
    for i in range(len(network.order)):
        inputs = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in boundary)
        begin = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            boundary = network.run(inputs, i, i + 1)
        times[i] = time.process_time() - begin
        out = boundary[-1] if isinstance(boundary[-1], tuple) else boundary[-1:]
        gradients = [torch.ones_like(o) for o in out]
        begin = time.process_time()
        torch.autograd.backward(out, gradients)
        times[i] += time.process_time() - begin
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="yolov5s")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--num_micro", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", action="store_true")
    args = parser.parse_args()
    (fit_nodes if args.nodes else compare_cuts)(args)


if __name__ == "__main__":
    main()
