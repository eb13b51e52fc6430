"""The command `dsyolo scale`: runs what was asked for, and writes the report."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from dsyolo.base.stdio import outlive_readers
from dsyolo.config.cli_args import parse
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import list_images, read_data_yaml
from dsyolo.data.synthetic import draw_sample
from dsyolo.scaling.cases import ScalingCase, deepspeed_json, wanted
from dsyolo.scaling.html_report import page
from dsyolo.scaling.options import SCALINGS, Sizes, add_options, check
from dsyolo.scaling.report import Report, build, to_json
from dsyolo.scaling.results import CaseResult, put_together
from dsyolo.scaling.runs import EndRequest, Outcome, ScalingPlan, arguments, epochs_and_images, write_data
from dsyolo.scaling.runs import run as run_case
from dsyolo.scaling.tables import rate_table, title, to_markdown

__all__ = ["add_options", "run"]

DRAWN_IMAGES, VAL_IMAGES = 400, 64


def run(args: argparse.Namespace) -> int:
    """Runs all and writes the report; returns 0 where some size of every strategy ran, else 1.

    A signal that asks to end (Ctrl-C, SIGTERM, SIGHUP) gives 128 and its number, with a report of what was measured.

    Raises:
        UserError: a mistake in the command line.
    """
    asked = check(args)
    rows = list(wanted(asked.strategies, SCALINGS[args.scaling], asked.ranks, args.model, asked.accelerator))
    cases = list(dict.fromkeys(row.case for row in rows if row.case))
    data = _data(args)
    num_images = len(list_images(data.train or ()))
    args.out.mkdir(parents=True, exist_ok=True)
    folder = _new_folder(args.out / "runs")
    with EndRequest() as end:
        outcomes = _run_all(args, asked, cases, data, num_images, folder.resolve(), end)
        measured, failed = _judge(outcomes, args.warmup, num_images)
        report = build(rows, measured, failed, _settings(args, asked), _notes(args, asked, measured))
        is_news = bool(measured) or not (args.out / "scale.json").exists()
        _write(args.out, report, folder, is_news=is_news)
    if end.number:
        print("Interrupted: the report has what was measured before.")
        return 128 + end.number
    return 0 if all(any(row.measured for row in group.rows) for group in report.groups) else 1


def _new_folder(runs: Path) -> Path:
    """For the trainings and the report, named by the time."""
    while True:
        folder = runs / time.strftime("%Y%m%d-%H%M%S")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)  # another began in this second
        else:
            return folder


def _data(args: argparse.Namespace) -> DataSpec:
    if args.data:
        return read_data_yaml(args.data)
    side = args.imgsz
    folder = args.out / f"sample_{side}px"
    return read_data_yaml(draw_sample(folder, num_images=DRAWN_IMAGES, image_size=(side, side)))


def _options(args: argparse.Namespace, accelerator: str) -> list[str]:
    threads = args.threads or (1 if accelerator == "cpu" else None)
    words = ["--model", args.model, "--imgsz", str(args.imgsz)]
    words += ["--threads", str(threads)] if threads else []
    words += ["--workers", str(args.workers)] if args.workers is not None else []
    return [*words, *args.options]


def _run_all(
    args: argparse.Namespace,
    asked: Sizes,
    cases: Sequence[ScalingCase],
    data: DataSpec,
    num_images: int,
    folder: Path,
    end: EndRequest,
) -> dict[ScalingCase, list[Outcome]]:
    """All cases in turn, round by round, until the end is asked for; a case that has failed does not run again."""
    options = _options(args, asked.accelerator)
    plan = ScalingPlan(
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
        end,
    )
    sources = {strategy.name: strategy for strategy in asked.strategies}
    outcomes: dict[ScalingCase, list[Outcome]] = {case: [] for case in cases}
    files: dict[ScalingCase, tuple[int, Path, Path]] = {}
    for case in cases:
        epochs, images = epochs_and_images(case, args.warmup + args.steps, num_images)
        config = folder / f"{case.name}.json"
        config.write_text(json.dumps(deepspeed_json(sources[case.strategy], case), indent=2) + "\n")
        files[case] = epochs, write_data(data, folder / "data", images, VAL_IMAGES), config
        # A mistake in the options is told before any training.
        parse(arguments(plan, case.name, *files[case]))
    turns = [(turn, case) for turn in range(args.rounds) for case in cases]
    for number, (turn, case) in enumerate(turns):
        if any(one.found is None for one in outcomes[case]):
            continue
        print(f"round {turn + 1} of {args.rounds}: {case.name} ...", end=" ", flush=True)
        outcome = run_case(plan, case, turn, number, *files[case])
        if outcome.found or not end.number:
            outcomes[case].append(outcome)
        if end.number:
            outlive_readers()  # a terminal that ends must not take the report with it
            print("interrupted", flush=True)
            break
        print(outcome.why_not or f"{outcome.wall_s:.0f} s", flush=True)
    return outcomes


def _judge(
    outcomes: dict[ScalingCase, list[Outcome]], warmup: int, num_images: int
) -> tuple[dict[ScalingCase, CaseResult], dict[ScalingCase, str]]:
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


def _notes(args: argparse.Namespace, asked: Sizes, measured: dict[ScalingCase, CaseResult]) -> list[str]:
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


def _write(out: Path, report: Report, beside: Path, *, is_news: bool) -> None:
    """Into the folder beside the trainings, where it stays, and in `out`, where the latest one lies that measured something."""
    texts = {
        "json": json.dumps(to_json(report), indent=1) + "\n",
        "md": to_markdown(report),
        "html": page(report),
    }
    for folder in (beside, *([out] if is_news else [])):
        for kind, text in texts.items():
            (folder / f"scale.{kind}").write_text(text)
    out = out if is_news else beside
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
