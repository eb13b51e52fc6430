"""The options of `dsyolo scale`, and whether they can be used."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from dsyolo.base.environment import read_environment
from dsyolo.base.errors import UserError
from dsyolo.config.messages import cannot_hold_files, did_you_mean
from dsyolo.config.option_checks import model_option, out_of_range
from dsyolo.config.run_config import AUTO
from dsyolo.doctor.findings import FAIL
from dsyolo.doctor.hosts import Host, read_hostfile
from dsyolo.models.registry import max_stride
from dsyolo.scaling.cases import STRONG, WEAK, ScalingStrategy, read_strategy

SCALINGS = {"weak": (WEAK,), "strong": (STRONG,), "both": (WEAK, STRONG)}
# What is given to train.py by the command itself.
OWN = frozenset(
    f"--{name}"
    for name in [
        "deepspeed_config",
        "data",
        "name",
        "project",
        "epochs",
        "val_every",
        "save_every",
        "time_profile",
        "resume",
        "model",
        "imgsz",
        "threads",
        "workers",
    ]
)
MOST_RANKS, MOST_ROUNDS, MOST_STEPS = 2**16, 100, 10**5


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, at which sizes, and how long."""
    add = parser.add_argument
    add("--ranks", required=True, metavar="N,N", help="sizes to run, as 1,2,4")
    add(
        "--strategies",
        metavar="NAME,NAME",
        help="files in ds_configs/, or paths (default: --deepspeed_config)",
    )
    add(
        "--deepspeed_config",
        type=Path,
        default=Path("ds_configs/zero1.json"),
        metavar="FILE",
        help="DeepSpeed JSON",
    )
    add(
        "--scaling",
        choices=SCALINGS,
        default="weak",
        help="weak: a rank's images stay; strong: a step's (default: weak)",
    )
    add("--data", type=Path, metavar="FILE", help="data set's YAML file (default: one is drawn)")
    add(
        "--model",
        type=model_option,
        default="yolov5n",
        metavar="NAME",
        help="variant, or FILE.py:FUNCTION (default: yolov5n)",
    )
    add("--imgsz", type=int, default=640, metavar="N", help="image size in pixels (default: 640)")
    add("--micro_batch", type=int, metavar="N", help="images of a micro-batch (default: the JSON's)")
    add(
        "--accumulation", type=int, metavar="N", help="micro-batches of a step and rank (default: the JSON's)"
    )
    add(
        "--steps",
        type=int,
        default=20,
        metavar="N",
        help="optimizer steps that count, at least (default: 20)",
    )
    add("--warmup", type=int, default=5, metavar="N", help="steps before them that do not (default: 5)")
    add("--rounds", type=int, default=2, metavar="N", help="times that each size runs, in turn (default: 2)")
    add("--hostfile", type=Path, metavar="FILE", help="ranks go to its hosts, the first ones first")
    add(
        "--launcher_options", default="", metavar="WORDS", help='of deepspeed, as one word: "--ssh_port 2222"'
    )
    add("--threads", type=int, metavar="N", help="per rank (default: 1 on a CPU)")
    add("--workers", type=int, metavar="N", help="loader processes per rank (default: as a run)")
    add(
        "--cores",
        type=int,
        metavar="N",
        help="of this machine that each rank has with its workers; a run on fewer ranks leaves the others idle (default: all for all)",
    )
    add("--timeout", type=float, default=1800, metavar="S", help="most seconds of a run (default: 1800)")
    add("--master_port", type=int, default=29600, metavar="N", help="first port that ranks meet at")
    add(
        "--out", type=Path, default=Path("scale"), metavar="DIR", help="folder of the report (default: scale)"
    )
    add("options", nargs="*", metavar="-- OPTION", help="more options of train.py, after two dashes")


class Sizes(NamedTuple):
    """What was asked for, checked."""

    ranks: list[int]
    strategies: list[ScalingStrategy]
    hosts: list[Host]
    accelerator: str


def check(args: argparse.Namespace) -> Sizes:
    """What was asked for.

    Raises:
        UserError: a mistake in the command line.
    """
    problems: list[str] = []
    ranks = _ranks(args.ranks, problems)
    bounds = {"steps": (1, MOST_STEPS), "warmup": (0, MOST_STEPS), "rounds": (1, MOST_ROUNDS)}
    bounds |= {
        "micro_batch": (1, 4096),
        "accumulation": (1, 4096),
        "threads": (1, 1024),
        "workers": (0, 1024),
    }
    bounds |= {"cores": (1, 1024), "timeout": (5, 10**6), "master_port": (1024, 65000), "imgsz": (64, 8192)}
    problems += out_of_range(args, bounds)
    if args.imgsz % max_stride(args.model):
        problems.append(
            f"--imgsz: {args.imgsz} given, but {args.model} needs multiples of {max_stride(args.model)}."
        )
    hosts = _hosts(args, ranks, problems)
    accelerator = read_environment().accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    if not hosts and ranks:
        _check_machine(args, max(ranks), accelerator, problems)
    strategies = _strategies(args, min(ranks, default=1), problems)
    own = [word for word in args.options if word.split("=")[0] in OWN]
    problems += [f"-- {word}: given, but dsyolo scale gives it itself. Leave it out." for word in own]
    try:
        shlex.split(args.launcher_options)
    except ValueError as error:
        problems.append(f"--launcher_options: {args.launcher_options!r} given: {error}. Close its quotes.")
    if fault := cannot_hold_files(args.out):
        problems.append(f"--out: {fault}")
    if problems:
        raise UserError("The command line cannot be used", problems)
    return Sizes(ranks, strategies, hosts, accelerator)


def _ranks(text: str, problems: list[str]) -> list[int]:
    parts = text.split(",")
    if all(part.strip().isdecimal() and 1 <= int(part) <= MOST_RANKS for part in parts):
        return sorted({int(part) for part in parts})
    problems.append(f"--ranks: {text!r} given, but it must be numbers from 1 on, as 1,2,4. Correct it.")
    return []


def _hosts(args: argparse.Namespace, ranks: Sequence[int], problems: list[str]) -> list[Host]:
    if not args.hostfile:
        return []
    hosts, findings = read_hostfile(args.hostfile)
    problems += [f"--hostfile: {one.found}. {one.remedy}" for one in findings if one.verdict == FAIL]
    slots = sum(host.slots for host in hosts)
    if hosts and ranks and max(ranks) > slots:
        problems.append(
            f"--ranks: {max(ranks)} given, but the hosts have {slots} slots. Take fewer, or more hosts."
        )
    return hosts


def _check_machine(args: argparse.Namespace, most: int, accelerator: str, problems: list[str]) -> None:
    if accelerator == "cuda" and most > torch.cuda.device_count():
        rule = f"this machine has {torch.cuda.device_count()} GPUs"
        problems.append(f"--ranks: {most} given, but {rule}. Take fewer, or give a --hostfile.")
    cores = psutil.cpu_count() or 1
    if args.cores and args.cores * most > cores:
        problems.append(
            f"--cores: {args.cores} for each of {most} ranks given, but there are {cores}. Take fewer."
        )
    if args.cores and not hasattr(os, "sched_setaffinity"):
        problems.append("--cores: this system cannot hold a process to cores. Leave it out.")


def _strategies(args: argparse.Namespace, smallest: int, problems: list[str]) -> list[ScalingStrategy]:
    is_list = args.strategies is not None
    option = "--strategies" if is_list else "--deepspeed_config"
    names = args.strategies.split(",") if is_list else [str(args.deepspeed_config)]
    faults: list[str] = []
    files = _files(names, option, faults)
    read = [read_strategy(path, smallest, args.micro_batch, args.accumulation, faults) for path in files]
    problems += [fault.replace("Check --deepspeed_config", f"Check {option}") for fault in faults]
    return list(filter(None, read))


def _files(names: Sequence[str], option: str, problems: list[str]) -> list[Path]:
    """Of the strategies, each once; no two may have one name."""
    files: dict[Path, Path] = {}
    for name in names:
        path = _path(name)
        if not name:
            problems.append(f"{option}: a name is empty. Give names of files in ds_configs/, or paths.")
        elif name == AUTO:
            remedy = "Write one by dsyolo plan --write FILE, and give that"
            problems.append(f"{option}: auto given, but scale compares strategies that are given. {remedy}.")
        elif os.path.exists(path):
            files.setdefault(path.resolve(), path)
        else:
            problems.append(f"{option}: {_missing(path)}")
    by_name: dict[str, Path] = {}
    for path in files.values():
        other = by_name.setdefault(path.stem, path)
        if other != path:
            rule = f"a strategy is called by its file's name, and both would be {path.stem}"
            problems.append(f"{option}: {other} and {path} given, but {rule}. Rename one.")
    return list(files.values())


def _path(name: str) -> Path:
    """Of a strategy: a path, or the name of a file in ds_configs/."""
    path = Path(name)
    return path if path.suffix == ".json" else Path("ds_configs", f"{name}.json")


def _missing(path: Path) -> str:
    seen = "" if path.is_absolute() else f", seen from {Path.cwd()}"
    hint = did_you_mean(path.name, [one.name for one in path.parent.glob("*.json")], f"{path.parent}/")
    return f"{path} does not exist{seen}. {hint or 'Give names of files in ds_configs/, or paths.'}"
