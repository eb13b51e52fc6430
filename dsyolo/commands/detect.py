"""`dsyolo detect`: detect objects in images and draw them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.base.text import escaped
from dsyolo.commands.sources import expanded
from dsyolo.commands.weights_options import add_weights_options, load
from dsyolo.config.messages import cannot_hold_files
from dsyolo.data.formats.yolo import list_images
from dsyolo.data.images import check_image, read_rgb
from dsyolo.data.labels import Problem

MANY_IMAGES = 20  # from here on one line for all of them
MOST_PROBLEMS = 5
FILES = {
    "save_txt": "also write the objects of each image as a label file",
    "save_conf": "with the score as the last column of these",
    "save_json": "also write predictions.json, results in COCO's form",
    "save_csv": "also write predictions.csv, a row for each object",
    "save_crop": "also write each object as a picture of its own",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: the weights, the images, and the folder of the pictures."""
    add_weights_options(parser, score=0.25, iou=0.45)
    text = "images, folders, patterns like 'photos/*.jpg', or .txt files that list images"
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help=text)
    out = Path("detections")
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help=f"default: {out}")
    for option, text in FILES.items():
        parser.add_argument(f"--{option}", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Write a picture per image and print its objects, or those of all images where there are many; return 0.

    Raises UserError where the weights, the images or the folder cannot be used.
    """
    from dsyolo.inference.result_files import ResultFiles  # late, so that `--help` does not wait for torch
    from dsyolo.tracking.plots import draw, save

    if args.save_conf and not args.save_txt:
        rule = "it is a column of the label files. Give --save_txt too."
        raise UserError("The command line cannot be used", [f"--save_conf: given alone, but {rule}"])
    pictures = _pictures(list(dict.fromkeys(list_images(expanded(args.sources)))), args.out)
    if problem := cannot_hold_files(args.out):
        raise UserError(f"--out {args.out} cannot be used", [problem])
    network = load(args, multi_label=False)
    names = network.class_names
    files = ResultFiles(args.out, names, **{option[5:]: getattr(args, option) for option in FILES})
    files.refuse_existing(list(pictures.values()))
    args.out.mkdir(parents=True, exist_ok=True)
    total: Counter[int] = Counter()
    num_written, is_long = 0, len(pictures) >= MANY_IMAGES
    for path, picture in pictures.items():
        size_hw, reason, detail = check_image(path)
        image_rgb = None if size_hw is None else read_rgb(path, size_hw, max(size_hw))
        if image_rgb is None:
            print(Problem(str(path), 0, reason, detail), file=sys.stderr)
            continue
        (detections,) = network.detect([image_rgb])
        save(picture, draw(image_rgb, detections, names))
        files.add(path, picture, image_rgb, detections)
        num_written += 1
        counts = Counter(detections.classes.tolist())
        total += counts
        if not is_long:
            print(escaped(f"{path}: {_listed(counts, names)} -> {picture}", lines=False))
    if not num_written:
        raise UserError(
            "No picture was written", [f"none of the {len(pictures):,} images can be read: see above."]
        )
    for written in files.close():
        print(escaped(f"written: {written}", lines=False))
    if is_long:
        print(escaped(f"{num_written:,} images: {_listed(total, names)} -> {args.out}", lines=False))
    return 0


def _pictures(images: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return the path of each image's picture. Raise UserError where it is an image's own, or that of two pictures."""
    problems: list[str] = []
    pictures: dict[Path, Path] = {}
    image_of: dict[Path, Path] = {}
    inputs = {_file_id(path) for path in images if path.exists()}
    for path in images:
        picture = out / (path.name if path.suffix.lower() in (".jpg", ".png") else f"{path.name}.png")
        if picture.exists() and _file_id(picture) in inputs:
            problems.append(f"{picture}: it is one of the images given. Name another folder by --out.")
        elif other := image_of.get(picture):
            remedy = "Run them separately, each with its own --out"
            problems.append(f"{picture}: both {other} and {path} would be written there. {remedy}.")
        pictures[path], image_of[picture] = picture, path
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more."] if len(problems) > MOST_PROBLEMS else []
        raise UserError("No picture was written", [*problems[:MOST_PROBLEMS], *more])
    return pictures


def _file_id(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _listed(counts: Mapping[int, int], names: Sequence[str]) -> str:
    """Return how many objects of each class there are, in the order of the classes."""
    return ", ".join(f"{counts[klass]:,} {names[klass]}" for klass in sorted(counts)) or "nothing"
