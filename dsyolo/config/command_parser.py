"""Reads a command line by an argparse parser's own description, and reports all of its mistakes at once.

argparse stops at the first mistake. Here it describes the options and prints the help; the words are read one after the
other. Dashes and underscores are the same in an option's name, and flags may be written `--ema`, `--no-ema` or `--ema=false`.
Options that people bring from other programs, as `--img 640` or `imgsz=640`, are looked up in `foreign_options.py`.
"""

import argparse
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dsyolo.base.environment import RESTARTED
from dsyolo.base.errors import UserError
from dsyolo.config.foreign_defaults import is_default
from dsyolo.config.foreign_options import FLAG, FLAG_RULE, MANY, MAYBE, SIZES, SWITCH, Foreign, Taken
from dsyolo.config.foreign_tables import foreign_option, training_option
from dsyolo.config.given_values import GivenValues, is_option
from dsyolo.config.messages import did_you_mean

NUMBERS = {int: "a whole number", float: "a number"}
KEY_VALUE = re.compile(r"([A-Za-z]\w*)=(.*)", re.DOTALL)
NOT_GIVEN = ("None", "null")  # as Python and YAML write an argument that is left out
NUMBER = re.compile(r"-?\d+(\.\d*)?|-?\.\d+")


class CommandLine:
    """The options and positional arguments of one command, read word by word.

    Args:
        parser: describes the options.
        command: the command's name in the table of foreign options.
        unknown: returns the problem of an option that nobody knows.
    """

    def __init__(
        self, parser: argparse.ArgumentParser, command: str, unknown: Callable[[str], str] | None = None
    ) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []  # what an alias changes, for the start of the run
        self._values = GivenValues()
        self.given = self._values.values
        self._parser, self._command, self._unknown = parser, command, unknown
        actions = parser._actions
        self._options = {canonical(name): one for one in actions for name in one.option_strings}
        self._positionals = [one for one in actions if not one.option_strings]
        self._queue: deque[str] = deque()
        self._num_own = 0  # at the front, put there for an alias
        self._rest: list[tuple[str, str]] = []  # the option that gave it, if any; the argument
        self._word = ""  # the option that is read, as the user wrote it, with its value
        self._left_out: list[str] = []  # other programs' defaults

    def read(self, argv: Sequence[str]) -> None:
        """Read all words into `given`, `problems` and `notes`. `--help` prints the help and ends the process with 0."""
        self._queue.extend(argv)
        while self._queue:
            is_own = self._num_own > 0
            self._num_own = max(0, self._num_own - 1)
            word = self._queue.popleft()
            self._word = self._word if is_own else word
            if word == "--" and not is_own:
                self._rest += [("", one) for one in self._queue]
                break
            if word == RESTARTED:
                self._values.begin_restart()
                continue
            begins_option = word == "-h" or is_option(word)
            match = None if is_own or begins_option else KEY_VALUE.fullmatch(word)
            if not begins_option and not (match and self._is_key(match[1])):
                self._rest.append((self._values.option if is_own else "", word))
            elif is_own:
                self._option(word, is_own)
            else:
                self._begin(canonical(word.partition("=")[0]))
                self._key_value(match[1], match[2]) if match else self._option(word, is_own)
                self.notes += self._values.end(self._word)
        self._assign_positionals()
        if self._left_out:
            rule = "defaults of other programs, left out; dsyolo's own hold (docs/from_yolov5.md)"
            self.notes.append(f"{', '.join(dict.fromkeys(self._left_out))}: {rule}")
        self.problems = list(dict.fromkeys(self.problems))
        for action in self._options.values():
            if action.required and action.dest not in self.given and not self._was_refused(action):
                name = action.option_strings[0]
                line = f"{name}: missing ({action.help or action.dest})."
                self.problems += [] if line in self.problems else [line]

    def namespace(self) -> argparse.Namespace:
        """Return what argparse would: all destinations, with their defaults where nothing was given."""
        values = {}
        for action in self._parser._actions:
            if argparse.SUPPRESS not in (action.dest, action.default):
                default, convert = action.default, action.type
                values[action.dest] = (
                    convert(default) if isinstance(default, str) and callable(convert) else default
                )
        return argparse.Namespace(**{**values, **self.given})

    # ---- options

    def _begin(self, key: str) -> None:
        """Take back what earlier words of the same option gave."""
        action = self._options.get(key)
        option = action.dest if isinstance(action, argparse.BooleanOptionalAction) else key
        self._values.begin(option)
        self._rest = [one for one in self._rest if one[0] != option]

    def _option(self, word: str, is_own: bool) -> None:
        name, equals, value = word.partition("=")
        key = canonical(name)
        action = self._options.get(key)
        foreign = None if is_own else self._known_elsewhere(key)
        if isinstance(action, argparse._HelpAction):
            self._parser.print_help()
            self._parser.exit()
        if foreign:
            given = value if equals else self._foreign_value(foreign, action)
            self._foreign(name, foreign, given, action)
        elif action:
            self._own(name, action, value if equals else None)
        else:
            if not equals and self._queue and not is_option(self._queue[0]):
                self._queue.popleft()  # most likely its value
            self.problems.append(self._unknown_option(key))

    def _own(self, name: str, action: argparse.Action, value: str | None) -> None:
        if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
            switch = True if value is None else SWITCH.get(value.lower())
            if switch is None:
                self.problems.append(FLAG_RULE.format(name=name, value=value))
                return
            is_negated = canonical(name).startswith("no_") and isinstance(
                action, argparse.BooleanOptionalAction
            )
            if isinstance(action, argparse.BooleanOptionalAction):
                self._put(action.dest, switch != is_negated)
            elif switch:
                self._put(action.dest, action.const)
            return
        if value is None:
            value = self._next_value(may_lack=action.nargs == "?")
        if value is None and action.nargs == "?":
            self._put(action.dest, action.const)
        elif value is None:
            self.problems.append(f"{name}: expected one argument. See --help.")
        else:
            self._put(action.dest, self._converted(name, action, value))

    def _put(self, dest: str, value: Any) -> None:
        self.problems += self._values.put(dest, value, self._word)

    def _converted(self, name: str, action: argparse.Action, value: str) -> Any:
        """Return the value in the type of its option; a problem is added where that cannot be."""
        converted: Any = value
        try:
            if callable(action.type):
                converted = action.type(value)
        except argparse.ArgumentTypeError as error:
            text = f"{name}: {error}"
            self.problems.append(text if text.endswith((".", "?")) else f"{text}.")
            return action.default
        except (TypeError, ValueError):
            rule = next((text for kind, text in NUMBERS.items() if kind is action.type), "of another form")
            self.problems.append(f"{name}: {value} given, but it must be {rule}. See --help.")
            return action.default
        if action.choices is not None and converted not in action.choices:
            known = [str(one) for one in action.choices]
            hint = did_you_mean(str(converted), known) or "See --help."
            self.problems.append(f"{name}: {value} given, but it must be one of {', '.join(known)}. {hint}")
        return converted

    def _next_value(self, *, may_lack: bool = False) -> str | None:
        """Take the next word, unless it is an option; where there may be no value, unless it is `key=value`, too."""
        if not self._queue or is_option(self._queue[0]):
            return None
        match = KEY_VALUE.fullmatch(self._queue[0]) if may_lack else None
        return None if match and self._is_key(match[1]) else self._take()

    def _take(self) -> str:
        word = self._queue.popleft()
        self._word += f" {word}"
        return word

    def _unknown_option(self, key: str) -> str:
        begun = sorted({name for name in self._options if name.startswith(key)})
        if len(begun) == 1 and len(key) > 1:
            return f"--{key}: unknown option. Did you mean --{begun[0]}?"
        if self._unknown:
            return self._unknown(key)
        return f"--{key}: unknown option. {did_you_mean(key, self._options, '--') or 'See --help.'}"

    def _was_refused(self, action: argparse.Action) -> bool:
        """Return whether a problem is about this option already."""
        names = tuple(f"{start}{name}" for name in action.option_strings for start in ("", "argument "))
        return any(line.startswith(tuple(f"{name}:" for name in names)) for line in self.problems)

    # ---- options of other programs

    def _is_key(self, key: str) -> bool:
        if not self._positionals:  # then it can be nothing else
            return True
        return key in self._options or self._known_elsewhere(key, is_key=True) is not None

    def _known_elsewhere(self, key: str, *, is_key: bool = False) -> Foreign | None:
        found = foreign_option(self._command, key, is_key=is_key)
        return found or (None if key in self._options else training_option(self._command, key))

    def _key_value(self, key: str, value: str) -> None:
        """Read `key=value`, as Ultralytics' command line has it."""
        action = self._options.get(key)
        foreign = self._known_elsewhere(key, is_key=True)
        if value in NOT_GIVEN and (action or foreign) and not (foreign and foreign.takes(value)):
            return
        if foreign:
            self._foreign(f"{key}=", foreign, value, action)
        elif action:
            self._own(f"--{key}", action, value)
        else:
            self.problems.append(self._unknown_option(key))

    def _foreign_value(self, foreign: Foreign, action: argparse.Action | None) -> str | None:
        """Take the words that are the option's value from the command line."""
        if foreign.arity == FLAG or (action is not None and action.nargs == 0):
            return None
        if foreign.arity not in (MANY, SIZES):
            return self._next_value(may_lack=foreign.arity == MAYBE)
        first = self._next_value() if foreign.arity == SIZES else None
        taken = [] if first is None else [first]
        is_open = bool(first) and str(first).startswith("[")
        while self._queue and (
            (is_open and not taken[-1].endswith("]") and "--" not in self._queue[0]) or self._is_number()
        ):
            taken.append(self._take())
        return " ".join(taken) or None

    def _is_number(self) -> bool:
        """Return whether the next word is a number, and no file of that name among a command's arguments."""
        word = self._queue[0]
        return bool(NUMBER.fullmatch(word)) and not (self._positionals and os.path.exists(word))

    def _foreign(
        self, name: str, foreign: Foreign, value: str | None, action: argparse.Action | None
    ) -> None:
        if value is None and foreign.arity not in (FLAG, MAYBE, MANY):
            self.problems.append(f"{name}: expected one argument. See --help.")
            return
        outcome = foreign.outcome(value)
        shown = f"{name}{value}" if name.endswith("=") else name
        key = canonical(name.rstrip("="))
        is_left_out = isinstance(outcome, str) and is_default(key, value)
        problems = []
        if foreign.is_unreadable(value) and not (outcome is None and action):
            problems = [FLAG_RULE.format(name=f"--{key}", value=value)]
        elif action is None and (is_left_out or isinstance(outcome, Taken)) and foreign.arity != SIZES:
            problems = self._values.compare(f"{key} of other programs", foreign.key_of(value), self._word)
        if problems:
            self.problems += problems
        elif is_left_out:
            self._left_out.append(self._word)
        elif outcome is None and action:
            self._own(f"--{action.dest}" if name.endswith("=") else name, action, value)
        elif isinstance(outcome, Taken):
            missing = [word for word in outcome.arguments if word.startswith("--") and not self._has(word)]
            if missing:
                rule = f"an option of `dsyolo train` ({' '.join(outcome.arguments)})"
                self.problems.append(f"{shown}: {rule}, and not of `dsyolo {self._command}`. Leave it out.")
                return
            self._queue.extendleft(reversed(outcome.arguments))
            self._num_own += len(outcome.arguments)
            self.notes += [f"{shown}: {outcome.note}"] if outcome.note else []
        else:
            self.problems.append(f"{shown}: {outcome or 'not here. See --help.'}")

    def _has(self, word: str) -> bool:
        return canonical(word.partition("=")[0]) in self._options

    def _assign_positionals(self) -> None:
        rest = [word for _, word in self._rest]
        for place, action in enumerate(self._positionals):
            later = len(self._positionals) - place - 1
            if action.nargs in ("+", "*"):
                taken, rest = rest[: max(0, len(rest) - later)], rest[max(0, len(rest) - later) :]
                if taken or action.nargs == "*":
                    name = str(action.metavar or action.dest)
                    self.given[action.dest] = [self._converted(name, action, one) for one in taken]
            else:
                taken, rest = rest[:1], rest[1:]
                if taken:
                    name = str(action.metavar or action.dest)
                    self.given[action.dest] = self._converted(name, action, taken[0])
            if not taken and action.nargs != "*":
                self.problems.append(f"{action.metavar or action.dest}: missing ({action.help}).")
        self.problems += [
            f"{one}: not an option. Options start with --, and flags take no value: --ema, --no-ema."
            for one in rest
        ]


def canonical(name: str) -> str:
    """Return an option's name without its dashes at the front, and with underscores: --save-every is save_every."""
    return name.lstrip("-").replace("-", "_")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], command: str, notes: list[str] | None = None
) -> argparse.Namespace:
    """Return the arguments of a command, as argparse would. Raise UserError with all mistakes of the command line.

    `notes` gets the lines on options of other programs that were taken.
    """
    line = CommandLine(parser, command)
    line.read(argv)
    if notes is not None:
        notes += line.notes
    if line.problems:
        raise UserError("The command line cannot be used", line.problems)
    return line.namespace()
