"""Writes files that a reader finds complete or not at all, and never through a link that somebody planted."""

import errno
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LINK = "it is a symbolic link, and a run writes through none. Remove it"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a file to write beside `path`, and move it there. After an error what was there is kept.

    Nobody can plant a link there before: its name is drawn by chance.
    """
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # left only by a failure, such as a full disk


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside `path` and move it there. Raise OSError; a file that was there is then kept."""
    with replacing(path) as part, open(part, "xb") as file:
        file.write(data)


def open_without_link(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file, made where there is none. Raise OSError where `path` is a link."""
    try:
        return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(errno.ELOOP, LINK, str(path)) from None
        raise


def open_appending(path: Path) -> io.FileIO:
    """Open a file to write at its end, without a buffer. Raise OSError as `open_without_link`."""
    return io.FileIO(open_without_link(path, os.O_WRONLY | os.O_APPEND), "ab")


def refuse_planted_link(folder: Path) -> None:
    """Raise OSError where a folder of a run is a link of another user. One's own may lead to a larger disk."""
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        raise OSError(errno.ELOOP, "it is a symbolic link of another user. Remove it", str(folder))
