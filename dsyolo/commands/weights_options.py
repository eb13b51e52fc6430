"""Options and loading that `dsyolo val` and `dsyolo detect` share: a network from a weights file, and its NMS."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.config.messages import rule_of, validate
from dsyolo.config.option_checks import model_option
from dsyolo.config.run_config import RunConfig, image_size_fault

if TYPE_CHECKING:
    import torch

    from dsyolo.detection.postprocess import PlainPredictor, PostProcessor


class LoadedNetwork(NamedTuple):
    """A trained network on this machine's device."""

    class_names: tuple[str, ...]
    image_size_px: int
    stride: int  # pixels that the sides of images must be multiples of
    strides: tuple[int, ...]  # pixels per cell of each level
    anchors: torch.Tensor  # (L, A, 2) widths and heights in cells
    predict: PlainPredictor
    postprocess: PostProcessor


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
    import torch  # late, so that `--help` does not wait for it

    from dsyolo.detection.postprocess import PlainPredictor, PostProcessor
    from dsyolo.models.registry import meta_network
    from dsyolo.models.weights import LICENCE, is_pickled, rebuild

    network, info = rebuild(args.weights, args.model)
    if is_pickled(args.weights):
        print(f"Note: {LICENCE}.", file=sys.stderr)
    size_px = info.image_size_px if args.imgsz is None else args.imgsz
    stride = meta_network(args.model or info.variant).size_multiple_px
    if fault := image_size_fault(size_px, info.variant, stride, times=1):
        raise UserError("The command line cannot be used", [f"--imgsz: {fault}"])
    device = torch.device("cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu")
    postprocess = PostProcessor(
        args.score_threshold, args.iou_threshold, args.max_detections, multi_label=multi_label
    )
    anchors = network.anchors.clone()  # before they move to the device
    predictor = PlainPredictor(network, device)
    return LoadedNetwork(info.names, size_px, stride, network.strides, anchors, predictor, postprocess)
