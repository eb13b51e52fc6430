"""The deepspeed launcher of this machine, if it started this process. Imports nothing but Python's own library."""

import contextlib
import os
import re
import signal
from pathlib import Path

INTERRUPTED = 130  # exit status after Ctrl-C, saved or not: a script that starts 75 again must not start this
# The program that starts `deepspeed.launcher.launch` on one machine: a script, or a module after python -m.
_RUNNER = re.compile(r"deepspeed(\.pt)?|ds|deepspeed\.launcher\.runner")


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
            if any(_RUNNER.fullmatch(Path(word).name) for word in _command_line(runner)[:3]):
                self._parents[launch] = self.runner = runner

    def has_gone(self) -> bool:
        """Return whether a process of it has ended, or its parent's has."""
        return any(_parent(child) != parent for child, parent in self._parents.items())

    def end(self) -> None:
        """End the launcher, which a terminal's Ctrl-C has reached too, before it prints a traceback or kills the ranks.

        `deepspeed` waits 0.25 s for its child before it raises KeyboardInterrupt, and `launch` kills ranks that still
        save after 30 s.
        """
        if self.has_gone():
            return
        for pid, number in ((self.runner, signal.SIGTERM), (self.launch, signal.SIGKILL)):
            with contextlib.suppress(OSError):
                if pid:
                    os.kill(pid, number)


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
    fields = _stat(parent)  # ids are used again, but not in the same tick of the kernel's clock
    return f"{parent}-{fields[19]}" if len(fields) > 19 else ""


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
