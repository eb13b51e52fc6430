"""Finds the image files that annotations name, whatever machine and system the names come from."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

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
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> tuple[Path, str] | None:
        """Return the file, and its path relative to the folder that it was found in; None if there is none."""
        for relative in dict.fromkeys((name, _DRIVE.sub("/", as_posix(_LOCAL_FILES.sub("", name))))):
            if relative and (found := self._at(relative)):
                return found, str(PurePosixPath(relative).with_name(found.name))
        last = PurePosixPath(as_posix(_LOCAL_FILES.sub("", name))).name
        found = self._at(last) if last else None
        return (found, found.name) if found else None

    def _at(self, relative: str) -> Path | None:
        for folder in self._folders:
            try:
                if not PurePosixPath(relative).is_absolute() and (folder / relative).is_file():
                    return folder / relative
            except (OSError, ValueError):  # longer than any name, or with a zero byte
                return None
        for folder in self._folders:  # 1.JPG for 1.jpg, as on other systems
            at = folder / relative
            own = (
                self._names(at.parent).get(at.name.casefold())
                if not PurePosixPath(relative).is_absolute()
                else None
            )
            if own and (at.parent / own).is_file():
                return at.parent / own
        return None

    def _names(self, folder: Path) -> dict[str, str]:
        """Return names in a folder by their folded ones; an ambiguous one is left out."""
        if folder not in self._listed:
            names: dict[str, str] = {}
            try:
                entries = sorted(path.name for path in folder.iterdir())
            except (OSError, ValueError):
                entries = []
            for entry in entries:
                names[entry.casefold()] = "" if entry.casefold() in names else entry
            self._listed[folder] = names
        return self._listed[folder]
