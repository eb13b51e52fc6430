"""The limits that the system sets on a process, checked before a library ends in a traceback of its own.

Nothing here imports more than Python's own modules: under a small limit of memory even the import of torch fails.
"""

import os
import resource
import sys
from pathlib import Path

from dsyolo.base.errors import UserError

MIB = 1 << 20
# Address space, measured on Linux with torch 2.12: `import torch` 0.62 GiB, all of train.py 0.94 GiB (below, a
# library without an answer to a failed allocation ends the process), and the smallest run on a CPU 0.72 GiB more.
LEAST_TO_IMPORT = 1000 * MIB
LEAST_BESIDE_IMPORTS = 700 * MIB
SHM = Path("/dev/shm")
HEADLINE = "This process has too little of what the system gives"


def check_address_space(beside_imports: int | None = None) -> None:
    """Check the limit of this process's address space (`ulimit -v`) against what every run needs.

    Args:
        beside_imports: bytes that are still needed; None before the libraries are imported.

    Raises:
        UserError: the limit is lower.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    needed = LEAST_TO_IMPORT if beside_imports is None else _address_space() + beside_imports
    if limit < needed:
        rule = f"but at least {needed / 2**30:.1f} GiB are needed. Raise it: `ulimit -v unlimited`"
        raise UserError(HEADLINE, [f"address space: limited to {limit / 2**30:.1f} GiB, {rule}."])


def exit_without_memory() -> None:
    """Exit with status 2 where not even torch can be imported."""
    try:
        check_address_space()
    except UserError as error:
        sys.stderr.write(f"\n{error}\n\n")
        sys.exit(error.status)


def raise_open_files(needed: int) -> None:
    """Raise this process's limit of open files as far as the system allows.

    Raises:
        UserError: `needed` are more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # a system whose own maximum is lower
            pass
    if soft != resource.RLIM_INFINITY and soft < needed:
        rule = (
            f"but up to {needed} are needed. Raise it (`ulimit -n {max(1024, needed)}`), or lower --workers"
        )
        raise UserError(HEADLINE, [f"open files: limited to {soft}, {rule}."])


def check_shared_memory(needed: int, folder: Path = SHM) -> None:
    """Check the space for the batches that loader workers hand over.

    Raises:
        UserError: `needed` bytes are not free.
    """
    if fault := shared_memory_fault(needed, folder):
        raise UserError(HEADLINE, [fault])


def shared_memory_fault(needed: int, folder: Path = SHM) -> str | None:
    """Return why `needed` bytes of batches may not fit; None where they do, or where the system has no such folder."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    free = found.f_bavail * found.f_frsize
    if free >= needed:
        return None
    rule = f"but up to {needed / MIB:.1f} MiB are needed for batches"
    remedy = "Make it larger (docker run --shm-size, an emptyDir of medium Memory), or give --workers 0"
    return f"{folder}: {free / MIB:.1f} MiB free, {rule}. {remedy}."


def _address_space() -> int:
    """Return the bytes of this process's address space; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:")), 0)
