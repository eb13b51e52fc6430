"""Recognises a failed allocation, whoever raises it."""

from __future__ import annotations

import torch

# What allocators say besides torch.OutOfMemoryError: torch's on a CPU, oneDNN's, C++'s.
_SIGNS = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
