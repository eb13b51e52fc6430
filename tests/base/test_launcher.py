"""The launcher of a rank: which process it is, and what ends it. Its processes are stand-ins of the same names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT

from dsyolo.base import launcher
from dsyolo.base.launcher import Launcher

STARTS = """
import subprocess, sys
child = subprocess.Popen({command})
open({pid!r}, "w", encoding="utf-8").write(str(child.pid))
child.wait()
"""
RANK = """
import signal, time
from dsyolo.base.launcher import Launcher
launcher = Launcher()
signal.signal(signal.SIGINT, lambda *_: print("background", launcher.end(), flush=True))
print("ready", bool(launcher.runner), flush=True)
while True:
    time.sleep(0.01)
"""


class Family:
    """A rank with its parent, as `deepspeed.launcher.launch`, and the parent's, a script `name`."""

    def __init__(self, folder: Path, name: str, rank: str = RANK) -> None:
        pids = [folder / "launch.pid", folder / "rank.pid"]
        rank_command = [sys.executable, "-c", rank]
        (folder / "launch.py").write_text(
            STARTS.format(command=rank_command, pid=str(pids[1])), encoding="utf-8"
        )
        # As `deepspeed` starts it, by an argument that is the module's name.
        launch_command = [sys.executable, "-u", str(folder / "launch.py"), "deepspeed.launcher.launch"]
        script = folder / name
        script.write_text(STARTS.format(command=launch_command, pid=str(pids[0])), encoding="utf-8")
        restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        self.runner = subprocess.Popen(
            [sys.executable, "-u", str(script)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=restore,
        )
        self.ready = self.line()
        self.launch, self.rank = (int(path.read_text(encoding="utf-8")) for path in pids)

    def line(self) -> str:
        assert self.runner.stdout
        return self.runner.stdout.readline().strip()

    def end(self) -> None:
        for pid in (self.rank, self.launch, self.runner.pid):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.runner.communicate()


def is_alive(pid: int) -> bool:
    return bool(launcher.process_name(pid))


def has_ended(pid: int) -> bool:
    end = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.fixture
def families() -> Iterator[list[Family]]:
    started: list[Family] = []
    yield started
    for family in started:
        family.end()


def test_both_launchers_end_and_the_rank_stays(tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path, "deepspeed")
    families.append(family)
    assert family.ready == "ready True"
    os.kill(family.rank, signal.SIGINT)
    assert family.line() == "background True"
    assert family.runner.wait(20) == -signal.SIGTERM
    assert has_ended(family.launch)
    assert is_alive(family.rank)


def test_a_launch_that_its_runner_has_left_is_ended_too(tmp_path: Path, families: list[Family]) -> None:
    """A busy rank hears of Ctrl-C after the runner has ended by itself: `launch` would kill it while it saves."""
    family = Family(tmp_path, "deepspeed")
    families.append(family)
    family.runner.kill()
    family.runner.wait(20)
    assert is_alive(family.launch)
    os.kill(family.rank, signal.SIGINT)
    assert family.line() == "background True"
    assert has_ended(family.launch)
    assert is_alive(family.rank)


def test_a_launch_of_something_else_stays(tmp_path: Path, families: list[Family]) -> None:
    family = Family(tmp_path, "wrapper")
    families.append(family)
    assert family.ready == "ready False"
    os.kill(family.rank, signal.SIGINT)
    assert family.line() == "background False"
    assert is_alive(family.launch)
    assert family.runner.poll() is None


HEARS = """
import time
from dsyolo.cluster.preemption import PreemptionHandler
from dsyolo.cluster.world import World
PreemptionHandler(World(0, 1, 0, 1))
print("ready", flush=True)
time.sleep(60)
"""


def test_the_command_that_is_printed_ends_what_saves_in_the_background(
    tmp_path: Path, families: list[Family]
) -> None:
    family = Family(tmp_path, "deepspeed", HEARS)
    families.append(family)
    assert family.runner.stderr
    os.kill(family.rank, signal.SIGTERM)
    assert "If the deepspeed launcher sent it, it kills what still saves after 30 s." in (
        family.runner.stderr.readline()
    )
    os.kill(family.rank, signal.SIGINT)
    assert family.runner.wait(20) == -signal.SIGTERM
    line = family.runner.stderr.readline()
    assert "the run saves in the background, after the prompt is back. Wait for 'saved after step'; " in line
    command = line.split("`")[1]
    assert command == f"kill -INT -{family.runner.pid}"
    time.sleep(0.6)  # sooner it would be the same Ctrl-C, passed on
    subprocess.run(["bash", "-c", command], check=True)
    assert has_ended(family.rank)
    assert "Interrupted again: this rank ends without saving." in family.runner.stderr.read()


@pytest.mark.parametrize(
    ("words", "is_runner"),
    [
        (["/venv/bin/python3.11", "/venv/bin/deepspeed", "--num_gpus", "2"], True),
        (["/venv/bin/python", "-u", "-m", "deepspeed.launcher.runner", "train.py"], True),
        (["python", "-um", "deepspeed.launcher.runner"], True),
        (["python", "-X", "utf8", "-W", "ignore", "-u", "-m", "deepspeed.launcher.runner"], True),
        (["python", "/x/deepspeed/launcher/runner.py"], True),
        (["deepspeed", "train.py"], True),
        (["/venv/bin/python", "/venv/bin/ds"], True),
        (["python", "wrapper.py", "deepspeed"], False),
        (["python", "-c", "deepspeed"], False),
        (["bash", "-c", "deepspeed"], False),
        (["sshd: deepspeed"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_a_runner_is_known_by_what_it_runs(
    monkeypatch: pytest.MonkeyPatch, words: list[str], is_runner: bool
) -> None:
    launch = os.getppid()
    lines = {launch: ["python", "-u", "-m", "deepspeed.launcher.launch"], 77: words}
    monkeypatch.setattr(launcher, "_command_line", lambda pid: lines[pid])
    monkeypatch.setattr(launcher, "_parent", lambda pid: {launch: 77}.get(pid, 0))
    assert Launcher().runner == (77 if is_runner else 0)


@pytest.mark.parametrize(
    ("runner", "parent", "init", "ends"),
    [
        (1, 0, "python", True),
        (77, 1, "/sbin/docker-init", True),
        (77, 1, "/usr/lib/systemd/systemd", False),
        (77, 50, "tini", False),
        (0, 1, "tini", False),
    ],
)
def test_a_container_that_ends_with_the_runner_is_named(
    monkeypatch: pytest.MonkeyPatch, runner: int, parent: int, init: str, ends: bool
) -> None:
    found = Launcher()
    found.runner = runner
    monkeypatch.setattr(launcher, "_command_line", lambda pid: [init])
    monkeypatch.setattr(launcher, "_parent", lambda pid: parent)
    fault = found.container_fault()
    assert bool(fault) == ends
    assert fault == "" or "launch/ranks.py" in fault
