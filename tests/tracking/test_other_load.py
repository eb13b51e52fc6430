"""The load of other programs, and the threads that are worth while beside it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from dsyolo.cluster import world as worlds
from dsyolo.cluster.world import World
from dsyolo.tracking import other_load
from dsyolo.tracking.other_load import OtherLoad, threads_beside
from dsyolo.trainer.hooks import other_load_hook
from dsyolo.trainer.hooks.other_load_hook import OtherLoadHook

ALONE = World(0, 1, 0, 1)
BURN = "import time\nend = time.time() + 30\nwhile time.time() < end: pass"


@pytest.mark.parametrize(
    ("cores", "ranks", "load", "threads"),
    [
        (2, 1, 0.0, 2),
        (2, 1, 0.3, 2),
        (2, 1, 0.9, 1),
        (2, 1, 2.0, 1),
        (8, 1, 0.0, 8),
        (8, 1, 1.0, 7),
        (8, 1, 6.2, 2),
        (8, 2, 2.0, 3),  # 4 a rank, each beside one
        (2, 2, 1.0, 1),
    ],
)
def test_threads_are_what_others_leave(monkeypatch, cores, ranks, load, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert threads_beside(load, World(0, ranks, 0, ranks)) == threads


def test_own_time_and_that_of_own_children_is_no_load_of_others(monkeypatch):
    """By made-up counters: a machine that is otherwise idle cannot be had."""
    now, busy, own = [100.0], [1000.0], [50.0]
    load = object.__new__(OtherLoad)
    load._cores = [0, 1]
    monkeypatch.setattr(load, "_look", lambda: (now[0], busy[0], own[0]), raising=False)
    monkeypatch.setattr(other_load.time, "monotonic", lambda: now[0])
    load._since, load._busy_s, load._own_s = load._look()
    now[0] += 0.1
    assert load.take() is None  # too short
    now[0], busy[0], own[0] = 110.0, 1018.0, 58.0
    assert load.take() == pytest.approx(1.0)  # 18 of 20 s busy, 8 by this run
    now[0], busy[0], own[0] = 120.0, 1027.0, 68.0
    assert load.take() == 0.0  # ticks are counted at other moments
    now[0], busy[0], own[0] = 130.0, 1057.0, 68.0
    assert load.take() == 2.0


def test_a_process_that_burns_a_core_is_load_unless_it_is_ours():
    foreign = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\n{BURN}",
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pid = int(foreign.stdout.readline())
    foreign.wait(30)
    try:  # its parent has gone, so it belongs to nobody here
        load = OtherLoad(ALONE)
        time.sleep(1.0)
        found = load.take()
    finally:
        os.kill(pid, 9)
        foreign.stdout.close()
    assert found is not None
    assert found > 0.3  # of its core, which other tests may share
    own = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        load = OtherLoad(ALONE)
        begin = load._own_s
        time.sleep(1.0)
        load.take()
        assert load._own_s - begin > 0.1
    finally:
        own.kill()
        own.wait()


def test_ranks_from_several_shells_are_no_load_to_each_other():
    """Their parents differ: here this process, and one that has left its child."""
    other = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{BURN}"], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline()
        load = OtherLoad(World(0, 2, 0, 2))
        load._roots = [other_load.psutil.Process(os.getpid())]
        load._roots[0].children = lambda recursive: []  # as if the other one was started elsewhere
        load._since, load._busy_s, load._own_s = load._look()
        load.count_ranks([os.getpid(), other.pid])
        begin = load._own_s
        time.sleep(0.6)
        assert load.take() is not None
        assert load._own_s - begin > 0.1
    finally:
        other.kill()
        other.communicate()


def test_ranks_of_a_launcher_are_counted_by_it_from_the_start(monkeypatch):
    load = OtherLoad(World(0, 2, 0, 2))
    roots, since = load._roots, load._since
    monkeypatch.setattr(other_load, "parent_of_all_ranks", lambda: "7-1")
    load.count_ranks([os.getpid(), os.getppid()])
    assert (load._roots, load._since) == (roots, since)
    assert [root.pid for root in roots] == [os.getppid()]


@pytest.fixture
def threads(monkeypatch):
    """The threads of torch, as a list of one number; on a machine with 2 cores."""
    now = [2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(worlds.torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    return now


def hook_of(chosen: int | None) -> OtherLoadHook:
    hook = OtherLoadHook(SimpleNamespace(num_cores=2), chosen)
    hook.trainer = SimpleNamespace(world=ALONE)
    return hook


def test_threads_go_down_soon_and_up_later(threads, caplog):
    caplog.set_level(logging.INFO)
    hook, seen = hook_of(None), []
    for load in (0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        hook.judge(load)
        seen.append(threads[0])
    assert seen == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "other programs keep 1.0 of 2 cores busy: 1 thread a rank from now on, 2 before (--threads N fixes them)",
        "other programs keep 0.0 of 2 cores busy: 2 threads a rank from now on, 1 before (--threads N fixes them)",
    ]


def test_chosen_threads_stay_and_a_warning_comes_once(threads, caplog):
    hook = hook_of(2)
    for _ in range(5):
        hook.judge(1.0)
    assert threads == [2]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith("all 2 threads wait for the slowest: try --threads 1.")


def test_measuring_costs_little(monkeypatch, threads):
    looks = []
    load = SimpleNamespace(num_cores=2, cost_s=0.1, take=lambda: looks.append(now[0]) or 0.0)
    now = [0.0]
    monkeypatch.setattr(other_load_hook.time, "monotonic", lambda: now[0])
    hook = OtherLoadHook(load, None)
    hook.trainer = SimpleNamespace(world=ALONE)
    hook.open()
    for now[0] in range(100):
        hook.after_step(None)
    assert looks == [0.0, 2, 22, 42, 62, 82]  # each 0.1 s, in 20 s
