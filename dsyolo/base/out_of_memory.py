"""Recognises a failed allocation of any library."""

import torch

# Messages of allocators that raise no torch.OutOfMemoryError: torch's on a CPU, oneDNN's, C++'s.
_MESSAGES = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a memory object")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on the device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
