"""`dsyolo scale`: run the trainings of all sizes, and write the report."""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from dsyolo.base.atomic_file import write_file
from dsyolo.base.stdio import outlive_readers
from dsyolo.base.text import escaped
from dsyolo.commands.scale_options import SCALINGS, ScaleRequest, add_options, check
from dsyolo.config.cli_args import parse
from dsyolo.config.deepspeed.set_aside import explain
from dsyolo.config.messages import counted
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import list_images, read_data_yaml
from dsyolo.data.synthetic import draw_sample
from dsyolo.scaling import runs
from dsyolo.scaling.cases import ScalingCase, deepspeed_json, wanted
from dsyolo.scaling.html_report import page
from dsyolo.scaling.report import Report, build, to_json
from dsyolo.scaling.results import CaseResult, combine_rounds
from dsyolo.scaling.tables import rate_table, title, to_markdown

__all__ = ["add_options", "run"]

SYNTHETIC_IMAGES, VAL_IMAGES = 400, 64


def run(args: argparse.Namespace) -> int:
    """Run all and write the report; return 0 if every strategy ran at some size, else 1.

    After SIGINT, SIGTERM or SIGHUP return 128 plus its number, with a report of what was measured.
    """
    request = check(args)
    scalings = SCALINGS[args.scaling]
    rows = list(wanted(request.strategies, scalings, request.ranks, args.model, request.accelerator))
    cases = list(dict.fromkeys(row.case for row in rows if row.case))
    for strategy in request.strategies:
        print("".join(f"{strategy.name}: {line}\n" for line in explain(strategy.set_aside)), end="")
    data = _data(args)
    num_images = len(list_images(data.train or ()))
    args.out.mkdir(parents=True, exist_ok=True)
    folder = _new_folder(args.out / "runs")
    with runs.EndRequest() as end:
        outcomes = _run_all(args, request, cases, data, num_images, folder.resolve(), end)
        measured, failed = _combine(outcomes, args.warmup, num_images)
        report = build(rows, measured, failed, _settings(args, request), _notes(args, request, measured))
        is_news = bool(measured) or not (args.out / "scale.json").exists()
        _write(args.out, report, folder, is_news=is_news)
    if end.number:
        print("Interrupted: the report has what was measured before.")
        return 128 + end.number
    return 0 if all(any(row.measured for row in group.rows) for group in report.groups) else 1


def _new_folder(runs: Path) -> Path:
    """Make a folder for the trainings and the report, named by the time."""
    while True:
        folder = runs / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)  # another command began in this second
        else:
            return folder


def _data(args: argparse.Namespace) -> DataSpec:
    if args.data:
        return read_data_yaml(args.data)
    side = args.imgsz
    folder = args.out / f"sample_{side}px"
    return read_data_yaml(draw_sample(folder, num_images=SYNTHETIC_IMAGES, image_size=(side, side)))


def _options(args: argparse.Namespace, accelerator: str) -> list[str]:
    threads = args.threads or (1 if accelerator == "cpu" else None)
    options = ["--model", args.model, "--imgsz", str(args.imgsz)]
    options += ["--threads", str(threads)] if threads else []
    options += ["--workers", str(args.workers)] if args.workers is not None else []
    return [*options, *args.options]


def _run_all(
    args: argparse.Namespace,
    request: ScaleRequest,
    cases: Sequence[ScalingCase],
    data: DataSpec,
    num_images: int,
    folder: Path,
    end: runs.EndRequest,
) -> dict[ScalingCase, list[runs.Outcome]]:
    """Run all cases in turn, round by round, until a request to end. A case that has failed does not run again."""
    plan = runs.ScalingPlan(
        folder=folder,
        options=_options(args, request.accelerator),
        warmup=args.warmup,
        steps=args.steps,
        hostfile=args.hostfile and args.hostfile.resolve(),
        hosts=request.hosts,
        port=args.master_port,
        timeout_s=args.timeout,
        cores_per_rank=args.cores,
        launcher_options=shlex.split(args.launcher_options),
        end=end,
    )
    strategies = {strategy.name: strategy for strategy in request.strategies}
    outcomes: dict[ScalingCase, list[runs.Outcome]] = {case: [] for case in cases}
    files: dict[ScalingCase, tuple[int, Path, Path]] = {}
    for case in cases:
        epochs, images = runs.epochs_and_images(case, args.warmup + args.steps, num_images)
        config = folder / f"{case.name}.json"
        config.write_text(
            json.dumps(deepspeed_json(strategies[case.strategy], case), indent=2) + "\n", encoding="utf-8"
        )
        files[case] = epochs, runs.write_data(data, folder / "data", images, VAL_IMAGES), config
        # So that a mistake in the options is found before any training.
        parse(runs.arguments(plan, case.name, *files[case]))
    turns = [(turn, case) for turn in range(args.rounds) for case in cases]
    for number, (turn, case) in enumerate(turns):
        if any(one.found is None for one in outcomes[case]):
            continue
        print(escaped(f"round {turn + 1} of {args.rounds}: {case.name} ..."), end=" ", flush=True)
        outcome = runs.run(plan, case, turn, number, *files[case])
        if outcome.found or not end.number:
            outcomes[case].append(outcome)
        if end.number:
            outlive_readers()  # the report must be written even if the terminal has gone
            print("interrupted", flush=True)
            break
        print(escaped(outcome.why_not or f"{outcome.wall_s:.0f} s"), flush=True)
    return outcomes


def _combine(
    outcomes: dict[ScalingCase, list[runs.Outcome]], warmup: int, num_images: int
) -> tuple[dict[ScalingCase, CaseResult], dict[ScalingCase, str]]:
    """Return the results of the cases that ran at all, and why a round of a case failed."""
    measured: dict[ScalingCase, CaseResult] = {}
    failed: dict[ScalingCase, str] = {}
    for case, rounds in outcomes.items():
        ran = [(one.found, one.wall_s) for one in rounds if one.found]
        if ran:
            one = combine_rounds([found for found, _ in ran], [wall_s for _, wall_s in ran], warmup)
            measured[case] = one._replace(about={**one.about, "data_images": num_images})
        if reason := next((one.why_not for one in rounds if one.why_not), None):
            failed[case] = reason
    return measured, failed


def _settings(args: argparse.Namespace, request: ScaleRequest) -> dict[str, Any]:
    load = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    where = f"{len(request.hosts)} hosts of {args.hostfile}" if request.hosts else "this machine"
    return {
        "date": date.today().isoformat(),
        "model": f"{args.model}, {args.imgsz} px",
        "data": str(args.data or "synthetic"),
        "steps": f"{args.steps} measured after {args.warmup} of warm-up, {args.rounds} rounds in turn",
        "on": f"{where}, {psutil.cpu_count()} cores, {request.accelerator}; load at the end {load}",
        "options": " ".join(_options(args, request.accelerator)),
    }


def _notes(
    args: argparse.Namespace, request: ScaleRequest, measured: dict[ScalingCase, CaseResult]
) -> list[str]:
    notes = []
    if measured:
        about = next(iter(measured.values())).about
        own = f"{counted(args.cores, 'core')} per rank, workers included" if args.cores else ""
        cores = own or "all cores for each run"
        limit = f"; {cores}" if request.accelerator == "cpu" and not request.hosts else ""
        threads, workers = counted(about["threads"], "thread"), counted(about["workers"], "loader worker")
        notes.append(
            f"{about['device']}, {threads} and {workers} per rank{limit}. "
            f"Peak FLOP/s of a rank: {about['peak_source']}."
        )
    notes.append(
        "The time of a step is the median over all rounds, from the end of one step to the end of the next, loading "
        'included; after the first round images come from the page cache. "epoch s" is the time for the whole data set '
        "at that rate. Communication includes waiting for other ranks, and the bubble of a pipeline."
    )
    if request.accelerator != "cpu":
        notes.append(
            "Communication that overlaps with compute on a stream of its own is not counted. If a phase waits for it at "
            "its end, the wait counts as that phase."
        )
    return notes


def _write(out: Path, report: Report, beside: Path, *, is_news: bool) -> None:
    """Write the report beside the trainings, and into `out` if anything was measured or nothing was there."""
    as_json = json.dumps(to_json(report), indent=1) + "\n"
    texts = {"json": as_json, "md": to_markdown(report), "html": page(report)}
    for folder in (beside, *([out] if is_news else [])):
        for kind, text in texts.items():
            write_file(folder / f"scale.{kind}", text.encode())
    out = out if is_news else beside
    for group in report.groups:
        print(f"\n{title(group)}")
        table = rate_table(group)
        aligned = [cells for cells in table if cells[-1] or cells is table[0]]
        widths = [max(len(cells[i]) for cells in aligned) for i in range(len(table[0]))]
        for cells in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        for row in group.rows:
            if row.bottleneck:
                print(escaped(f"  {row.wanted.ranks}: {row.bottleneck}"))
    print("\n" + "\n".join(str(out / f"scale.{kind}") for kind in ("md", "json", "html")))
