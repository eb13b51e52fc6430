"""Reads pickles as plain data: an interpreter of their operations that never imports or calls what a pickle names.

Python's own unpickler runs whatever function a file names. This one follows the same operations (pickletools), makes
plain values of those that are plain, and for the rest an `Inert` that has a name and a state and does nothing. What may
be made is the caller's choice; all other names are refused.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_OPERATIONS = 5_000_000
_IGNORED = frozenset(("PROTO", "FRAME"))
_VALUES = frozenset(
    (
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
    )
    + (
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
    )
    + ("BINBYTES8", "BYTEARRAY8")
)
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleRefusedError(ValueError):
    """The pickle is damaged, or asks for something that is not plain data. The message says what."""


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names, as `module.name`. It is never looked up."""

    path: str


@dataclass(eq=False)
class Inert:
    """An object of a class that is not plain: the class's name, and what its constructor and state would get."""

    path: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


class PlainUnpickler:
    """Follows the operations of one pickle.

    Args:
        makes: what a call of a name makes of its arguments, by name. A name without an entry cannot be called.
        may_be: whether a class may have objects in the file, by its name; they become `Inert`.
        persistent: what a persistent id stands for, such as a tensor's storage.
    """

    def __init__(
        self,
        makes: Mapping[str, Callable[..., Any]],
        may_be: Callable[[str], bool],
        persistent: Callable[[Any], Any],
    ) -> None:
        self._makes, self._may_be, self._persistent = makes, may_be, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, data: bytes) -> Any:
        """Return the value of a pickle. Raise PickleRefusedError where it is not one of plain data."""
        try:
            for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
                if count > MOST_OPERATIONS:
                    raise PickleRefusedError("it has more operations than any weights need")
                if operation.name == "STOP":
                    return self._stack.pop()
                self._follow(operation.name, argument)
        except PickleRefusedError:
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as error:
            raise PickleRefusedError(f"it is damaged ({type(error).__name__}: {error})") from None
        raise PickleRefusedError("it has no end")

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument if name == "GLOBAL" else None)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif name in ("PERSID", "BINPERSID"):
            stack.append(self._persistent(argument if name == "PERSID" else stack.pop()))
        elif name in _TUPLES:
            values = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            stack.append(tuple(values))
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            values = self._to_mark()
            stack.append(tuple(values) if name == "TUPLE" else values)
        elif name not in _IGNORED:
            self._change(name)

    def _change(self, name: str) -> None:
        """Follow an operation that makes or changes an object."""
        stack = self._stack
        if name == "DICT":
            stack.append(self._set({}, self._to_mark()))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set(stack[-1], [key, value])
        elif name == "SETITEMS":
            values = self._to_mark()
            self._set(stack[-1], values)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if name == "APPEND" else self._to_mark()
            if not isinstance(stack[-1], list):
                raise PickleRefusedError(f"it adds items to {_shown(stack[-1])}")
            stack[-1].extend(values)
        elif name == "REDUCE":
            args, called = stack.pop(), stack.pop()
            stack.append(self._call(called, args))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                stack.pop()
            args, called = stack.pop(), stack.pop()
            stack.append(self._object(called, args))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], dict):
                return  # attributes of an ordered dictionary, such as a state dict's versions of modules
            if not isinstance(stack[-1], Inert):
                raise PickleRefusedError(f"it sets the state of {_shown(stack[-1])}")
            stack[-1].state = state
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise PickleRefusedError(f"it has the operation {name}, which plain data do not need")

    def _to_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _name(self, argument: str | None) -> None:
        if argument is None:
            name, module = self._stack.pop(), self._stack.pop()
        else:
            module, _, name = argument.partition(" ")
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleRefusedError("it names a class by something else than text")
        path = f"{module}.{name}"
        if path not in self._makes and not self._may_be(path):
            raise PickleRefusedError(f"it names {path}, which no weights need")
        self._stack.append(Named(path))

    def _call(self, called: Any, args: Any) -> Any:
        if not isinstance(called, Named) or not isinstance(args, tuple):
            raise PickleRefusedError(f"it calls {_shown(called)}")
        if called.path == "copyreg._reconstructor" or called.path == "copy_reg._reconstructor":
            return self._object(args[0], ())
        if called.path not in self._makes:
            raise PickleRefusedError(f"it calls {called.path}, which no weights need")
        return self._makes[called.path](*args)

    def _object(self, made: Any, args: Any) -> Any:
        if not isinstance(made, Named) or not isinstance(args, tuple):
            raise PickleRefusedError(f"it makes an object of {_shown(made)}")
        return self._makes[made.path](*args) if made.path in self._makes else Inert(made.path, args)

    def _set(self, target: Any, values: list[Any]) -> Any:
        into = target.items if isinstance(target, Inert) else target
        if not isinstance(into, dict):
            raise PickleRefusedError(f"it sets items of {_shown(target)}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # The hash of a tuple of tuples can take for ever.
            if not (key is None or isinstance(key, str | bytes | int | float)):
                key = f"<{_shown(key)}>"
            into[key] = value
        return target


def _shown(value: Any) -> str:
    return value.path if isinstance(value, Named | Inert) else type(value).__name__
