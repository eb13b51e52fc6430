"""Options and loading that `dsyolo val` and `dsyolo detect` share: a network from a weights file, and its NMS."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsyolo.config.messages import rule_of, validate
from dsyolo.config.option_checks import model_option
from dsyolo.config.run_config import RunConfig

if TYPE_CHECKING:
    from dsyolo.inference.loaded_network import LoadedNetwork


def add_weights_options(parser: argparse.ArgumentParser, *, score: float, iou: float) -> None:
    """Add the options of the network and of NMS, with these default thresholds."""
    add = parser.add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="a .safetensors file of a run")
    add("--model", type=model_option, metavar="FILE.py:FUNCTION", help="for weights of your own network")
    add("--imgsz", type=int, metavar="N", help="image size in pixels (default: of the training)")
    add(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="auto: a GPU if there is one (default: auto)",
    )
    add_number(parser, "--score_threshold", score, "minimum score of a detection")
    add_number(parser, "--iou_threshold", iou, "IoU threshold of NMS")
    add_number(parser, "--max_detections", 300, "maximum detections per image")


def add_number(
    parser: argparse.ArgumentParser, option: str, default: float, text: str, *, field: str = ""
) -> None:
    """Add an option with the rule of a run's field: `field`, or the one of its name."""
    key = field or option[2:]

    def value_of(given: str) -> Any:
        run = validate(RunConfig, {"data": "", key: given}, "", str, [])
        if run is None:
            rule = rule_of(RunConfig.model_fields[key])
            raise argparse.ArgumentTypeError(f"{given} given, but it must be {rule}")
        return getattr(run, key)

    metavar, text = "N" if isinstance(default, int) else "X", f"{text} (default: {default})"
    parser.add_argument(option, type=value_of, default=default, metavar=metavar, help=text)


def load(args: argparse.Namespace, *, multi_label: bool) -> LoadedNetwork:
    """Load the network of `--weights`; under `multi_label` a box may have several classes, as in validation.

    Raises UserError where the weights cannot be used, or not with this `--imgsz`.
    """
    from dsyolo.detection.postprocess import PostProcessor  # late, so that `--help` does not wait for torch
    from dsyolo.inference.loaded_network import load_network
    from dsyolo.models.weights import LICENCE, is_pickled

    postprocess = PostProcessor(
        args.score_threshold, args.iou_threshold, args.max_detections, multi_label=multi_label
    )
    network = load_network(args.weights, postprocess, model=args.model, imgsz=args.imgsz, device=args.device)
    if is_pickled(args.weights):
        print(f"Note: {LICENCE}.", file=sys.stderr)
    return network
