"""Ranks of one machine agree on a port where the launcher's default is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsyolo.base.environment import Environment
from dsyolo.cluster import agreed_port
from dsyolo.cluster.agreed_port import DEFAULT, AgreedPort

# A launcher: its name makes its ranks known to each other.
LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, sys.argv[1], str(rank), sys.argv[2]]) for rank in (1, 0)]
sys.exit(max(rank.wait() for rank in ranks))
"""
RANK = """
import sys, time
from pathlib import Path
import torch
from dsyolo.base.environment import Environment
from dsyolo.cluster import agreed_port
from dsyolo.cluster.rendezvous import Rendezvous
rank, port = map(int, sys.argv[1:])
agreed_port.DEFAULT = port
place = Environment(rank, 2, rank, 2, "127.0.0.1", port, None, Path())
agreed = agreed_port.agreed_port(place)
assert agreed is not None
meet = Rendezvous(rank, 2, "127.0.0.1", port, wait_s=60, agreed=agreed)
meet.wait()
print(rank, meet.port, flush=True)
if rank == 0:
    time.sleep(1)  # the store goes with this process
meet.close()
"""
ALONE = Environment(0, 2, 0, 2, "127.0.0.1", DEFAULT, None, Path())


def test_runs_that_start_together_at_one_port_each_meet_their_own(tmp_path, monkeypatch):
    from ranks import free_port

    (tmp_path / "ranks.py").write_text(LAUNCHER, encoding="utf-8")
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    port = str(free_port())
    env = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, str(tmp_path / "ranks.py"), str(tmp_path / "rank.py"), port]
    runs = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [sorted(run.communicate(timeout=120)[0].split("\n")[:-1]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    ports = []
    for lines in found:
        (first, port_of_first), (second, port_of_second) = (line.split() for line in lines)
        assert (first, second) == ("0", "1")
        assert port_of_first == port_of_second
        ports.append(port_of_first)
    assert len(set(ports)) == 3
    assert port in ports
    (folder,) = tmp_path.glob("dsyolo-*")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("place", "parent", "agrees"),
    [
        (ALONE, "7-1", True),
        (ALONE, "", False),  # started one by one
        (ALONE._replace(master_port=4000), "7-1", False),  # chosen
        (ALONE._replace(local_size=1), "7-1", False),  # two hosts
        (ALONE._replace(under_torchrun=True), "7-1", False),
    ],
)
def test_only_ranks_of_one_machine_agree_where_nobody_chose_the_port(
    tmp_path, monkeypatch, place, parent, agrees
):
    monkeypatch.setattr(agreed_port.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(agreed_port, "parent_of_all_ranks", lambda: parent)
    found = agreed_port.agreed_port(place)
    assert (found is not None) == agrees


def test_a_folder_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(agreed_port.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(agreed_port, "parent_of_all_ranks", lambda: "7-1")
    own = tmp_path / f"dsyolo-{os.getuid()}"
    own.mkdir()
    own.chmod(0o777)
    assert agreed_port.agreed_port(ALONE) is None
    own.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "elsewhere")
    assert agreed_port.agreed_port(ALONE) is None


def test_the_port_is_there_between_writing_and_removing(tmp_path):
    file = AgreedPort(tmp_path / "port-7-1")
    assert file.read() is None
    file.write(4711)
    assert file.read() == 4711
    file.remove()
    assert file.read() is None
