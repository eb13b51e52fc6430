"""`dsyolo <command>`: find the command's module and hand it the arguments."""

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from dsyolo import __version__
from dsyolo.base.environment import restart_in_utf8
from dsyolo.base.errors import UserError, path_error
from dsyolo.base.limits import check_address_space
from dsyolo.base.start import prepare_training
from dsyolo.base.stdio import degrade, outlive_readers
from dsyolo.base.text import escaped
from dsyolo.config import command_parser
from dsyolo.config.foreign_commands import answer_command, without_task

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
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
    """Run a command; return the exit status.

    The command's own; 2 for a mistake of the user's, 70 where memory runs out, 74 where standard output cannot be
    written, or 128 + the signal.
    """
    if argv is None:  # the command itself, and no call from Python
        restart_in_utf8()
    argv = without_task(sys.argv[1:] if argv is None else argv, COMMANDS)
    if argv[:1] == [TRAIN]:
        prepare_training()
        outlive_readers()  # before train.py is imported, as in its own entry: loggers take hold of the streams
    degrade()
    warnings.showwarning = _show_warning
    try:
        check_address_space()
        if argv[:1] == [TRAIN]:
            return import_module(COMMANDS[TRAIN][0]).main(argv[1:], f"dsyolo {TRAIN}")
        return _run(argv)
    except UserError as error:
        return _end(2, str(error))
    except KeyboardInterrupt:
        return _end(130, "Interrupted.")
    except BrokenPipeError:  # as by `| head`
        _drop_output()
        return 141
    except OSError as error:
        if error.filename is None and error.errno in UNWRITABLE:
            _drop_output()
            return _end(74, f"Standard output cannot be written: {error.strerror}.")
        if error.errno in UNWRITABLE:
            return _end(74, f"{error.filename} cannot be written: {error.strerror}. What was there is kept.")
        if found := path_error(error):
            return _end(2, str(found))
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _end(
            70, "This command ran out of memory. Give it more, or fewer and smaller images at a time."
        )


def _run(argv: Sequence[str]) -> int:
    try:
        args = parse(argv)
        return args.run(args)
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _end(status: int, message: str) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"\n{escaped(message)}\n\n")
    return status


def _drop_output() -> None:
    """Drop what waits for standard output: what Python flushes at its exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: BaseException) -> bool:
    from dsyolo.base.out_of_memory import is_out_of_memory  # late: it imports torch

    return is_out_of_memory(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"WARNING: {escaped(str(message))}\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command and its options; `run` of the result is the command's function.

    Raises UserError with all mistakes of the command line.
    """
    answer_command(argv, COMMANDS)
    parser = argparse.ArgumentParser(prog="dsyolo", description="Train YOLOv5 detectors, and use them.")
    parser.add_argument("--version", "-V", action="version", version=f"dsyolo {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (path, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        if argv[:1] == [name]:
            module = import_module(path)
            module.add_options(subparser)
            notes: list[str] = []
            args = command_parser.parse(subparser, argv[1:], name, notes)
            if sys.stderr is not None:
                sys.stderr.write("".join(f"Note: {escaped(line)}\n" for line in notes))
            args.run = module.run
            return args
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
