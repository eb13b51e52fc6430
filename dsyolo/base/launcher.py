"""The deepspeed launcher of this machine, if it started this process. Imports nothing but Python's own library."""

import contextlib
import os
import re
import signal
from pathlib import Path

INTERRUPTED = 130  # exit status after Ctrl-C, saved or not: a script that starts 75 again must not start this
# The program that starts `deepspeed.launcher.launch` on one machine: a script, or a module after python -m.
_RUNNER = re.compile(r"deepspeed(\.pt)?|ds|deepspeed\.launcher\.runner|(.*/)?deepspeed/launcher/runner\.py")
_PYTHON = re.compile(r"(python|pypy)[\d.]*")
_MODULE = re.compile(r"-[bBdEiIOPqsSuvx]*m(.*)")  # alone, or behind other options in one word
_INITS = {"docker-init", "tini", "tini-static", "dumb-init", "catatonit"}  # end a container with their child


class Launcher:
    """The deepspeed launcher on this machine, if it started this rank.

    `deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks. SIGTERM ends the first alone, and SIGKILL
    either: then nobody could stop the ranks.
    """

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}  # by process id
        self.launch = self.runner = 0  # process ids; 0 where there is none
        launch = os.getppid()
        if "deepspeed.launcher.launch" in _command_line(launch):
            self._parents[os.getpid()] = self.launch = launch
            runner = _parent(launch)
            if _RUNNER.fullmatch(_program(_command_line(runner))):
                self._parents[launch] = self.runner = runner

    def has_gone(self) -> bool:
        """Return whether a process of it has ended, or its parent's has."""
        return any(_parent(child) != parent for child, parent in self._parents.items())

    def end(self) -> bool:
        """End the launcher, which a terminal's Ctrl-C has reached too, before it prints a traceback or kills the ranks.

        `deepspeed` waits 0.25 s for its child before it raises KeyboardInterrupt, and `launch` kills ranks that still
        save after 30 s: so it is ended although `deepspeed` has gone. A `launch` that something else has started, as
        pdsh, stays: nobody there would see how it ends.

        Return whether the user's prompt comes back before the ranks end.
        """
        if not self.runner:
            return False
        with contextlib.suppress(OSError):
            if _parent(self.launch) == self.runner:
                os.kill(self.runner, signal.SIGTERM)
        with contextlib.suppress(OSError):
            if os.getppid() == self.launch:
                os.kill(self.launch, signal.SIGKILL)
        return True

    def container_fault(self) -> str:
        """Return why this container ends with `deepspeed`, and so before the ranks have saved; empty where it does not."""
        if self.runner != 1 and not (self.runner and _parent(self.runner) == 1 and _name_of_init() in _INITS):
            return ""
        rule = "this container ends with deepspeed, so Ctrl-C or `docker stop` kills ranks that still save"
        return f"{rule}. Start them by launch/ranks.py there, which waits for them (docs/faults.md)."


def parent_of_all_ranks() -> str:
    """Return a name that this machine's ranks share, and no other run's: of the process that started them all.

    Empty where that is not known: the ranks may have been started one by one.
    """
    parent = os.getppid()
    command = _command_line(parent)
    if not (
        "deepspeed.launcher.launch" in command or any(Path(word).name == "ranks.py" for word in command[:3])
    ):
        return ""
    return process_name(parent)


def process_name(pid: int) -> str:
    """Return a name of a process that no other one of this machine gets; empty if it has gone, or without /proc."""
    fields = _stat(pid)  # ids are used again, but not in the same tick of the kernel's clock
    return f"{pid}-{fields[19]}" if len(fields) > 19 and fields[0] not in "ZX" else ""


def _program(arguments: list[str]) -> str:
    """Return the script or module that a command line runs, without the script's folder; else the program's name."""
    name = Path(arguments[0]).name if arguments else ""
    if not _PYTHON.fullmatch(name):
        return name
    rest = iter(arguments[1:])
    for word in rest:
        if module := _MODULE.fullmatch(word):
            return module[1] or next(rest, "")
        if word == "-c":
            return ""
        if word in ("-X", "-W"):
            next(rest, "")
        elif not word.startswith("-"):
            return word if word.endswith("deepspeed/launcher/runner.py") else Path(word).name
    return name


def _name_of_init() -> str:
    return Path((_command_line(1) or [""])[0]).name


def _command_line(pid: int) -> list[str]:
    """Return a process's arguments; none if it has gone, or without /proc."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(pid: int) -> int:
    """Return the id of a process's parent; 0 if it has gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Return the fields of a process's status from its state on; none if it has gone, or without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(") ")[2].split()
