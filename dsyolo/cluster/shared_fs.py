"""Whether all hosts see one and the same folder: a sign that the first rank leaves there shows on the others."""

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

SIGN_S = 10.0  # network file systems show a new file after some seconds


def appears(sign: Path) -> bool:
    """Whether a file or folder shows here, some seconds after another host made it."""
    end = time.monotonic() + SIGN_S
    while True:
        if sign.parent.is_dir() and sign.name in os.listdir(sign.parent):  # a listing asks the server again
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def check_shared(folder: Path, world: World) -> None:
    """That all hosts see the same `folder`, into which every rank writes its share of a checkpoint. All ranks call it.

    Raises:
        UserError: on all ranks; a host has another folder of that name.
    """
    if world.local_size == world.size:
        return

    def leave_a_sign() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".seen-", dir=folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be used", [f"{error.strerror}. Name another."]) from None

    def look() -> None:
        if not appears(sign):
            rule = f"{socket.gethostname()} does not see there what rank 0 writes"
            remedy = "Put --project on storage that all hosts share"
            raise UserError(f"{folder} is not one folder for all hosts", [f"{rule}. {remedy}."])

    sign = run_on_rank0_and_broadcast(world, leave_a_sign)
    try:
        all_ranks_or_raise(look)
    finally:
        if world.is_main_process:
            shutil.rmtree(sign, ignore_errors=True)
