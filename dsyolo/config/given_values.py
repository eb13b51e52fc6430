"""The values that a command line gives, and the words that gave them: one option's last words hold, two options argue.

A wrapper's own words come before those of its user (`dsyolo train --resume auto "$@"`), so the later ones of one option
replace the earlier, with a note. Two options that give one thing two values are a problem that names both.
"""

import re
from typing import Any


class GivenValues:
    """Values by an option's destination.

    A restart appends options to those of the user (base/environment.py: RESTARTED), and these replace what was given.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._given_by: dict[str, tuple[Any, str, str]] = {}  # value, as it was given, option
        self._given_as: dict[str, str] = {}  # of an option
        self.option = ""  # that is read
        self._is_restart = False

    def begin_restart(self) -> None:
        """Let what follows replace what was given so far."""
        self._is_restart = True
        self._given_by.clear()
        self._given_as.clear()

    def begin(self, option: str) -> None:
        """Begin to read an option; what its earlier words gave is taken back."""
        self.option = option
        for name in [name for name, (_, _, given_by) in self._given_by.items() if given_by == option]:
            self.values.pop(name, None)
            del self._given_by[name]

    def end(self, given_as: str) -> list[str]:
        """Return a note where the option that was begun was given before, with another value."""
        before = self._given_as.get(self.option)
        self._given_as[self.option] = given_as
        if before is None or _same(_value(before), _value(given_as)):
            return []
        return [f"{before}: replaced by {given_as}, which comes later"]

    def put(self, name: str, value: Any, given_as: str) -> list[str]:
        """Keep the value of a destination; return the problem where another option gave it another value."""
        problems = self.compare(name, value, given_as)
        if not problems:
            self.values[name] = value
        return problems

    def compare(self, name: str, value: Any, given_as: str) -> list[str]:
        """Remember which words gave this value; return the problem where another option gave another one."""
        before, given_by, _ = self._given_by.setdefault(name, (value, given_as, self.option))
        if self._is_restart or _same(before, value):
            return []
        return [f"{given_as}: given, and so is {given_by}. Leave one out."]


def _value(given_as: str) -> str:
    """Return what stands behind the option's name; the whole of a flag."""
    name, _, value = given_as.replace("=", " ", 1).partition(" ")
    return value or name


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are one, as 0.5 and .5 are in text."""
    if one == other:
        return True
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return False


def is_option(word: str) -> bool:
    """Return whether a word of a command line is an option and no value: a name has no space, as argparse has it too."""
    return word.startswith("--") and len(word) > 2 and not re.search(r"\s", word.partition("=")[0])
