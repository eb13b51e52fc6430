"""Checks that all hosts see the same folder: a file that rank 0 creates must appear on the others."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.cluster.collectives import all_ranks_or_raise, run_on_rank0_and_broadcast
from dsyolo.cluster.world import World

APPEARS_S = 10.0  # network file systems show a new file after some seconds


def appears(marker: Path) -> bool:
    """Whether a file or folder appears here within seconds after another host created it."""
    end = time.monotonic() + APPEARS_S
    while True:
        if marker.parent.is_dir() and marker.name in os.listdir(
            marker.parent
        ):  # a listing asks the server again
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def check_shared(folder: Path, world: World) -> None:
    """Check that all hosts see the same `folder`, where every rank writes its share of a checkpoint. All ranks call it.

    Raises:
        UserError: on all ranks; a host has another folder of that name.
    """
    if world.local_size == world.size:
        return

    def create_marker() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".seen-", dir=folder))
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used", [f"{error.strerror}. Name another folder by --project."]
            ) from None

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
