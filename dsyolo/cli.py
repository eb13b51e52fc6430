"""`dsyolo val | detect | convert | sample`: what is done with data and weights outside a training run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dsyolo.batch import Detections
from dsyolo.boxes import letterbox, unletterbox
from dsyolo.config import max_stride
from dsyolo.data.convert import convert_coco, convert_voc
from dsyolo.data.dataset import DetectionDataset, scan
from dsyolo.data.formats import list_images, read_data_yaml
from dsyolo.data.images import check_image, read_rgb
from dsyolo.data.loader import EvalLoader, to_batch
from dsyolo.data.sample import draw_sample
from dsyolo.errors import UserError
from dsyolo.model.weights import WeightsInfo, rebuild
from dsyolo.pictures import draw, save
from dsyolo.validate import Finder, PlainPredictor, validate


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 for a mistake of the user's."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"\n{error}\n", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="dsyolo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    val = _command(commands, "val", run_val, "validate weights on a data set's val split")
    _add_model_options(val, score=0.001, iou=0.6)
    val.add_argument("--data", type=Path, required=True, metavar="FILE", help="data set's YAML file")
    val.add_argument("--batch_size", type=_at_least_one, default=16, metavar="N", help="default: 16")
    val.add_argument("--workers", type=int, default=1, metavar="N", help="loader processes (default: 1)")
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
    sample.add_argument("--images", type=_at_least_one, default=400, metavar="N", help="default: 400")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    return parser


def run_val(args: argparse.Namespace) -> None:
    """Prints the table of metrics, and writes them as JSON when asked."""
    info, predict = _load(args)
    data = read_data_yaml(args.data, required=("val",))
    if data.names != info.names:
        raise UserError(
            f"{args.weights} cannot be validated on {args.data}",
            [
                f"names: {', '.join(info.names)} in the weights, {', '.join(data.names)} in the data. They must be the same."
            ],
        )
    split = scan(data.val, data.num_classes)
    size_px = _image_size(args, info)
    loader = EvalLoader(
        DetectionDataset(split, size_px),
        image_size_px=size_px,
        stride=max_stride(info.variant),
        batch_size=args.batch_size,
        rank=0,
        world_size=1,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
    )
    metrics, _ = validate(predict, loader, _finder(args, multi_label=True), info.names, lambda item: [item])
    print(metrics.table())
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(metrics.to_json(), indent=2) + "\n")


def run_detect(args: argparse.Namespace) -> None:
    """Writes a picture per image and prints what is in it."""
    info, predict = _load(args)
    size_px, stride = _image_size(args, info), max_stride(info.variant)
    finder = _finder(args, multi_label=False)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in list_images(args.sources):
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
        target = args.out / (path.name if path.suffix.lower() in (".jpg", ".png") else f"{path.name}.png")
        save(target, draw(image, found, info.names))
        print(f"{path}: {_count(found, info.names)} -> {target}")


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
        "--imgsz", type=int, metavar="N", help="image size in pixels (default: of the training)"
    )
    parser.add_argument("--score_threshold", type=float, default=score, metavar="X", help=f"default: {score}")
    parser.add_argument(
        "--iou_threshold", type=float, default=iou, metavar="X", help=f"of NMS (default: {iou})"
    )


def _load(args: argparse.Namespace) -> tuple[WeightsInfo, PlainPredictor]:
    network, info = rebuild(args.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return info, PlainPredictor(network, device)


def _image_size(args: argparse.Namespace, info: WeightsInfo) -> int:
    size_px, stride = args.imgsz or info.image_size_px, max_stride(info.variant)
    if size_px < stride or size_px % stride:
        raise UserError(
            "The command line cannot be used",
            [
                f"--imgsz: {size_px} given, but {info.variant} takes multiples of {stride}. Set it to {max(1, size_px // stride) * stride}."
            ],
        )
    return size_px


def _finder(args: argparse.Namespace, *, multi_label: bool) -> Finder:
    return Finder(args.score_threshold, args.iou_threshold, multi_label=multi_label)


def _count(found: Detections, names: Sequence[str]) -> str:
    counts = {name: int((found.classes == klass).sum()) for klass, name in enumerate(names)}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} given, but it must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
