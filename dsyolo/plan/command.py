"""The command `dsyolo plan`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dsyolo.config import MODELS, RunConfig, max_stride
from dsyolo.errors import UserError
from dsyolo.plan.counts import count
from dsyolo.plan.hardware import DEVICES, Hardware, read_hardware
from dsyolo.plan.judge import Judged, best_of, judge
from dsyolo.plan.report import explain
from dsyolo.plan.strategies import STAGES
from dsyolo.problems import cannot_hold_files


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is to be trained, and on what."""
    add = parser.add_argument
    add("--model", choices=MODELS, default="yolov5n", metavar="NAME", help="variant (default: yolov5n)")
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default: 640)")
    add(
        "--global-batch",
        "--global_batch",
        type=int,
        default=64,
        metavar="N",
        help="images a step (default: 64)",
    )
    add(
        "--gpus",
        default="1x24GiB",
        metavar="NxGiB",
        help="GPUs of a node and their memory (default: 1x24GiB)",
    )
    add("--nodes", type=int, default=1, metavar="N", help="nodes with as many GPUs each (default: 1)")
    add("--bandwidth", metavar="GB/s", help="between nodes, in one direction (default: 25GB/s)")
    names = ", ".join(device.name for device in DEVICES)
    add("--gpu", metavar="NAME", help=f"whose figures to take: {names} (default: by the memory)")
    add("--tflops", type=float, metavar="X", help="in fp16 and bf16, instead of the data sheet's")
    add("--num-classes", "--num_classes", type=int, default=80, metavar="N", help="classes (default: 80)")
    add("--json", nargs="?", const="-", metavar="FILE", help="all strategies as JSON, printed or into a file")
    add("--write", type=Path, metavar="FILE", help="write the recommended DeepSpeed JSON there")
    add("--force", action="store_true", help="write over another file")


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plan; returns 0 where a strategy fits, 1 where none does.

    Raises:
        UserError: a mistake in the command line.
    """
    problems: list[str] = []
    hardware = read_hardware(args.gpus, args.nodes, args.bandwidth, args.gpu, args.tflops, problems)
    _check(args, hardware, problems)
    if problems:
        raise UserError("The command line cannot be used", problems)
    counts = count(args.model, args.imgsz, args.num_classes)
    found = judge(counts, args.global_batch, hardware)
    best = best_of(found)
    if args.json:
        _tell_json(args.json, [one.to_json() for one in found])
    if args.json != "-":
        print(explain(counts, hardware, found, best))
    if args.write and best:
        _write(args.write, best, args.force)
    if best and args.json != "-":
        print(f"\n{_commands(args, best, hardware)}")
    return 0 if best else 1


def _check(args: argparse.Namespace, hardware: Hardware, problems: list[str]) -> None:
    stride = max_stride(args.model)
    if args.imgsz < 2 * stride or args.imgsz % stride:
        nearest = max(2, round(args.imgsz / stride)) * stride
        problems.append(
            f"--imgsz: {args.imgsz} given, but {args.model} takes multiples of {stride}. Set it to {nearest}."
        )
    if not 1 <= args.num_classes <= 10**5:
        problems.append(f"--num-classes: {args.num_classes} given, but a detector has 1 to 100,000.")
    if args.global_batch < 1:
        problems.append(f"--global-batch: {args.global_batch} given, but it must be at least 1.")
    else:
        gpus = hardware.num_gpus
        replicas = [gpus // stages for stages in STAGES if gpus % stages == 0]
        if all(args.global_batch % num for num in replicas):
            nearest = max(1, round(args.global_batch / gpus)) * gpus
            rule = f"{gpus} GPUs do not divide it"
            problems.append(f"--global-batch: {args.global_batch} given, but {rule}. Set it to {nearest}.")
    for option, path in (("--json", args.json if args.json != "-" else None), ("--write", args.write)):
        if path is None:
            continue
        path = Path(path)
        fault = "it is a folder. Name a file." if path.is_dir() else cannot_hold_files(path.parent)
        if fault:
            problems.append(f"{option}: {path} given, but {fault}")


def _tell_json(place: str, plans: list[dict[str, Any]]) -> None:
    text = json.dumps(plans, indent=1)
    if place == "-":
        print(text)
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text(text + "\n")


def _write(path: Path, best: Judged, force: bool) -> None:
    """Writes the JSON, but not over one that says something else.

    Raises:
        UserError: there is such a file.
    """
    if path.exists() and not force and not _says(path, best.strategy.source):
        rule = "there is another file. Name a new one, or give --force."
        raise UserError("Nothing was written", [f"--write: {path} given, but {rule}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(best.strategy.source, indent=2) + "\n")


def _says(path: Path, source: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text()) == source
    except (OSError, ValueError):
        return False


def _commands(args: argparse.Namespace, best: Judged, hardware: Hardware) -> str:
    file = args.write or "FILE"
    size = "" if args.imgsz == RunConfig.model_fields["imgsz"].default else f" --imgsz {args.imgsz}"
    hosts = "--hostfile launch/hostfile" if hardware.nodes > 1 else f"--num_gpus {hardware.num_gpus}"
    start = f"deepspeed {hosts} dsyolo/train.py --deepspeed_config {file} --data data.yaml --model {args.model}{size}"
    if args.write:
        return f"Written to {args.write}. Train with it:\n{start}"
    return f"Add --write FILE for its DeepSpeed JSON, which a run takes as it is:\n{json.dumps(best.strategy.source)}\n{start}"
