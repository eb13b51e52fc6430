"""Opens safetensors files, whatever the bytes of their path."""

import os
from pathlib import Path
from typing import Any

from safetensors import safe_open


def open_tensors(path: Path) -> Any:
    """Return `safe_open` of a file. Raise what it raises: SafetensorError and OSError.

    It refuses a path whose bytes are no UTF-8, as a folder's name in GBK. Such a file is opened by its descriptor.
    """
    try:
        os.fsencode(path).decode()
        return safe_open(path, framework="pt")
    except UnicodeDecodeError:
        handle = os.open(path, os.O_RDONLY)
    try:
        return safe_open(
            f"/dev/fd/{handle}", framework="pt"
        )  # maps the file, and needs the descriptor no longer
    finally:
        os.close(handle)
