"""Standard output and error that a run outlives: where nobody takes what is said any more, it is lost, and no more."""

from __future__ import annotations

import io
import sys


class _Unheard(io.FileIO):
    """Writes what it can. The reader may be gone (a terminal, ssh), or the disk of a log full."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Replaces this process's streams by such ones. Call it before anything else takes hold of them, as loggers do.

    Python ends a program by BrokenPipeError when it prints to a pipe that nobody reads: so a run over ssh would end,
    and lose its last steps, by the first line that it prints after the connection is gone.
    """
    for name, handle in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed from the beginning
            continue
        stream.flush()
        raw = io.BufferedWriter(_Unheard(handle, "wb", closefd=False))
        text = io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
        setattr(sys, name, text)
