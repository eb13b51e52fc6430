"""Writes files that a reader finds complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a file to write beside `path`, and move it there. After an error what was there is kept."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # left only by a failure, such as a full disk


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside `path` and move it there. Raise OSError; a file that was there is then kept."""
    with replacing(path) as part:
        part.write_bytes(data)
