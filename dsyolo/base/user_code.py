"""Loads a class or function that the user names on the command line, as in `my_module:MyHook` or `my_file.py:build`.

Only options of the command line come here, never what a data set, weights or checkpoint says.
"""

import importlib
import importlib.util
import sys
import traceback
import zlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dsyolo.base.errors import UserError

T = TypeVar("T")


def is_reference(name: str) -> bool:
    """Return whether `name` has the form `MODULE:NAME` or `FILE.py:NAME`."""
    return ":" in name


def load_object(reference: str, option: str) -> Any:
    """Return the object that `MODULE:NAME` or `FILE.py:NAME` names, as it was given to `option`, such as --model.

    Raises UserError where the module cannot be imported, or has no such name.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        rule = f"it must be MODULE:NAME or FILE.py:NAME. Write {option} my_file.py:MyName"
        raise _error(option, reference, rule)
    try:
        module = (
            _from_file(Path(where).absolute()) if where.endswith(".py") else importlib.import_module(where)
        )
    except (Exception, SystemExit) as error:  # whatever the user's own module raises
        rule = f"{where} cannot be imported: {type(error).__name__}: {error}"
        raise _error(option, reference, rule) from error
    try:
        return getattr(module, name)
    except AttributeError:
        known = ", ".join(key for key in vars(module) if not key.startswith("_"))
        raise _error(option, reference, f"{where} has no {name}. It has: {known}") from None


def load_class(reference: str, option: str, base: type[T], page: str) -> type[T]:
    """Return a class as `load_object` does. Raise UserError where it is not derived from `base`; `page` tells how."""
    found = load_object(reference, option)
    if not (isinstance(found, type) and issubclass(found, base)):
        rule = f"it is not a subclass of {base.__module__}.{base.__name__}. Derive it from that class: {page}"
        raise _error(option, reference, rule)
    return found


def raised(error: BaseException) -> str:
    """Describe what the user's code raised, and where: in the last line of it that is no library's and not ours."""
    libraries = (str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix, "<")
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if not frame.filename.startswith(libraries)] or frames)[-1]
    return f"it raised {type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


@cache
def _from_file(path: Path) -> ModuleType:
    """Run a file once in a process, so that its classes and variables stay the same."""
    name = f"dsyolo_user_{path.stem}_{zlib.crc32(bytes(path)):08x}"  # two files may have one name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes pickle to loader workers
    spec.loader.exec_module(module)
    return module


def _error(option: str, reference: str, rule: str) -> UserError:
    return UserError("This command cannot start", [f"{option}: {reference} given, but {rule}."])
