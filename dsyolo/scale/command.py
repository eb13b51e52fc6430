"""The command `dsyolo scale`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from dsyolo.config import MODELS, max_stride, parse
from dsyolo.data.formats import DataSpec, list_images, read_data_yaml
from dsyolo.data.sample import draw_sample
from dsyolo.doctor.hosts import Host, read_hostfile
from dsyolo.doctor.report import FAIL
from dsyolo.environment import read_environment
from dsyolo.errors import UserError
from dsyolo.problems import cannot_hold_files
from dsyolo.scale.cases import STRONG, WEAK, Case, Strategy, deepspeed_json, read_strategy, wanted
from dsyolo.scale.page import page
from dsyolo.scale.report import Report, build, rate_table, title, to_json, to_markdown
from dsyolo.scale.results import Measured, put_together
from dsyolo.scale.runs import Outcome, Plan, arguments, epochs_and_images, run, write_data

SCALINGS = {"weak": (WEAK,), "strong": (STRONG,), "both": (WEAK, STRONG)}
OWN = {
    "--deepspeed_config",
    "--data",
    "--name",
    "--project",
    "--epochs",
    "--val_every",
    "--save_every",
    "--time_account",
}
OWN |= {"--resume", "--model", "--imgsz", "--threads", "--workers"}
MOST_RANKS, MOST_ROUNDS, MOST_STEPS = 2**16, 100, 10**5
DRAWN_IMAGES, VAL_IMAGES = 400, 64


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
    add("--model", choices=MODELS, default="yolov5n", metavar="NAME", help="variant (default: yolov5n)")
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
    strategies: list[Strategy]
    hosts: list[Host]
    accelerator: str


def run_scale(args: argparse.Namespace) -> int:
    """Runs all and writes the report; returns 0 where some size of every strategy ran, else 1.

    Raises:
        UserError: a mistake in the command line.
    """
    asked = _check(args)
    rows = list(wanted(asked.strategies, SCALINGS[args.scaling], asked.ranks, args.model, asked.accelerator))
    cases = list(dict.fromkeys(row.case for row in rows if row.case))
    data = _data(args, cases)
    args.out.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    outcomes, is_interrupted = _run_all(args, asked, cases, data, stamp)
    measured, failed = _judge(outcomes, args.warmup, len(list_images(data.train or ())))
    report = build(rows, measured, failed, _settings(args, asked), _notes(args, asked, measured))
    _write(args.out, report, stamp, is_news=bool(measured) or not (args.out / "scale.json").exists())
    if is_interrupted:
        print("Interrupted: the report has what was measured before.")
        return 130
    return 0 if all(any(row.measured for row in group.rows) for group in report.groups) else 1


def _check(args: argparse.Namespace) -> Sizes:
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
    for option, (least, most) in bounds.items():
        value = getattr(args, option)
        if value is not None and not least <= value <= most:
            problems.append(f"--{option}: {value} given, but it must be {least} to {most}. Correct it.")
    if args.imgsz % max_stride(args.model):
        problems.append(
            f"--imgsz: {args.imgsz} given, but {args.model} needs multiples of {max_stride(args.model)}."
        )
    hosts = _hosts(args, ranks, problems)
    accelerator = read_environment().accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    if not hosts and ranks:
        _check_machine(args, max(ranks), accelerator, problems)
    names = args.strategies.split(",") if args.strategies else [str(args.deepspeed_config)]
    smallest = min(ranks, default=1)
    strategies = [
        found
        for name in dict.fromkeys(names)
        if (found := read_strategy(_path(name), smallest, args.micro_batch, args.accumulation, problems))
    ]
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


def _path(name: str) -> Path:
    """Of a strategy: a path, or the name of a file in ds_configs/."""
    path = Path(name)
    return path if path.suffix == ".json" else Path("ds_configs", f"{name}.json")


def _data(args: argparse.Namespace, cases: Sequence[Case]) -> DataSpec:
    if args.data:
        return read_data_yaml(args.data)
    side = args.imgsz
    return read_data_yaml(draw_sample(args.out / "sample", num_images=DRAWN_IMAGES, image_size=(side, side)))


def _options(args: argparse.Namespace, accelerator: str) -> list[str]:
    threads = args.threads or (1 if accelerator == "cpu" else None)
    words = ["--model", args.model, "--imgsz", str(args.imgsz)]
    words += ["--threads", str(threads)] if threads else []
    words += ["--workers", str(args.workers)] if args.workers is not None else []
    return [*words, *args.options]


def _run_all(
    args: argparse.Namespace, asked: Sizes, cases: Sequence[Case], data: DataSpec, stamp: str
) -> tuple[dict[Case, list[Outcome]], bool]:
    """All cases in turn, round by round; a case that has failed does not run again. And whether Ctrl-C ended it."""
    folder = args.out.resolve() / "runs" / stamp
    folder.mkdir(parents=True)
    options = _options(args, asked.accelerator)
    plan = Plan(
        folder,
        options,
        args.warmup,
        args.steps,
        args.hostfile and args.hostfile.resolve(),
        asked.hosts,
        args.master_port,
        args.timeout,
        args.cores,
        shlex.split(args.launcher_options),
    )
    sources = {strategy.name: strategy for strategy in asked.strategies}
    available = len(list_images(data.train or ()))
    outcomes: dict[Case, list[Outcome]] = {case: [] for case in cases}
    files: dict[Case, tuple[int, Path, Path]] = {}
    for case in cases:
        epochs, images = epochs_and_images(case, args.warmup + args.steps, available)
        config = folder / f"{case.name}.json"
        config.write_text(json.dumps(deepspeed_json(sources[case.strategy], case), indent=2) + "\n")
        files[case] = epochs, write_data(data, folder / "data", images, VAL_IMAGES), config
        parse(
            arguments(plan, case.name, *files[case])
        )  # a mistake in the options is told before any training
    turns = [(turn, case) for turn in range(args.rounds) for case in cases]
    try:
        for number, (turn, case) in enumerate(turns):
            if any(one.found is None for one in outcomes[case]):
                continue
            print(f"round {turn + 1} of {args.rounds}: {case.name} ...", end=" ", flush=True)
            outcome = run(plan, case, turn, number, *files[case])
            outcomes[case].append(outcome)
            print(outcome.why_not or f"{outcome.wall_s:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return outcomes, True
    return outcomes, False


def _judge(
    outcomes: dict[Case, list[Outcome]], warmup: int, num_images: int
) -> tuple[dict[Case, Measured], dict[Case, str]]:
    measured, failed = {}, {}
    for case, rounds in outcomes.items():
        found = [one.found for one in rounds if one.found]
        reasons = [one.why_not for one in rounds if one.why_not]
        if found:
            one = put_together(found, [r.wall_s for r in rounds if r.found], warmup)
            measured[case] = one._replace(about={**one.about, "data_images": num_images})
        if reasons:
            failed[case] = reasons[0]
    return measured, failed


def _settings(args: argparse.Namespace, asked: Sizes) -> dict[str, Any]:
    load = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    where = f"{len(asked.hosts)} hosts of {args.hostfile}" if asked.hosts else "this machine"
    return {
        "date": date.today().isoformat(),
        "model": f"{args.model}, {args.imgsz} px",
        "data": str(args.data or "drawn"),
        "steps": f"{args.steps} measured after {args.warmup}, {args.rounds} rounds in turn",
        "on": f"{where}, {psutil.cpu_count()} cores, {asked.accelerator}; load at the end {load}",
        "options": " ".join(_options(args, asked.accelerator)),
    }


def _notes(args: argparse.Namespace, asked: Sizes, measured: dict[Case, Measured]) -> list[str]:
    about = next(iter(measured.values())).about if measured else {}
    notes = []
    if about:
        held = (
            f"each rank has {args.cores} core{'s' if args.cores > 1 else ''} with its workers"
            if args.cores
            else "a run may use all cores, so that the loader of one rank has those that the others do not use"
        )
        where = f"; {held}" if asked.accelerator == "cpu" and not asked.hosts else ""
        notes.append(
            f"{about['device']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''} and {about['workers']} "
            f"loader process{'es' if about['workers'] != 1 else ''} a rank{where}. Peak of a rank: {about['peak_source']}."
        )
    notes.append(
        "Times of a step are medians of all rounds' measured steps, from the end of one step to the end of the next, with "
        "loading in them; images come from the page cache after the first round. Epoch s is the time that the whole "
        "data set's images would take so. Communication has in it the waiting for other ranks, in a pipeline its bubble."
    )
    if asked.accelerator != "cpu":
        notes.append(
            "What is sent beside computing, on a stream of its own, is not seen: what computing waits for at its end counts "
            "as that phase's."
        )
    return notes


def _write(out: Path, report: Report, stamp: str, *, is_news: bool) -> None:
    """Beside the trainings, where it stays, and in `out`, where the latest one lies that measured something."""
    texts = {
        "json": json.dumps(to_json(report), indent=1) + "\n",
        "md": to_markdown(report),
        "html": page(report),
    }
    for folder in (out / "runs" / stamp, *([out] if is_news else [])):
        for kind, text in texts.items():
            (folder / f"scale.{kind}").write_text(text)
    out = out if is_news else out / "runs" / stamp
    for group in report.groups:
        print(f"\n{title(group)}")
        rows = rate_table(group)
        widths = [max(len(row[i]) for row in rows if row[-1] or row is rows[0]) for i in range(len(rows[0]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for row in group.rows:
            if row.bottleneck:
                print(f"  {row.wanted.ranks}: {row.bottleneck}")
    print("\n" + "\n".join(str(out / f"scale.{kind}") for kind in ("md", "json", "html")))
