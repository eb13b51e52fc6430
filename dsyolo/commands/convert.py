"""`dsyolo convert`: bring a data set into YOLO format."""

import argparse
from pathlib import Path

from dsyolo.base.text import escaped
from dsyolo.data.formats.format_registry import FORMATS, convert


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: the format, and both folders."""
    own = "or a format of your own as FILE.py:CLASS (docs/data_format.md)"
    parser.add_argument("format", metavar="FORMAT", help=f"{', '.join(sorted(FORMATS))}, {own}")
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of the data set")
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to make")


def run(args: argparse.Namespace) -> int:
    """Convert; print what was converted and what was left out; return 0."""
    print(escaped(convert(args.format, args.src, args.dst).summary()))
    return 0
