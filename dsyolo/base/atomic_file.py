"""Writes files that a reader finds complete or not at all, and never through a link that somebody planted."""

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINK = "it is a symbolic link, and a run writes through none. Remove it"
HARD_LINK = "it is a hard link, so that another file would change with it. Put a copy in its place"
NO_FILE = "it is a folder, device or pipe, and it must be a file. Remove it"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a file to write beside `path`, and move it there. After an error what was there is kept.

    Nobody can plant a link there before: its name is drawn by chance. It is without the file's own, which may be as long
    as the file system allows.
    """
    part = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        own = (part, str(part), None)  # None: it could be opened, and not written
        if error.errno and error.filename in own:
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        part.unlink(missing_ok=True)  # left only by a failure, such as a full disk


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside `path` and move it there. Raise OSError; a file that was there is then kept."""
    with replacing(path) as part, open(part, "xb") as file:
        file.write(data)


def open_without_link(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file, made where there is none.

    Raises:
        OSError: `path` is a symbolic link, a file with a second name, or a folder, device or pipe.
    """
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(errno.ELOOP, LINK, str(path)) from None
        if error.errno == errno.ENXIO:  # a pipe that nobody reads
            raise OSError(errno.ENXIO, NO_FILE, str(path)) from None
        raise
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return handle
    os.close(handle)
    raise OSError(errno.ELOOP, HARD_LINK if stat.S_ISREG(status.st_mode) else NO_FILE, str(path))


def open_appending(path: Path) -> io.FileIO:
    """Open a file to write at its end, without a buffer. Raise OSError as `open_without_link`."""
    return io.FileIO(open_without_link(path, os.O_WRONLY | os.O_APPEND), "ab")


def refuse_planted_link(folder: Path) -> None:
    """Raise OSError where a folder of a run is a link of another user. One's own may lead to a larger disk."""
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        raise OSError(errno.ELOOP, "it is a symbolic link of another user. Remove it", str(folder))
