"""The command `dsyolo plan`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.spec import PRECISIONS
from dsyolo.models.registry import max_stride, model_option
from dsyolo.planner.hardware import DEVICES, GIB, Hardware, read_bytes, read_gpus, read_rate, typical_device
from dsyolo.planner.model_profile import ModelProfile
from dsyolo.planner.predict import Planner
from dsyolo.planner.ranking_report import HONEST, recommendation, table, to_json, val_option
from dsyolo.planner.search import search
from dsyolo.planner.strategy import OPTIMIZERS

BANDWIDTH = "3GB/s"  # of 25 Gbit/s Ethernet
MOST_BATCH, MOST_RANKS, MOST_IMGSZ = 2**16, 2**16, 2**13


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is to be trained, and on what."""
    add = parser.add_argument
    add(
        "--model",
        type=model_option,
        default="yolov5n",
        metavar="NAME",
        help="variant, or FILE.py:FUNCTION (default: yolov5n)",
    )
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default: 640)")
    add(
        "--global-batch",
        "--global_batch",
        type=int,
        default=64,
        metavar="N",
        help="images a step (default: 64)",
    )
    add("--gpus", required=True, metavar="NxM", help="of each node, and their memory: 8x24GiB")
    add("--nodes", type=int, default=1, metavar="N", help="machines with so many GPUs each (default: 1)")
    add(
        "--bandwidth",
        metavar="RATE",
        help=f"between nodes, each way: 25GB/s, 200Gb/s (default: {BANDWIDTH})",
    )
    add(
        "--gpu",
        type=str.upper,
        choices=DEVICES,
        metavar="NAME",
        help=f"for its speed: {', '.join(DEVICES)} (default: by memory)",
    )
    add(
        "--host-memory",
        "--host_memory",
        metavar="M",
        help="of each node, for offload: 256GiB (default: not judged)",
    )
    add("--classes", type=int, default=80, metavar="N", help="of the data set (default: 80)")
    add("--optimizer", choices=OPTIMIZERS, default="SGD", help="default: SGD")
    add("--precision", choices=PRECISIONS, help="only this one (default: all that the GPU has)")
    add("--no-ema", "--no_ema", action="store_true", help="without averaged weights")
    add("--json", action="store_true", help="print all strategies as JSON, and nothing else")
    add("--write", type=Path, metavar="FILE", help="write the recommended one as DeepSpeed JSON")
    add("--force", action="store_true", help="write over another file")


def run_plan(args: argparse.Namespace) -> int:
    """Prints the ranking; returns 0 where something fits, 1 where nothing does.

    Raises:
        UserError: a mistake in the command line.
    """
    hardware = _hardware(args)
    work = ModelProfile(args.model, args.classes, args.imgsz)
    has_bf16 = hardware.device.has_bf16
    precisions = (
        [PRECISIONS[args.precision]]
        if args.precision
        else [one for one in PRECISIONS.values() if has_bf16 or one.compute != "bf16"]
    )
    planner = Planner(work, hardware, ema=not args.no_ema)
    ranking = search(planner, args.global_batch, args.optimizer, precisions)
    if args.json:
        print(json.dumps(to_json(ranking, work, hardware), indent=1))
    else:
        print(f"{args.model}, {args.imgsz} px, {args.global_batch} images a step, {args.optimizer}")
        print(f"{hardware.ranks} x {hardware.memory_bytes / GIB:.1f} GiB; {hardware.explain()}")
        print("\n".join(HONEST))
        print(f"\n{table(ranking)}\n\n{recommendation(ranking, hardware)}")
    if args.write and ranking.best:
        content = json.dumps(ranking.best.settings.deepspeed_json(), indent=2) + "\n"
        _write(args.write, content, args.force)
        if not args.json:
            print(f"\nWritten to {args.write}. On each machine's {hardware.gpus} GPUs:")
            nodes = " --hostfile launch/hostfile" if hardware.nodes > 1 else f" --num_gpus {hardware.gpus}"
            print(
                f"deepspeed{nodes} dsyolo/train.py --deepspeed_config {args.write} --model {args.model} "
                f"--imgsz {args.imgsz} --data data.yaml{val_option(ranking.best)}"
            )
    elif args.write:
        print(f"Nothing was written to {args.write}, as nothing fits.", file=sys.stderr)
    return 0 if ranking.best else 1


def _hardware(args: argparse.Namespace) -> Hardware:
    problems: list[str] = []

    def read(option: str, text: str, reader: Callable[[str], Any], default: Any) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            problems.append(f"--{option}: {text!r} given, but it must be {error}. Correct it.")
            return default

    gpus, memory = read("gpus", args.gpus, read_gpus, (1, GIB))
    rate = read("bandwidth", args.bandwidth or BANDWIDTH, read_rate, 1.0)
    if args.bandwidth and args.nodes == 1:
        problems.append(
            f"--bandwidth: {args.bandwidth} given, but it is between nodes, and there is 1. Give --nodes too."
        )
    host = read("host-memory", args.host_memory, read_bytes, None) if args.host_memory else None
    bounds = {"nodes": 1024, "global-batch": MOST_BATCH, "classes": 10**4, "imgsz": MOST_IMGSZ}
    for option, most in bounds.items():
        value = getattr(args, option.replace("-", "_"))
        if not 1 <= value <= most:
            problems.append(f"--{option}: {value} given, but it must be 1 to {most}. Correct it.")
    stride = max_stride(args.model)
    if args.imgsz < 2 * stride:
        problems.append(
            f"--imgsz: {args.imgsz} given, but {args.model} needs {2 * stride} at least. Take that."
        )
    elif args.imgsz % stride:
        nearest = max(1, round(args.imgsz / stride)) * stride
        rule = f"{args.model} needs multiples of {stride}"
        problems.append(f"--imgsz: {args.imgsz} given, but {rule}. Take {nearest}.")
    ranks = gpus * args.nodes
    if ranks > MOST_RANKS:
        problems.append(
            f"--gpus x --nodes: {ranks} given, but {MOST_RANKS} at most are planned for. Take fewer."
        )
    elif ranks > 0 and args.global_batch % ranks:
        below, above = args.global_batch // ranks * ranks, -(-args.global_batch // ranks) * ranks
        rule = f"{ranks} GPUs take equal shares of it. Take {f'{below} or ' if below else ''}{above}"
        problems.append(f"--global-batch: {args.global_batch} given, but {rule}.")
    device = DEVICES[args.gpu] if args.gpu else typical_device(memory)
    if args.precision and PRECISIONS[args.precision].compute == "bf16" and not device.has_bf16:
        problems.append(
            f"--precision: {args.precision} given, but a {device.name} has no bf16. Take autocast_fp16."
        )
    if args.write and args.write.exists() and not args.write.is_file():
        problems.append(f"--write: {args.write} given, but it is a folder or device. Name a file.")
    elif args.write and (fault := cannot_hold_files(args.write.parent)):
        problems.append(f"--write: {fault}")
    if problems:
        raise UserError("The command line cannot be used", problems)
    return Hardware(device, args.nodes, gpus, memory, host, rate)


def _write(path: Path, content: str, force: bool) -> None:
    if path.exists() and not force and path.read_bytes() != content.encode():
        rule = "it says something else. Name another file, or write over it by --force"
        raise UserError("The plan was not written", [f"--write: {path} given, but {rule}."])
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        rule = f"{error.strerror}. What was there before is kept"
        raise UserError(
            "The plan was not written", [f"--write: {path}: {rule}. Name another file."]
        ) from None
