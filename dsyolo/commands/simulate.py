"""The command `dsyolo simulate`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.config import MIN_SHARE_ELEMENTS
from dsyolo.config.option_checks import model_option
from dsyolo.planner.dry_run import DryRunResult, dry_run, dry_run_case
from dsyolo.planner.simulation import Scale, simulate

COCO_IMAGES = 118287  # of COCO's train2017
MOST_RANKS = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is trained, on how many ranks."""
    add = parser.add_argument
    add(
        "--model",
        type=model_option,
        default="yolov5x",
        metavar="NAME",
        help="variant, or FILE.py:FUNCTION (default: yolov5x)",
    )
    add("--num-classes", "--num_classes", type=int, default=80, metavar="N", help="classes (default: 80)")
    add("--images", type=int, default=COCO_IMAGES, metavar="N", help="of the data set (default: COCO's)")
    add("--ranks", default="8,64,512,4096", metavar="N,N", help="numbers of ranks (default: 8,64,512,4096)")
    text = "images a step, rounded up to whole micro-batches for each rank (default: 64)"
    add("--global-batch", "--global_batch", type=int, default=64, metavar="N", help=text)
    add(
        "--micro-batch",
        "--micro_batch",
        type=int,
        default=1,
        metavar="N",
        help="images of a rank (default: 1)",
    )
    text = (
        "also take a step with the engine that trains, as one of so many ranks on torch's fake process group, and show "
        "what it holds and sends (some seconds each; the network's memory is needed)"
    )
    add("--engine", action="store_true", help=text)
    add("--json", action="store_true", help="the same as JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each number of ranks and ZeRO stage; returns 1 where an image does not come exactly once.

    Raises:
        UserError: a mistake in the command line.
    """
    problems: list[str] = []
    ranks = []
    for text in args.ranks.split(","):
        if text.strip().isdecimal() and 1 <= int(text) <= MOST_RANKS:
            ranks.append(int(text))
        else:
            problems.append(f"--ranks: {text!r} given, but each is a number from 1 to {MOST_RANKS}.")
    bounds = {"num_classes": 10**4, "images": 10**7, "global_batch": 2**20, "micro_batch": 2**10}
    for option, most in bounds.items():
        if not 1 <= getattr(args, option) <= most:
            problems.append(f"--{option}: {getattr(args, option)} given, but it must be 1 to {most:,}.")
    ranks = sorted(set(ranks))
    if problems:
        raise UserError("The command line cannot be used", problems)
    found = simulate(args.model, args.num_classes, args.images, ranks, args.global_batch, args.micro_batch)
    rehearsed = (
        dry_run([dry_run_case(args.model, args.num_classes, one.zero_stage, one.ranks) for one in found])
        if args.engine
        else None
    )
    if args.json:
        rows = [one.to_json() for one in found]
        for row, one in zip(rows, rehearsed or (), strict=bool(rehearsed)):
            row["engine"] = one._asdict()
        print(json.dumps(rows, indent=1))
    else:
        print(_table(found))
        if rehearsed:
            print("\n" + _engine_table(found, rehearsed))
    return 0 if all(one.coverage[1:] == (1, 1) for one in found) else 1


def _engine_table(found: list[Scale], rehearsed: list[DryRunResult]) -> str:
    """What the engine held and sent, beside what was expected of it: one micro-batch a step."""
    lines = ["ranks  ZeRO  of rank  states MiB  expected  buckets MiB  expected  MB sent  expected"]
    for one, real in zip(found, rehearsed, strict=True):
        lines.append(
            f"{one.ranks:5d}  {one.zero_stage:4d}  {real.rank:7d}  {real.states / 2**20:10.1f}  "
            f"{real.states_expected / 2**20:8.1f}  {real.buckets / 2**20:11.1f}  {real.buckets_expected / 2**20:8.1f}  "
            f"{real.sent / 1e6:7.1f}  {real.sent_expected / 1e6:8.1f}"
        )
    return "\n".join(lines)


def _table(found: list[Scale]) -> str:
    lines = [
        "ranks  ZeRO  batch  steps  each image  states MiB, least to most    formula  buckets MiB  MB sent  formula  "
        "checkpoint MB of a rank"
    ]
    for one in found:
        times = "once" if one.coverage[1:] == (1, 1) else f"{one.coverage.least} to {one.coverage.most}"
        states = " to ".join(f"{size / 2**20:.1f}" for size in one.states)
        saved = " to ".join(f"{size / 1e6:.1f}" for size in one.saved)
        lines.append(
            f"{one.ranks:5d}  {one.zero_stage:4d}  {one.global_batch:5d}  {one.coverage.steps:5d}  {times:10}  "
            f"{states:24}  {one.formula / 2**20:9.1f}  {one.buckets / 2**20:11.1f}  {one.sent / 1e6:7.1f}  "
            f"{one.sent_formula / 1e6:7.1f}  {saved}"
        )
    more = {one.zero_stage for one in found if one.sent > 1.01 * one.sent_formula}
    less = {one.zero_stage for one in found if one.sent < 0.99 * one.sent_formula}
    if more & {1, 2}:
        share = f"{4 * MIN_SHARE_ELEMENTS / 2**20:g} MiB"
        lines.append(
            f"Where a rank's share is below {share}, ZeRO 1 and 2 sum whole buckets on all ranks, in few messages, and so send more."
        )
    if 3 in more:
        lines.append("On so many ranks ZeRO 3 fills small parts up to a size that all ranks send.")
    if 3 in less:
        lines.append("ZeRO 3 sends less, as the last layers' weights stay whole from forward to backward.")
    return "\n".join(lines)
