"""The options of `dsyolo scale`, and their checks."""

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
from dsyolo.config.ready_configs import READY_FOLDER, locate
from dsyolo.config.run_config import AUTO, image_size_fault
from dsyolo.doctor.findings import FAIL
from dsyolo.doctor.hosts import Host, read_hostfile
from dsyolo.models.registry import meta_network
from dsyolo.scaling.cases import STRONG, WEAK, ScalingStrategy, read_strategy

SCALINGS = {"weak": (WEAK,), "strong": (STRONG,), "both": (WEAK, STRONG)}
# Options of train.py that the command sets itself.
OWN = {
    *("--deepspeed_config", "--data", "--name", "--project", "--epochs", "--val_every", "--save_every"),
    *("--time_profile", "--resume", "--model", "--imgsz", "--threads", "--workers"),
}
MAX_RANKS = 2**16
# Numbers by name: default, least, most, help. A default of None is explained by the help.
NUMBERS: dict[str, tuple[float | None, int, int, str]] = {
    "imgsz": (640, 64, 8192, "image size in pixels"),
    "micro_batch": (None, 1, 4096, "images of a micro-batch (default: the JSON's)"),
    "accumulation": (None, 1, 4096, "micro-batches of a step and rank (default: the JSON's)"),
    "steps": (20, 1, 10**5, "minimum number of measured optimizer steps"),
    "warmup": (5, 0, 10**5, "steps before them that are not measured"),
    "rounds": (2, 1, 100, "runs of each size, in turn"),
    "threads": (None, 1, 1024, "threads per rank (default: 1 on a CPU)"),
    "workers": (None, 0, 1024, "loader workers per rank (default: as in a run)"),
    "cores": (None, 1, 1024, "cores of this machine for a rank and its workers (default: no limit)"),
    "timeout": (1800.0, 5, 10**6, "maximum seconds of a run"),
    "master_port": (29600, 1024, 65000, "first port for the ranks' rendezvous"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is trained, at which sizes, and how long."""
    add = parser.add_argument
    add("--ranks", required=True, metavar="N,N", help="rank counts to measure, e.g. 1,2,4")
    strategies = "files in ds_configs/, or paths (default: --deepspeed_config)"
    add("--strategies", metavar="NAME,NAME", help=strategies)
    default = Path("ds_configs/zero1.json")
    add("--deepspeed_config", type=Path, default=default, metavar="FILE", help="DeepSpeed JSON")
    scaling = "what stays constant: images per rank (weak) or per step (strong); both: one after the other (default: weak)"
    add("--scaling", choices=SCALINGS, default="weak", help=scaling)
    add("--data", type=Path, metavar="FILE", help="data set's YAML file (default: a synthetic one)")
    model = "variant, or FILE.py:FUNCTION (default: yolov5n)"
    add("--model", type=model_option, default="yolov5n", metavar="NAME", help=model)
    for name, (number, _, _, text) in NUMBERS.items():
        kind = float if isinstance(number, float) else int
        shown = "" if number is None else f" (default: {number:g})"
        add(f"--{name}", type=kind, default=number, metavar="N", help=text + shown)
    add("--hostfile", type=Path, metavar="FILE", help="run on its hosts, the first ones first")
    launcher = 'options of deepspeed in one string: "--ssh_port 2222"'
    add("--launcher_options", default="", metavar="OPTIONS", help=launcher)
    out = "folder of the report (default: scale)"
    add("--out", type=Path, default=Path("scale"), metavar="DIR", help=out)
    add("options", nargs="*", metavar="-- OPTION", help="more options of train.py, after two dashes")


class ScaleRequest(NamedTuple):
    """The checked sizes, strategies and hosts of a command line."""

    ranks: list[int]
    strategies: list[ScalingStrategy]
    hosts: list[Host]
    accelerator: str


def check(args: argparse.Namespace) -> ScaleRequest:
    """Check the command line. Raise UserError with all mistakes."""
    problems: list[str] = []
    ranks = _ranks(args.ranks, problems)
    problems += out_of_range(args, {name: (least, most) for name, (_, least, most, _) in NUMBERS.items()})
    if fault := image_size_fault(args.imgsz, args.model, meta_network(args.model).size_multiple_px):
        problems.append(f"--imgsz: {fault}")
    hosts = _hosts(args, ranks, problems)
    accelerator = read_environment().accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    if not hosts and ranks:
        _check_machine(args, max(ranks), accelerator, problems)
    strategies = _strategies(args, min(ranks, default=1), problems)
    own = [option for option in args.options if option.split("=")[0] in OWN]
    problems += [f"-- {option}: given, but dsyolo scale sets it itself. Leave it out." for option in own]
    try:
        shlex.split(args.launcher_options)
    except ValueError as error:
        problems.append(f"--launcher_options: {args.launcher_options!r} given: {error}. Close its quotes.")
    if fault := cannot_hold_files(args.out):
        problems.append(f"--out: {fault}")
    if problems:
        raise UserError("The command line cannot be used", problems)
    return ScaleRequest(ranks, strategies, hosts, accelerator)


def _ranks(text: str, problems: list[str]) -> list[int]:
    parts = text.split(",")
    if all(part.strip().isdecimal() and 1 <= int(part) <= MAX_RANKS for part in parts):
        return sorted({int(part) for part in parts})
    problems.append(f"--ranks: {text!r} given, but it must be numbers from 1 to {MAX_RANKS}, e.g. 1,2,4.")
    return []


def _hosts(args: argparse.Namespace, ranks: Sequence[int], problems: list[str]) -> list[Host]:
    if not args.hostfile:
        return []
    hosts, findings = read_hostfile(args.hostfile)
    problems += [f"--hostfile: {one.found}. {one.remedy}" for one in findings if one.verdict == FAIL]
    slots = sum(host.slots for host in hosts)
    if hosts and ranks and max(ranks) > slots:
        rule = f"the hosts have {slots} slots"
        problems.append(f"--ranks: {max(ranks)} given, but {rule}. Use fewer ranks, or more hosts.")
    return hosts


def _check_machine(args: argparse.Namespace, most: int, accelerator: str, problems: list[str]) -> None:
    if accelerator == "cuda" and most > torch.cuda.device_count():
        rule = f"this machine has {torch.cuda.device_count()} GPUs"
        problems.append(f"--ranks: {most} given, but {rule}. Use fewer ranks, or give a --hostfile.")
    cores = psutil.cpu_count() or 1
    if args.cores and args.cores * most > cores:
        rule = f"for {most} ranks this machine has {cores} cores"
        problems.append(f"--cores: {args.cores} given, but {rule}. Use fewer.")
    if args.cores and not hasattr(os, "sched_setaffinity"):
        problems.append("--cores: this system cannot pin processes to cores. Leave it out.")


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
    """Return the strategies' files, each once, from paths or names in ds_configs/. No two may share a name."""
    where = "names of files in ds_configs/, or paths"
    files: dict[Path, Path] = {}
    for name in names:
        path = Path(name) if name.endswith(".json") else Path(READY_FOLDER, f"{name}.json")
        path = locate(path)
        if not name:
            problems.append(f"{option}: a name is empty. Give {where}.")
        elif name == AUTO:
            remedy = "Write one with dsyolo plan --write FILE, and give that"
            problems.append(f"{option}: auto given, but scale compares given strategies. {remedy}.")
        elif os.path.exists(path):
            files.setdefault(path.resolve(), path)
        else:
            seen = "" if path.is_absolute() else f", seen from {Path.cwd()}"
            known = [one.name for one in path.parent.glob("*.json")]
            hint = did_you_mean(path.name, known, f"{path.parent}/") or f"Give {where}."
            problems.append(f"{option}: {path} does not exist{seen}. {hint}")
    by_name: dict[str, Path] = {}
    for path in files.values():
        other = by_name.setdefault(path.stem, path)
        if other != path:
            rule = f"strategies are named by their files, and both would be {path.stem}"
            problems.append(f"{option}: {other} and {path} given, but {rule}. Rename one.")
    return list(files.values())
