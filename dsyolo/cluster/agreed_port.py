"""The port of a run whose launcher left its default: rank 0 of one machine chooses it, and the others read it."""

import os
import stat
import tempfile
from pathlib import Path

from dsyolo.base.atomic_file import write_file
from dsyolo.base.environment import Environment
from dsyolo.base.launcher import parent_of_all_ranks
from dsyolo.base.safe_io import read_bytes

DEFAULT = 29500  # deepspeed's, and that of other launchers


class AgreedPort:
    """A file in which rank 0 writes its port for the ranks that the same launcher has started.

    Without it ranks of two runs on one machine would meet at the default port, in the store of one of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, port: int) -> None:
        """Write the port, on rank 0, which listens there. Raises OSError."""
        write_file(self._path, str(port).encode())

    def read(self) -> int | None:
        """Return the port; None while rank 0 has not written it."""
        try:
            return int(read_bytes(self._path, 64))
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        """Remove the file, once all ranks are here."""
        self._path.unlink(missing_ok=True)


def agreed_port(place: Environment) -> AgreedPort | None:
    """Return where the ranks of a run agree; None where the port was chosen, or they are not all on this machine."""
    if place.master_port != DEFAULT or place.size != place.local_size or place.under_torchrun:
        return None
    parent = parent_of_all_ranks()
    folder = own_folder()
    return AgreedPort(folder / f"port-{parent}") if parent and folder else None


def own_folder() -> Path | None:
    """Return a folder that this user alone can write to; None where somebody else has made it."""
    folder = Path(tempfile.gettempdir(), f"dsyolo-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if is_own else None
