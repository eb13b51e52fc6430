"""`dsyolo sample`: generate a small synthetic data set."""

import argparse
from pathlib import Path

from dsyolo.base.text import escaped
from dsyolo.data.synthetic import draw_sample


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: the folder, the number of images and the seed."""
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to make")
    parser.add_argument("--images", type=int, default=400, metavar="N", help="default: 400")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Draw the data set; print the path of its data.yaml; return 0."""
    print(escaped(str(draw_sample(args.dst, num_images=args.images, seed=args.seed))))
    return 0
