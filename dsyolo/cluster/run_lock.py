"""Locks a run's folder, so that one run at a time writes to it.

The kernel releases the lock when rank 0's process ends, however it ends, on local and on network disks.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from dsyolo.base.atomic_file import open_without_link
from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import read_bytes, shortened
from dsyolo.cluster import preemption

FILE = ".lock"
POLL_S = 0.2
BUSY = preemption.STATUS  # try again later: the lock of a machine that went down is released after a while
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
log = logging.getLogger(__name__)


class RunLock:
    """The lock of rank 0 on `folder`. It lasts as long as the process, and is not inherited by fork or exec.

    Args:
        disposable: name of a folder inside, which alone is no reason to keep `folder`.
    """

    def __init__(self, folder: Path, *, disposable: str = FILE) -> None:
        self._path, self._disposable = folder / FILE, disposable
        self._file: int | None = None
        self._has_made_folder = False

    def take(self, wait_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Take the lock. Wait `wait_s`, or until `is_over`, for a run that has it and may be saving.

        Raises:
            UserError: another run still has it, or the folder cannot be written to.
        """
        folder, end, has_logged = self._path.parent, time.monotonic() + wait_s, False
        try:
            self._has_made_folder = not folder.exists()
            while not self._is_taken():
                holder = shortened(read_bytes(self._path).decode(errors="replace")) or "another process"
                if time.monotonic() > end or is_over():
                    rule = f"a run is in it: {holder}. Wait for its end, or stop it; or choose another folder with --name."
                    raise UserError(f"{folder} cannot be used", [rule], BUSY)
                if not has_logged:
                    log.info("%s is in use by %s: waiting for it, %.0f s at most", folder, holder, wait_s)
                has_logged = True
                time.sleep(POLL_S)
        except OSError as error:
            raise UserError(f"{folder} cannot be used", [f"{self._path}: {error.strerror}."]) from None

    def leave(self) -> None:
        """Release the lock, and remove a folder that this run has made and left nothing in but what is disposable."""
        if self._file is None:
            return
        folder = self._path.parent
        if self._has_made_folder and set(os.listdir(folder)) <= {FILE, self._disposable}:
            shutil.rmtree(folder / self._disposable, ignore_errors=True)
            self._path.unlink()
            folder.rmdir()
        os.close(self._file)
        self._file = None

    def _is_taken(self) -> bool:
        # Closing any descriptor of the file releases the lock, so a process that has it opens no other.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open_without_link(self._path, os.O_RDWR)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(file)
                return False
            log.warning("%s is on a disk without locks. Start no second run in it.", self._path.parent)
        if not os.fstat(file).st_nlink:  # its last holder has removed it with the folder
            os.close(file)
            return False
        self._file = file
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        return True
