"""Options of YOLOv5's and Ultralytics' commands: taken where they mean the same here, else answered with the replacement.

Names come from their public documentation. The tables are in foreign_tables.py; docs/from_yolov5.md has them for people.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# What follows an option on the command line: nothing, one value, a value or nothing, any number of numbers.
# ... or an image size, which may be a list.
FLAG, ONE, MAYBE, MANY, SIZES = "flag", "one", "maybe", "many", "sizes"
FLAG_RULE = "{name}: {value} given, but it is a flag: true or false. Write {name} alone, or leave it out."
SWITCH = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


class Taken(NamedTuple):
    """An option that is taken: the words to read in its place, and what there is to say about it."""

    arguments: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Foreign:
    """One option of another program.

    Args:
        answer: the problem where it cannot be taken; `{value}` is what was given. Empty: the option of ours of that
            name reads the value.
        option: ours that takes the same values.
        by_value: the words for certain values, in lower case; "true" stands for a flag alone.
        reads: returns what is taken for a value, the problem as text, or None to go on.
    """

    answer: str = ""
    arity: str = ONE
    option: str = ""
    by_value: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""  # for values that are taken by other words
    reads: Callable[[str], Taken | str | None] | None = None

    def outcome(self, value: str | None) -> Taken | str | None:
        """Return what to read instead, or the problem as text, or None where the option of ours of that name reads it."""
        text = "true" if value is None and self.arity != ONE else value or ""
        arguments = self.by_value.get(self.key_of(text))
        if arguments is not None:
            return Taken(arguments, self.note if arguments else "")
        if self.reads and (found := self.reads(text)):
            return found
        if self.option:
            return Taken((f"--{self.option}={text}",), self.note)
        return self.answer.replace("{value}", text) or None

    def takes(self, value: str) -> bool:
        """Return whether a value has words of ours."""
        return self.key_of(value) in self.by_value

    def is_unreadable(self, value: str | None) -> bool:
        """Return whether a flag was given a value that is neither true nor false."""
        if self.arity != FLAG or value is None or self.takes(value):
            return False
        return value.lower() not in SWITCH

    def key_of(self, value: str | None) -> str:
        """Return a value as the tables have it: true for a flag alone, true and false for yes, 1, no, 0 and so on."""
        text = "true" if value is None else value.lower()
        switch = str(SWITCH[text]).lower() if text in SWITCH else text
        return switch if text not in self.by_value and switch in self.by_value else text


def flag(option: str, negated: str = "", *, note: str = "", answer: str = "") -> Foreign:
    """Return a flag that is one of ours: `option` is its words where it is on, `negated` where it is off."""
    by_value = {"true": tuple(option.split()), "false": tuple(negated.split())}
    return Foreign(answer, FLAG, by_value=by_value, note=note)


def ignored(*values: str, answer: str, arity: str = ONE) -> Foreign:
    """Return an option that is answered, but for values that ask for what happens anyway."""
    return Foreign(answer, arity, by_value=dict.fromkeys(values, ()))
