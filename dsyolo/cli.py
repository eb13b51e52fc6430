"""`dsyolo <command>`: find the command's module and hand it the arguments."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dsyolo.base.errors import UserError
from dsyolo.base.start import prepare_training
from dsyolo.base.stdio import outlive_readers
from dsyolo.config import command_parser
from dsyolo.config.foreign_commands import answer_command, without_task

TRAIN = "train"  # has a parser of its own
# Modules, the others with `add_options(parser)` and `run(args) -> int`, imported when they are asked for.
COMMANDS = {
    TRAIN: ("dsyolo.train", "train a detector: the same as dsyolo/train.py"),
    "val": ("dsyolo.commands.val", "validate weights on a data set's val split"),
    "detect": ("dsyolo.commands.detect", "detect objects in images and draw them"),
    "convert": ("dsyolo.commands.convert", "bring a data set into YOLO format"),
    "sample": ("dsyolo.commands.sample", "generate a small synthetic data set"),
    "doctor": ("dsyolo.commands.doctor", "check whether a run can start on its hosts"),
    "plan": ("dsyolo.commands.plan", "find strategies that fit given GPUs, and their costs"),
    "simulate": (
        "dsyolo.commands.simulate",
        "compute what training on thousands of ranks would need, without running it",
    ),
    "scale": ("dsyolo.commands.scale", "train at several sizes, and report how it scales"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: the command's own, 2 for a mistake of the user's, or 128 + the signal."""
    argv = without_task(sys.argv[1:] if argv is None else argv, COMMANDS)
    if argv[:1] == [TRAIN]:
        prepare_training()
        outlive_readers()  # before train.py is imported, as in its own entry: loggers take hold of the streams
        return import_module(COMMANDS[TRAIN][0]).main(argv[1:], f"dsyolo {TRAIN}")
    try:
        args = parse(argv)
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
    """Parse a command and its options; `run` of the result is the command's function.

    Raises UserError with all mistakes of the command line.
    """
    answer_command(argv, COMMANDS)
    parser = argparse.ArgumentParser(prog="dsyolo", description="Train YOLOv5 detectors, and use them.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (path, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if argv[:1] == [name]:
            module = import_module(path)
            module.add_options(subparser)
            args = command_parser.parse(subparser, argv[1:], name)
            args.run = module.run
            return args
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
