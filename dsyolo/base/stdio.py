"""stdout/stderr wrappers that survive a closed pipe, a full disk, and letters that the locale does not have."""

import io
import sys
from typing import Any


class _Lossy(io.FileIO):
    """Drops what cannot be written: the reader (a terminal, ssh) may be gone, or a log's disk full."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Wrap stdout and stderr. Call it before anything keeps a reference to them, as loggers do.

    Otherwise a run over ssh would end by BrokenPipeError at the first line that it prints after the connection is lost.
    """
    for name, handle in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start
            continue
        stream.flush()
        raw = io.BufferedWriter(_Lossy(handle, "wb", closefd=False))
        text = io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, text)


def degrade() -> None:
    """Have stdout and stderr write letters that the locale does not have as escapes, where Python would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
