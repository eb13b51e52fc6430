"""A run's folder belongs to one run at a time: to whose first rank holds the lock in it.

The kernel gives the lock back when that process ends, however it ends, on a disk of this machine or of a network.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.cluster import preemption as stop

FILE = ".lock"
LOGS = "logs"  # log files of the ranks, in the run\'s folder
LOOK_S = 0.2
BUSY = (
    stop.STATUS
)  # as of a run that can go on later: a lock that a machine left that went down is given back after a while
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


class RunLock:
    """Of the first rank of a run on `folder`; it lasts as long as the process, and is not handed on by fork or exec."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._file: int | None = None
        self._has_made_folder = False

    def take(self, wait_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Waits so long for the run that has it, which may be saving its last checkpoint.

        Args:
            is_over: whether to wait no longer.

        Raises:
            UserError: another run has it still, or the folder cannot be written to.
        """
        folder, end, told = self._path.parent, time.monotonic() + wait_s, False
        try:
            self._has_made_folder = not folder.exists()
            while not self._is_taken():
                holder = self._path.read_text(errors="replace")[:200].strip() or "another process"
                if time.monotonic() > end or is_over():
                    rule = f"a run is in it: {holder}. Wait for its end, or stop it; or name another folder by --name."
                    raise UserError(f"{folder} cannot be used", [rule], BUSY)
                if not told:
                    print(
                        f"{folder} is in use by {holder}: waiting for it, {wait_s:.0f} s at most", flush=True
                    )
                told = True
                time.sleep(LOOK_S)
        except OSError as error:
            raise UserError(f"{folder} cannot be used", [f"{self._path}: {error.strerror}."]) from None

    def leave(self) -> None:
        """Release the lock, and remove a folder that this run has made and left nothing but logs in."""
        if self._file is None:
            return
        folder, logs = self._path.parent, self._path.parent / LOGS
        if self._has_made_folder and set(os.listdir(folder)) <= {FILE, LOGS}:
            shutil.rmtree(logs, ignore_errors=True)
            self._path.unlink()
            folder.rmdir()
        os.close(self._file)
        self._file = None

    def _is_taken(self) -> bool:
        # The lock goes with the first descriptor of the file that this process closes: it opens none where it has it.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                return False
            what = f"{self._path.parent} is on a disk without locks: start no second run in it"
            print(f"WARNING: {what}.", file=sys.stderr)
        if not os.fstat(file).st_nlink:  # whoever had it has removed it with the folder
            os.close(file)
            return False
        self._file = file
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        return True


def set_aside(folder: Path) -> Path | None:
    """Renames a folder that has files in it, so that nothing writes over them: where they are then; None: there are none.

    Raises:
        UserError: it cannot be renamed.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    names = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
    free = next(name for name in names if not name.exists())
    try:
        folder.rename(free)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be used", [f"it cannot be renamed to {free.name}: {error.strerror}."]
        ) from None
    return free
