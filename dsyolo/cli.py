"""`dsyolo <command>`: find the command's module and hand it the arguments."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.base.stdio import outlive_readers


class Command(NamedTuple):
    """A module with `add_options(parser)` and `run(args) -> int`; it is imported when its command is given."""

    module: str
    text: str


TRAIN = "train"  # has a parser of its own
COMMANDS: Mapping[str, Command] = {
    TRAIN: Command("dsyolo.train", "train a detector: the same as dsyolo/train.py"),
    "val": Command("dsyolo.commands.val", "validate weights on a data set's val split"),
    "detect": Command("dsyolo.commands.detect", "draw the objects that a network finds in images"),
    "convert": Command("dsyolo.commands.convert", "bring a data set into YOLO format"),
    "sample": Command("dsyolo.commands.sample", "draw a small data set to try things with"),
    "doctor": Command("dsyolo.commands.doctor", "check whether a run can start on its hosts"),
    "plan": Command("dsyolo.commands.plan", "find strategies that fit given GPUs, and their costs"),
    "simulate": Command("dsyolo.commands.simulate", "count a training on thousands of ranks, without them"),
    "scale": Command("dsyolo.commands.scale", "train at several sizes, and report how it scales"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: the command's own, 2 for a mistake of the user's, or 128 + the signal."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [TRAIN]:
        outlive_readers()  # before train.py is imported, as in its own entry: loggers take hold of the streams
        return import_module(COMMANDS[TRAIN].module).main(argv[1:])
    args = parse(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except UserError as error:
        sys.stderr.write(f"\n{error}\n\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return 130
    except BrokenPipeError:  # as by `| head`; what Python flushes at its exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command and its options; `run` of the result is the command's function."""
    parser = argparse.ArgumentParser(prog="dsyolo", description="Train YOLOv5 detectors, and use them.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.text, description=command.text)
        if argv[:1] == [name]:
            module = import_module(command.module)
            module.add_options(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
