"""`dsyolo simulate`: compute what training on thousands of ranks would need, without running it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.config import MIN_SHARE_ELEMENTS
from dsyolo.config.option_checks import model_option, out_of_range

if TYPE_CHECKING:
    from dsyolo.planner.simulation import SimulatedScale

COCO_IMAGES = 118287  # images of COCO's train2017
MOST_RANKS = 4096
BOUNDS = {
    "classes": (1, 10**4),
    "images": (1, 10**7),
    "global_batch": (1, 2**20),
    "micro_batch": (1, 2**10),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: what is trained, on how many ranks."""
    add = parser.add_argument
    text = "variant, or FILE.py:FUNCTION (default: yolov5x)"
    add("--model", type=model_option, default="yolov5x", metavar="NAME", help=text)
    text = "classes of the data set (default: 80)"
    add("--classes", "--num-classes", "--num_classes", type=int, default=80, metavar="N", help=text)
    text = "images in the data set (default: COCO's)"
    add("--images", type=int, default=COCO_IMAGES, metavar="N", help=text)
    add("--ranks", default="8,64,512,4096", metavar="N,N", help="numbers of ranks (default: 8,64,512,4096)")
    text = "images in an optimizer step, rounded up to whole micro-batches for each rank (default: 64)"
    add("--global-batch", "--global_batch", type=int, default=64, metavar="N", help=text)
    text = "images of a rank in a forward pass (default: 1)"
    add("--micro-batch", "--micro_batch", type=int, default=1, metavar="N", help=text)
    add("--json", action="store_true", help="print JSON, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print a line for each number of ranks and ZeRO stage; return 1 if an image does not come exactly once."""
    from dsyolo.planner.simulation import simulate  # late, so that `--help` does not wait for torch

    ranks, problems = set(), out_of_range(args, BOUNDS)
    for text in args.ranks.split(","):
        if text.strip().isdecimal() and 1 <= int(text) <= MOST_RANKS:
            ranks.add(int(text))
        else:
            rule = f"each must be a number from 1 to {MOST_RANKS}"
            problems.append(f"--ranks: {text!r} given, but {rule}.")
    if problems:
        raise UserError("The command line cannot be used", problems)
    found = simulate(
        args.model, args.classes, args.images, sorted(ranks), args.global_batch, args.micro_batch
    )
    print(json.dumps([one.to_json() for one in found], indent=1) if args.json else _table(found))
    return 0 if all(one.coverage[1:] == (1, 1) for one in found) else 1


def _table(found: list[SimulatedScale]) -> str:
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
            f"ZeRO 1 and 2 send more where a rank's share is below {share}: they all-reduce whole buckets, in few messages."
        )
    if 3 in more:
        lines.append("ZeRO 3 sends more, as it pads small parameters to a multiple of that many ranks.")
    if 3 in less:
        lines.append("ZeRO 3 sends less, as the last layers' weights stay whole from forward to backward.")
    return "\n".join(lines)
