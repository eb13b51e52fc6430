"""Prepares the process of a training before torch is imported, which takes seconds."""

import os
import signal
import sys
from typing import Any

from dsyolo.base.environment import all_variables, wait_passively
from dsyolo.base.launcher import INTERRUPTED, Launcher
from dsyolo.base.limits import exit_without_memory


def prepare_training() -> None:
    """Refuse too little memory for torch, let its threads wait passively, and end in one line on Ctrl-C until the run does."""
    exit_without_memory()  # the import of torch would end without a word
    wait_passively()
    if (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):  # else it is ignored, as under nohup or &
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: Any) -> None:
    Launcher().end()
    if all_variables().get("RANK", "0") == "0":
        sys.stderr.write("\nInterrupted before the run began: nothing to save.\n")
        sys.stderr.flush()
    os._exit(INTERRUPTED)
