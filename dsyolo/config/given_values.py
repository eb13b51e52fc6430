"""The values that a command line gives, and the words that gave them: two that differ are a problem, not the last one."""

from typing import Any


class GivenValues:
    """Values by an option's destination.

    A restart appends options to those of the user (base/environment.py: RESTARTED), and these replace what was given.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._given_by: dict[str, tuple[Any, str]] = {}
        self._is_restart = False

    def begin_restart(self) -> None:
        """Let what follows replace what was given so far."""
        self._is_restart = True
        self._given_by.clear()

    def put(self, name: str, value: Any, given_as: str) -> str | None:
        """Keep the value of a destination; return the problem where other words gave it another value."""
        problem = self.compare(name, value, given_as)
        if problem is None:
            self.values[name] = value
        return problem

    def compare(self, name: str, value: Any, given_as: str) -> str | None:
        """Remember which words gave this value; return the problem where others gave another one."""
        before, given_by = self._given_by.setdefault(name, (value, given_as))
        if self._is_restart or _same(before, value):
            return None
        return f"{given_as}: given, and so is {given_by}. Leave one out."


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are one, as 0.5 and .5 are in text."""
    if one == other:
        return True
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return False
