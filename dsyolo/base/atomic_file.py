"""Writes files that a reader finds complete or not at all."""

import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside `path` and move it there. Raise OSError; a file that was there is then kept."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
