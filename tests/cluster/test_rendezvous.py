"""Ranks that meet before they join: whoever dies, stops or never comes is named, and all end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import free_port, run_ranks

from dsyolo.base.errors import UserError
from dsyolo.cluster import rendezvous

ATTEND = """
import sys
from dsyolo.cluster import rendezvous
rendezvous.LOST_S = 3.0
rank, size, port, wait_s = sys.argv[1:]
meet = rendezvous.Rendezvous(int(rank), int(size), "127.0.0.1", int(port), wait_s=float(wait_s))
print("here", flush=True)
meet.wait()
print("all", flush=True)
meet.close()
if rank == "0":
    sys.stdin.readline()  # the store goes with this process: in a run torch's own keeps it
"""


class Attending:
    """Rank `rank` of `size`, a process of its own."""

    def __init__(self, rank: int, size: int, port: int, wait_s: float = 60) -> None:
        words = [sys.executable, "-c", ATTEND, *map(str, (rank, size, port, wait_s))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def come(self) -> None:
        assert self.process.stdout.readline() == "here\n", self.process.communicate()[1]
        time.sleep(0.5)  # for a first beat

    def end(self, timeout_s: float = 20) -> tuple[int, str]:
        try:
            said = self.process.communicate(timeout=timeout_s)[1]
        finally:
            self.process.kill()
        return self.process.returncode, said


@pytest.mark.parametrize(
    ("lost", "sent", "told"),
    [
        (1, signal.SIGKILL, "rank 1 (process {pid} on "),
        (1, signal.SIGSTOP, "rank 1 (process {pid} on "),
        (0, signal.SIGKILL, "Rank 0 at 127.0.0.1:{port} is lost"),
    ],
)
def test_a_rank_that_is_lost_while_others_are_awaited_ends_all(lost, sent, told):
    port = free_port()
    ranks = [Attending(rank, 3, port) for rank in range(2)]  # the third one never comes
    for rank in ranks:
        rank.come()
    os.kill(ranks[lost].process.pid, sent)
    status, said = ranks[1 - lost].end()
    ranks[lost].process.kill()
    assert status == rendezvous.STATUS
    assert told.format(pid=ranks[lost].process.pid, port=port) in said
    assert said.count("All ranks end; --resume auto resumes the run.") == 1


def test_one_that_never_comes_is_named_to_those_that_wait():
    port = free_port()
    ranks = [Attending(0, 4, port, wait_s=1), Attending(2, 4, port, wait_s=1)]
    (status, said), (other_status, other_said) = (rank.end() for rank in ranks)
    assert (status, other_status, other_said) == (rendezvous.STATUS, rendezvous.STATUS, "")
    assert "2 of 4 ranks did not join the rendezvous within " in said
    assert " s (1, 3), so all ranks end. Check their hosts' output" in said


def test_no_first_rank_is_given():
    port = free_port()
    status, said = Attending(1, 2, port, wait_s=2).end()
    assert status == rendezvous.STATUS
    assert f"Rank 1 found no rank 0 at 127.0.0.1:{port} within 2 s." in said


def test_all_come_and_go_on():
    port = free_port()
    ranks = [Attending(rank, 3, port) for rank in range(3)]
    for rank in reversed(ranks):  # the first one last: its input is closed then, and it ends
        status, said = rank.end()
        assert (status, said) == (0, "")


def test_a_port_that_is_taken_is_reported_with_the_option():
    port = free_port()
    first = Attending(0, 2, port)
    first.come()
    with pytest.raises(UserError) as caught:
        rendezvous.Rendezvous(0, 2, "127.0.0.1", port, wait_s=1)
    first.process.kill()
    first.process.communicate()
    (problem,) = caught.value.problems
    assert problem.startswith(f"MASTER_PORT: {port} given, but rank 0 cannot listen at 127.0.0.1:{port}")
    assert problem.endswith("Name another free port there: deepspeed --master_port N.")


def joined() -> int:
    from dsyolo.cluster import collectives
    from dsyolo.engine import process_group

    world = process_group.init_process_group()
    time.sleep(1.5 * world.rank)  # nobody is taken for lost who has joined
    return int(collectives.all_gather_objects(world.rank)[-1])


def test_torch_joins_the_store_of_the_rendezvous():
    assert run_ranks(2, joined) == [1, 1]
