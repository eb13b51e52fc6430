"""`dsyolo plan`: rank the strategies that fit given GPUs."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsyolo.base.atomic_file import write_file
from dsyolo.base.errors import UserError
from dsyolo.base.text import escaped
from dsyolo.config.option_checks import cannot_hold_file, model_option, out_of_range
from dsyolo.config.run_config import image_size_fault
from dsyolo.config.spec import PRECISIONS
from dsyolo.planner.hardware import DEVICES, GIB, Hardware, read_bytes, read_gpus, read_rate, typical_device
from dsyolo.planner.strategy import OPTIMIZERS

BANDWIDTH = "3GB/s"  # the rate of 25 Gbit/s Ethernet
MAX_RANKS = 2**16
BOUNDS = {"nodes": (1, 1024), "global-batch": (1, 2**16), "classes": (1, 10**4), "imgsz": (1, 2**13)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is trained, on which hardware, and what is written."""
    add = parser.add_argument
    text = "variant, or FILE.py:FUNCTION (default: yolov5n)"
    add("--model", type=model_option, default="yolov5n", metavar="NAME", help=text)
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default: 640)")
    text = "images in an optimizer step (default: 64)"
    add("--global-batch", "--global_batch", type=int, default=64, metavar="N", help=text)
    text = "GPUs of each node and the memory of each GPU: 8x24GiB"
    add("--gpus", required=True, metavar="NxM", help=text)
    add("--nodes", type=int, default=1, metavar="N", help="nodes with these GPUs each (default: 1)")
    text = f"network bandwidth of each node, one direction: 25GB/s, 200Gb/s (default: {BANDWIDTH})"
    add("--bandwidth", metavar="RATE", help=text)
    text = f"GPU whose speed is assumed: {', '.join(DEVICES)} (default: by memory)"
    add("--gpu", type=str.upper, choices=DEVICES, metavar="NAME", help=text)
    text = "host memory of each node, for offload: 256GiB (default: not checked)"
    add("--host-memory", "--host_memory", metavar="M", help=text)
    text = "classes of the data set (default: 80)"
    add("--classes", "--num-classes", "--num_classes", type=int, default=80, metavar="N", help=text)
    add("--optimizer", choices=OPTIMIZERS, default="SGD", help="default: SGD")
    add("--precision", choices=PRECISIONS, help="only this precision (default: all that the GPU has)")
    add("--no-ema", "--no_ema", action="store_true", help="plan without EMA")
    add("--json", action="store_true", help="print all strategies as JSON, and nothing else")
    add("--write", type=Path, metavar="FILE", help="write the recommended strategy as DeepSpeed JSON")
    add("--force", action="store_true", help="overwrite an existing file")


def run(args: argparse.Namespace) -> int:
    """Print the ranking; return 0 if a strategy fits, else 1. Raise UserError for a mistake in the command line."""
    from dsyolo.planner.model_profile import ModelProfile  # late, so that `--help` does not wait for torch
    from dsyolo.planner.predict import Planner
    from dsyolo.planner.ranking_report import CAVEATS, recommendation, table, to_json, val_option
    from dsyolo.planner.search import search

    hardware = _hardware(args)
    precisions = [one for one in PRECISIONS.values() if hardware.device.has_bf16 or one.compute != "bf16"]
    if args.precision:
        precisions = [PRECISIONS[args.precision]]
    profile = ModelProfile(args.model, args.classes, args.imgsz)
    planner = Planner(profile, hardware, ema=not args.no_ema)
    ranking = search(planner, args.global_batch, args.optimizer, precisions)
    if args.json:
        print(json.dumps(to_json(ranking), indent=1))
    else:
        print(f"{args.model}, {args.imgsz} px, {args.global_batch} images a step, {args.optimizer}")
        print(f"{hardware.ranks} x {hardware.memory_bytes / GIB:.1f} GiB; {hardware.explain()}")
        print("\n".join(CAVEATS))
        print(f"\n{table(ranking)}\n\n{recommendation(ranking, hardware)}")
    if args.write and ranking.best:
        content = json.dumps(ranking.best.settings.deepspeed_json(), indent=2) + "\n"
        _write(args.write, content, args.force)
        if not args.json:
            print(escaped(f"\nWritten to {args.write}. On each machine's {hardware.gpus} GPUs:"))
            nodes = " --hostfile launch/hostfile" if hardware.nodes > 1 else f" --num_gpus {hardware.gpus}"
            command = (
                f"deepspeed{nodes} dsyolo/train.py --deepspeed_config {args.write} --model {args.model} "
                f"--imgsz {args.imgsz} --data data.yaml{val_option(ranking.best)}"
            )
            print(escaped(command))
    elif args.write:
        print(f"Nothing was written to {args.write}, as nothing fits.", file=sys.stderr)
    return 0 if ranking.best else 1


def _hardware(args: argparse.Namespace) -> Hardware:
    from dsyolo.models.registry import meta_network

    problems: list[str] = []

    def read(option: str, text: str, reader: Callable[[str], Any], default: Any) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            problems.append(f"--{option}: {text!r} given, but it must be {error}.")
            return default

    gpus, memory = read("gpus", args.gpus, read_gpus, (1, GIB))
    rate = read("bandwidth", args.bandwidth or BANDWIDTH, read_rate, 1.0)
    if args.bandwidth and args.nodes == 1:
        rule = "it is between nodes, and there is 1. Give --nodes too"
        problems.append(f"--bandwidth: {args.bandwidth} given, but {rule}.")
    host = read("host-memory", args.host_memory, read_bytes, None) if args.host_memory else None
    device = DEVICES[args.gpu] if args.gpu else typical_device(memory)
    problems += out_of_range(args, BOUNDS)
    if fault := image_size_fault(args.imgsz, args.model, meta_network(args.model).size_multiple_px):
        problems.append(f"--imgsz: {fault}")
    problems += _batch_problems(args, gpus * args.nodes)
    if args.precision and PRECISIONS[args.precision].compute == "bf16" and not device.has_bf16:
        rule = f"a {device.name} has no bf16. Take autocast_fp16"
        problems.append(f"--precision: {args.precision} given, but {rule}.")
    if args.write and (problem := cannot_hold_file(args.write)):
        problems.append(f"--write: {problem}")
    if problems:
        raise UserError("The command line cannot be used", problems)
    return Hardware(device, args.nodes, gpus, memory, host, rate)


def _batch_problems(args: argparse.Namespace, ranks: int) -> list[str]:
    if ranks > MAX_RANKS:
        return [f"--gpus x --nodes: {ranks} given, but {MAX_RANKS} at most are planned for. Take fewer."]
    if ranks < 1 or args.global_batch % ranks == 0:
        return []
    below = args.global_batch // ranks * ranks
    rule = f"{ranks} GPUs take equal shares of it. Take {f'{below} or ' if below else ''}{below + ranks}"
    return [f"--global-batch: {args.global_batch} given, but {rule}."]


def _write(path: Path, content: str, force: bool) -> None:
    if path.exists() and not force and path.read_bytes() != content.encode():
        rule = "it has other content. Name another file, or overwrite it by --force"
        raise UserError("The plan was not written", [f"--write: {path} given, but {rule}."])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content.encode())
    except OSError as error:
        rule = f"{error.strerror}. The file that was there is kept: name another"
        raise UserError("The plan was not written", [f"--write: {path}: {rule}."]) from None
