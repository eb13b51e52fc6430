"""The words that a message tells the user to resume a run by."""

import sys
from collections.abc import Sequence

from dsyolo.base.environment import RESTARTED

CHOICES = ("never", "always", "auto")
# YAML's and Ultralytics' words for two of them.
WORDS = {"true": "always", "yes": "always", "1": "always", "false": "never", "no": "never", "0": "never"}
AUTO = "--resume auto"
SAME = "the same command"


def way_on(argv: Sequence[str] | None = None) -> str:
    """Return what resumes the run of a command line (None: of this process).

    `--resume auto` beside a `--resume PATH` would not be in that run's folder: there the same command does.
    """
    given, arguments = "", list(sys.argv[1:] if argv is None else argv)
    for word, after in zip(arguments, [*arguments[1:], "--"], strict=False):
        if word == RESTARTED:
            break
        key, _, value = word.partition("=")
        if key == "--resume" and "=" not in word:
            given = "" if after.startswith("--") else after
        elif key in ("--resume", "resume"):
            given = value
    return AUTO if given.lower() in ("", *CHOICES, *WORDS) else SAME


def same_command(argv: Sequence[str] | None = None) -> str:
    """Return `way_on` as what is to be run: the same command, with what has to be added."""
    way = way_on(argv)
    return SAME if way == SAME else f"{SAME} with {way}"
