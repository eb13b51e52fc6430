"""Lets a new run wait for one that saves after its launcher has ended: a shell's loop starts the next one at once.

Each rank that saves without its launcher makes a file that names its process. The file counts while the process lives.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from dsyolo.base.launcher import process_name
from dsyolo.cluster.agreed_port import own_folder

START = "saving-"
MOST_S = 240.0  # less than other machines' ranks wait for this one's
POLL_S = 0.2
log = logging.getLogger(__name__)


def announce() -> None:
    """Let runs that start on this machine know that this rank still saves."""
    folder, name = own_folder(), process_name(os.getpid())
    if folder and name:
        with contextlib.suppress(OSError):
            (folder / f"{START}{name}").touch()


def wait_for_others(
    *, logs: bool, folder: Path | None = None, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Wait until no other process of this user on this machine still saves, at most `MOST_S`; say so in one line."""
    folder, end, has_logged = folder or own_folder(), time.monotonic() + MOST_S, not logs
    while folder and (others := _others(folder)):
        if time.monotonic() > end:
            log.warning("process %d still saves; this run starts beside it.", others[0])
            return
        if not has_logged:
            log.info("another run on this machine still saves (process %d): waiting for it", others[0])
        has_logged = True
        sleep(POLL_S)


def _others(folder: Path) -> list[int]:
    """Return the other processes that still save, and remove the files of those that have gone."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob(f"{START}*")):
            name = path.name.removeprefix(START)
            pid = int(pid_text) if (pid_text := name.partition("-")[0]).isdecimal() else 0
            if pid and process_name(pid) == name:
                found += [pid] if pid != os.getpid() else []
            else:
                path.unlink(missing_ok=True)
    return found
