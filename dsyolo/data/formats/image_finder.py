"""Finds the image files that annotations name, whatever machine and system the names come from."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dsyolo.base.safe_io import names_in
from dsyolo.base.text import on_disk

_DRIVE = re.compile(r"^[A-Za-z]:/")
_LOCAL_FILES = re.compile(r"^.*[?&]d=")  # Label Studio: /data/local-files/?d=images/1.jpg


def as_posix(name: str) -> str:
    """Return a path with a Windows path's separators as `/`."""
    return name.replace("\\", "/")


class ImageFinder:
    """Finds files by name in a few folders, first as they are named, then by their last part.

    Args:
        folders: in the order in which they are searched.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(dict.fromkeys(folders))
        self._listed: dict[str, dict[str, str]] = {}

    def find(self, name: str) -> tuple[Path, str] | None:
        """Return the file, and its path relative to the folder that it was found in; None if there is none.

        Raises:
            PermissionError: a folder may not be searched.
        """
        for relative in dict.fromkeys((name, _DRIVE.sub("/", as_posix(_LOCAL_FILES.sub("", name))))):
            if relative and (found := self._at(relative)):
                return found
        last = PurePosixPath(as_posix(_LOCAL_FILES.sub("", name))).name
        return self._at(last) if last else None

    def _at(self, relative: str) -> tuple[Path, str] | None:
        if PurePosixPath(relative).is_absolute():
            return None
        for folder in self._folders:
            at = on_disk(f"{folder}{os.sep}{relative}")  # as the file system spells it
            if _is_file(at):
                return Path(at), str(PurePosixPath(at.removeprefix(f"{folder}{os.sep}")))
        for folder in self._folders:  # 1.JPG for 1.jpg, as on other systems
            at = on_disk(f"{folder}{os.sep}{relative}")
            parent, name = os.path.split(at)
            own = self._names(parent).get(name.casefold())
            if own and _is_file(os.path.join(parent, own)):
                found = PurePosixPath(at.removeprefix(f"{folder}{os.sep}")).with_name(own)
                return Path(parent, own), str(found)
        return None

    def _names(self, folder: str) -> dict[str, str]:
        """Return names in a folder by their folded ones; an ambiguous one is left out."""
        if folder not in self._listed:
            names: dict[str, str] = {}
            try:
                entries = names_in(folder)
            except PermissionError:
                raise
            except (OSError, ValueError):  # longer than any name, or with a zero byte
                entries = []
            for entry in entries:
                names[entry.casefold()] = "" if entry.casefold() in names else entry
            self._listed[folder] = names
        return self._listed[folder]


def _is_file(path: str) -> bool:
    """Return whether a path is a file. Raise PermissionError where that may not be known."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError:
        raise
    except (OSError, ValueError):  # none, longer than any name, or with a zero byte
        return False
