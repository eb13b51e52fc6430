"""`dsyolo val | detect | convert | sample | doctor | plan | simulate | scale`: what is done with data and weights outside a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsyolo.base.errors import UserError
from dsyolo.commands import doctor, plan, scale, simulate
from dsyolo.config.messages import cannot_hold_files, rule_of
from dsyolo.config.messages import validate as judge
from dsyolo.config.run_config import RunConfig
from dsyolo.data.dataset import DetectionDataset, refuse_unknown_classes
from dsyolo.data.formats.convert import convert_coco, convert_voc
from dsyolo.data.formats.yolo import list_images, read_data_yaml
from dsyolo.data.images import check_image, read_rgb
from dsyolo.data.index_builder import build_index
from dsyolo.data.loader import EvalLoader, to_batch
from dsyolo.data.synthetic import draw_sample
from dsyolo.detection.boxes import letterbox, unletterbox
from dsyolo.detection.evaluator import validate
from dsyolo.detection.postprocess import PlainPredictor, PostProcessor
from dsyolo.models.registry import max_stride, model_option
from dsyolo.models.weights import WeightsInfo, rebuild
from dsyolo.scaling import options as scale_options
from dsyolo.tracking.plots import draw, save

MANY_IMAGES = 20  # so many and more are told in one line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, the command's own, 2 for a mistake of the user's, or 128 and the signal."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as by `| head`; what Python flushes at its exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="dsyolo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    val = _command(commands, "val", run_val, "validate weights on a data set's val split")
    _add_model_options(val, score=0.001, iou=0.6)
    val.add_argument("--data", type=Path, required=True, metavar="FILE", help="data set's YAML file")
    _add_number(val, "--batch_size", 16, "images at a time", field="val_batch_size")
    _add_number(val, "--workers", 1, "loader processes")
    val.add_argument(
        "--rect_val",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=RunConfig.model_fields["rect_val"].description,
    )
    val.add_argument("--json", type=Path, metavar="FILE", help="write the metrics there")

    detect = _command(commands, "detect", run_detect, "draw what is found in images")
    _add_model_options(detect, score=0.25, iou=0.45)
    detect.add_argument(
        "sources", nargs="+", type=Path, metavar="SOURCE", help="images, folders or list files"
    )
    detect.add_argument(
        "--out", type=Path, default=Path("detections"), metavar="DIR", help="default: detections"
    )

    convert = _command(commands, "convert", run_convert, "bring a data set into YOLO format")
    convert.add_argument("format", choices=sorted(CONVERTERS))
    convert.add_argument("src", type=Path, metavar="SRC", help="folder of the data set")
    convert.add_argument("dst", type=Path, metavar="DST", help="folder to make")

    sample = _command(commands, "sample", run_sample, "draw a small data set to try things with")
    sample.add_argument("dst", type=Path, metavar="DST", help="folder to make")
    sample.add_argument("--images", type=int, default=400, metavar="N", help="default: 400")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")

    doctor.add_options(
        _command(commands, "doctor", doctor.run_doctor, "look whether a run can start on its hosts")
    )
    plan.add_options(
        _command(commands, "plan", plan.run_plan, "which strategy fits which GPUs, and what it costs")
    )
    simulate.add_options(
        _command(commands, "simulate", simulate.run_simulate, "a training on thousands of ranks, on paper")
    )
    scale_options.add_options(
        _command(commands, "scale", scale.run_scale, "train at several sizes, and report how it scales")
    )
    return parser


def run_val(args: argparse.Namespace) -> None:
    """Prints the table of metrics, and writes them as JSON when asked."""
    if args.json:
        _check_json(args.json)
    info, predict = _load(args)
    data = read_data_yaml(args.data, required=("val",))
    if data.names != info.names:
        raise UserError(
            f"{args.weights} cannot be validated on {args.data}",
            [
                f"names: {', '.join(info.names)} in the weights, {', '.join(data.names)} in the data. They must be the same."
            ],
        )
    split = build_index(data.val, data.num_classes)
    refuse_unknown_classes(data, {"val": split})
    size_px = _image_size(args, info)
    loader = EvalLoader(
        DetectionDataset(split, size_px),
        image_size_px=size_px,
        stride=max_stride(args.model or info.variant),
        batch_size=args.batch_size,
        rank=0,
        world_size=1,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
        rectangular=args.rect_val,
    )
    metrics, _ = validate(predict, loader, _finder(args, multi_label=True), info.names, lambda item: [item])
    print(metrics.table())
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(metrics.to_json(), indent=2) + "\n")


def run_detect(args: argparse.Namespace) -> None:
    """Writes a picture per image and prints what is in each, or in all of them where they are many."""
    targets = _targets(list(dict.fromkeys(list_images(args.sources))), args.out)
    if problem := cannot_hold_files(args.out):
        raise UserError(f"--out {args.out} cannot be used", [problem])
    info, predict = _load(args)
    size_px, stride = _image_size(args, info), max_stride(args.model or info.variant)
    finder = _finder(args, multi_label=False)
    args.out.mkdir(parents=True, exist_ok=True)
    counts, num_written, is_long = Counter(), 0, len(targets) >= MANY_IMAGES
    for path, target in targets.items():
        size_hw, reason, detail = check_image(path)
        image = None if size_hw is None else read_rgb(path, size_hw, max(size_hw))
        if image is None:
            print(f"{path}: {reason}: {detail}", file=sys.stderr)
            continue
        scale = size_px / max(image.shape[:2])
        shape_hw = tuple(-(-round(side * scale) // stride) * stride for side in image.shape[:2])
        boxed, scale, pad_xy = letterbox(image, shape_hw)
        inside = finder(predict(to_batch(boxed))[0])
        found = inside._replace(boxes_xyxy=unletterbox(inside.boxes_xyxy, scale, pad_xy, image.shape[:2]))
        save(target, draw(image, found, info.names))
        num_written += 1
        counts.update(found.classes.tolist())
        if not is_long:
            print(f"{path}: {_listed(Counter(found.classes.tolist()), info.names)} -> {target}")
    if is_long:
        print(f"{num_written:,} images: {_listed(counts, info.names)} -> {args.out}")


def run_convert(args: argparse.Namespace) -> None:
    """Converts and prints what was converted and what was left out."""
    print(CONVERTERS[args.format](args.src, args.dst).summary())


def run_sample(args: argparse.Namespace) -> None:
    """Draws the data set and prints the path of its data.yaml."""
    print(draw_sample(args.dst, num_images=args.images, seed=args.seed))


CONVERTERS = {"voc": convert_voc, "coco": convert_coco}


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser, *, score: float, iou: float) -> None:
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE", help="a .safetensors file of a run"
    )
    parser.add_argument(
        "--model", type=model_option, metavar="FILE.py:FUNCTION", help="for weights of your own network"
    )
    parser.add_argument(
        "--imgsz", type=int, metavar="N", help="image size in pixels (default: of the training)"
    )
    _add_number(parser, "--score_threshold", score, "least score of a detection")
    _add_number(parser, "--iou_threshold", iou, "IoU of NMS")
    _add_number(parser, "--max_detections", 300, "most detections per image")


def _add_number(
    parser: argparse.ArgumentParser, option: str, default: float, text: str, *, field: str = ""
) -> None:
    """An option judged as `field` of a training is, by default the one of its name."""
    metavar = "N" if isinstance(default, int) else "X"
    text = f"{text} (default: {default})"
    parser.add_argument(
        option, type=_as_in_training(field or option[2:]), default=default, metavar=metavar, help=text
    )


def _as_in_training(key: str) -> Callable[[str], Any]:
    def value_of(text: str) -> Any:
        run = judge(RunConfig, {"data": "", key: text}, "", str, [])
        if run is None:
            rule = rule_of(RunConfig.model_fields[key])
            raise argparse.ArgumentTypeError(f"{text} given, but it must be {rule}")
        return getattr(run, key)

    return value_of


def _check_json(path: Path) -> None:
    problem = "it is a folder. Name a file." if path.is_dir() else cannot_hold_files(path.parent)
    if problem:
        raise UserError(f"--json {path} cannot be written", [problem])


def _targets(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Where the picture of each image goes.

    Raises:
        UserError: that is one of the images themselves, or the same for two of them.
    """
    problems: list[str] = []
    targets: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    inputs = {_identity(path) for path in images if path.exists()}
    for path in images:
        target = out / (path.name if path.suffix.lower() in (".jpg", ".png") else f"{path.name}.png")
        if target.exists() and _identity(target) in inputs:
            problems.append(f"{target}: it is one of the images given. Name another folder by --out.")
        elif target in taken:
            problems.append(
                f"{target}: both {taken[target]} and {path} would go there. Give them one after the other, each with its own --out."
            )
        targets[path], taken[target] = target, path
    if problems:
        more = [f"and {len(problems) - 5} more."] if len(problems) > 5 else []
        raise UserError("No picture was written", [*problems[:5], *more])
    return targets


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _load(args: argparse.Namespace) -> tuple[WeightsInfo, PlainPredictor]:
    network, info = rebuild(args.weights, args.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return info, PlainPredictor(network, device)


def _image_size(args: argparse.Namespace, info: WeightsInfo) -> int:
    size_px, stride = (
        info.image_size_px if args.imgsz is None else args.imgsz,
        max_stride(args.model or info.variant),
    )
    if size_px < stride or size_px % stride:
        raise UserError(
            "The command line cannot be used",
            [
                f"--imgsz: {size_px} given, but {info.variant} takes multiples of {stride}. Set it to {max(1, size_px // stride) * stride}."
            ],
        )
    return size_px


def _finder(args: argparse.Namespace, *, multi_label: bool) -> PostProcessor:
    return PostProcessor(
        args.score_threshold, args.iou_threshold, args.max_detections, multi_label=multi_label
    )


def _listed(counts: Mapping[int, int], names: Sequence[str]) -> str:
    """How many of each class, by its number."""
    return ", ".join(f"{counts[klass]:,} {names[klass]}" for klass in sorted(counts)) or "nothing"


if __name__ == "__main__":
    sys.exit(main())
