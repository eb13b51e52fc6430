"""Folders that ranks share: whether all hosts see the same one, free names in it, and what is moved to these."""

import os
import shutil
import socket
import tempfile
import time
from itertools import chain, count
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.cluster.collectives import all_ranks_or_raise, run_on_rank0_and_broadcast
from dsyolo.cluster.world import World

APPEARS_S = 10.0  # network file systems show a new file after some seconds


def appears(marker: Path) -> bool:
    """Return whether a file or folder appears here within seconds after another host created it."""
    end = time.monotonic() + APPEARS_S
    # A listing asks the server again.
    while not (marker.parent.is_dir() and marker.name in os.listdir(marker.parent)):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def free_path(path: Path) -> Path:
    """Return `path`, or `path`.1, .2, ...: the first that does not exist."""
    paths = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(1)))
    return next(one for one in paths if not one.exists())


def set_aside(path: Path) -> Path | None:
    """Rename a file, or a folder with files in it, or raise UserError. Return its new path; None if there are none."""
    if not (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        return None
    free = free_path(path)
    try:
        path.rename(free)
    except OSError as error:
        rule = f"it cannot be renamed to {free.name}: {error.strerror}"
        raise UserError(f"{path} cannot be used", [f"{rule}. Choose another folder with --name."]) from None
    return free


def check_shared(folder: Path, world: World) -> None:
    """Raise UserError on all ranks, which all call it, if a host has another `folder` of that name.

    Every rank writes its share of a checkpoint there.
    """
    if world.local_size == world.size:
        return

    def create_marker() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".seen-", dir=folder))
        except OSError as error:
            problem = f"{error.strerror}. Choose another folder with --project."
            raise UserError(f"{folder} cannot be used", [problem]) from None

    def look() -> None:
        if not appears(marker):
            rule = f"{socket.gethostname()} does not see the files that rank 0 writes there"
            remedy = "Put --project on storage that all hosts share"
            raise UserError(f"{folder} is not one folder for all hosts", [f"{rule}. {remedy}."])

    marker = run_on_rank0_and_broadcast(world, create_marker)
    try:
        all_ranks_or_raise(look)
    finally:
        if world.is_main_process:
            shutil.rmtree(marker, ignore_errors=True)
