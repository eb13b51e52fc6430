"""The cache of an index: a file outside the data folder, valid until an image or label file changes."""

import contextlib
import hashlib
import io
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np

from dsyolo.base.environment import read_environment
from dsyolo.base.safe_io import shortened
from dsyolo.data.index import ARRAYS, DatasetIndex, check_arrays
from dsyolo.data.labels import Problem


def default_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/dsyolo, else ~/.cache/dsyolo."""
    return read_environment().cache / "dsyolo"


def save_cache(cache_file: Path, key: str, index: DatasetIndex) -> None:
    """Write a SHA-256, then an .npz. A reader sees the old file or the new one, never a part.

    If the file cannot be written, there is only a warning.
    """
    header = {"key": key, "num_classes": index.num_classes, "problems": index.problems}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        **{name: getattr(index, name) for name in ARRAYS},
    )
    payload = buffer.getbuffer()
    temporary = cache_file.with_name(f".{cache_file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
        os.replace(temporary, cache_file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        fault = f"the index could not be cached, so the next run reads all files again: {error}"
        warnings.warn(fault, stacklevel=3)


def load_cache(cache_file: Path, key: str) -> DatasetIndex | None:
    """Return what was saved for `key`; None if there is nothing, or, with a warning, if the file is damaged."""
    try:
        if not cache_file.is_file():  # a pipe would wait for a writer
            return None
        raw = cache_file.read_bytes()
    except OSError:
        return None
    payload = memoryview(raw)[32:]
    if hashlib.sha256(payload).digest() != raw[:32]:
        warnings.warn(f"{cache_file} is damaged: all files are read again", stacklevel=3)
        return None
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if header["key"] != key:
                return None
            arrays = {name: stored[name] for name in ARRAYS}
            index = DatasetIndex(header["num_classes"], **arrays, problems=_problems(header["problems"]))
            check_arrays(index)
            return index
    except (
        Exception
    ) as error:  # whatever NumPy, zipfile and JSON raise for bytes that nobody wrote on purpose
        what = shortened(f"{type(error).__name__}: {error}")
        warnings.warn(f"{cache_file} is not used, and all files are read again: {what}", stacklevel=3)
        return None


def _problems(rows: object) -> tuple[Problem, ...]:
    """Return the problems of a header. Raise ValueError where they are of other types."""
    kinds = (str, int, str, str)
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == 4 and all(type(a) is b for a, b in zip(row, kinds, strict=True))
        for row in rows
    ):
        raise ValueError("its problems have another form")
    return tuple(Problem(*row) for row in rows)
