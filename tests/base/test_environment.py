"""A rank's place, as each launcher tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

from dsyolo.base.environment import export_to_torch, read_environment, wait_passively, wandb_options
from dsyolo.base.errors import UserError

DEEPSPEED = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8", "MASTER_ADDR": "a"}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "MASTER_ADDR": "node1",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, (0, 1, 0, 1, None, None)),
        (DEEPSPEED, (9, 16, 1, 8, "a", 29500)),
        ({**DEEPSPEED, "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "7"}, (9, 16, 1, 4, "a", 7)),  # torchrun's
        (SRUN, (9, 12, 1, 4, "node1", 29500)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "6(x2)"}, (9, 12, 1, 6, "node1", 29500)),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1", "SLURM_NODEID": "2"},
            (9, 12, 1, 3, "node1", 29500),
        ),
        ({**SRUN, **DEEPSPEED}, (9, 16, 1, 8, "a", 29500)),  # a launcher that a Slurm job runs knows better
        # a batch script's own variables are not those of a task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}, (0, 1, 0, 1, None, None)),
    ],
)
def test_each_launcher_is_understood(given, place):
    assert read_environment(given)[:6] == place


def test_other_variables():
    found = read_environment({"XDG_CACHE_HOME": "/local", "DS_ACCELERATOR": "cpu"})
    assert (found.cache, found.accelerator) == (Path("/local"), "cpu")
    assert read_environment({"DS_ACCELERATOR": ""}).accelerator is None
    assert read_environment({"XDG_CACHE_HOME": ""}).cache == Path.home() / ".cache"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({**DEEPSPEED, "RANK": "one"}, "RANK: 'one' given, but it must be a whole number, at least 0."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' given, but it must be a whole number, at least 1."),
        (
            {**DEEPSPEED, "LOCAL_SIZE": "0"},
            "LOCAL_SIZE: '0' given, but it must be a whole number, at least 1.",
        ),
        (
            {**DEEPSPEED, "RANK": "16"},
            "RANK: 16 given, but with 16 ranks it must be 0 to 15. Start all through one launcher.",
        ),
        ({"RANK": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE: missing beside RANK. Start ranks with a launcher"),
        ({**SRUN, "MASTER_ADDR": ""}, "MASTER_ADDR: missing. Set it to the name or address of the machine"),
        (
            {**DEEPSPEED, "LOCAL_RANK": "8"},
            "LOCAL_RANK: 8 given, but with 8 ranks on this machine it must be 0 to 7. Start all",
        ),
        (
            {**DEEPSPEED, "LOCAL_SIZE": "17"},
            "LOCAL_SIZE: 17 given, but with 16 ranks in all it must be 1 to 16.",
        ),
        ({**SRUN, "SLURM_LOCALID": "4"}, "SLURM_LOCALID: 4 given, but with 4 ranks on this machine"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE: 2 given, and no RANK beside it. Start ranks with a launcher (see launch/), or unset",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "or unset WORLD_SIZE for a run alone."),
        ({**DEEPSPEED, "MASTER_PORT": "65536"}, "MASTER_PORT: 65536 given, but it must be 1 to 65535. Give"),
        ({**DEEPSPEED, "MASTER_PORT": "0"}, "MASTER_PORT: 0 given, but it must be 1 to 65535. Give"),
        (
            {**DEEPSPEED, "WORLD_SIZE": "9" * 5000},
            f"WORLD_SIZE: '{'9' * 40}' ... given, but it must be a whole",
        ),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": f"1(x{'9' * 12})"}, "SLURM_STEP_TASKS_PER_NODE: '1(x9"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "all"}, "SLURM_STEP_TASKS_PER_NODE: 'all' given"),
    ],
)
def test_what_is_missing_is_reported(given, told):
    with pytest.raises(UserError, match="does not give this rank its position") as caught:
        read_environment(given)
    assert any(told in problem for problem in caught.value.problems), caught.value


def test_torch_gets_the_place_that_srun_gives_and_a_launchers_value_stands(monkeypatch):
    monkeypatch.setattr(os, "environ", {"MASTER_ADDR": "other"})
    export_to_torch(read_environment(SRUN))
    assert [os.environ[name] for name in NAMES] == ["9", "12", "1", "other", "29500"]


def test_a_run_says_so_without_a_traceback():
    done = subprocess.run(
        [sys.executable, str(ROOT / "dsyolo/train.py"), "--data", "x"],
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "MASTER_ADDR: missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
        ({"KMP_BLOCKTIME": "200"}, {"KMP_BLOCKTIME": "200"}),
    ],
)
def test_threads_wait_passively_unless_the_user_chose(monkeypatch, given, after):
    monkeypatch.setattr(os, "environ", dict(given))
    wait_passively()
    assert os.environ == after


ENTRIES = {
    "train.py": "sys.argv = ['train.py', '--help']; runpy.run_path(TRAIN, run_name='__main__')",
    "dsyolo train": "from dsyolo import cli; cli.main(['train', '--help'])",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_of_a_training_let_threads_wait_passively_before_torch_is_there(entry):
    script = f"""
import builtins, os, runpy, sys
TRAIN, plain = {str(ROOT / "dsyolo/train.py")!r}, builtins.__import__
def see(name, *args):
    if name == "torch" and "torch" not in sys.modules:
        print("POLICY", os.environ.get("OMP_WAIT_POLICY"), file=sys.stderr, flush=True)
        os._exit(0)
    return plain(name, *args)
builtins.__import__ = see
{ENTRIES[entry]}
"""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GOMP", "KMP"))}
    env = {**known, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "POLICY PASSIVE" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"WANDB_PROJECT": "p", "WANDB_NAME": "n"}, {"wandb_project": "p", "wandb_name": "n"}),
        ({"WANDB_MODE": "offline"}, {"wandb": "offline"}),
        ({"WANDB_MODE": "dryrun", "WANDB_PROJECT": ""}, {"wandb": "offline"}),
    ],
)
def test_wandbs_own_variables_are_options(monkeypatch, given, options):
    monkeypatch.setattr(os, "environ", given)
    problems: list[str] = []
    assert wandb_options(problems) == options
    assert not problems


def test_a_mode_that_wandb_does_not_have_is_a_problem(monkeypatch):
    monkeypatch.setattr(os, "environ", {"WANDB_MODE": "of"})
    problems: list[str] = []
    assert wandb_options(problems) == {}
    (problem,) = problems
    assert problem.startswith("WANDB_MODE: 'of' given, but it must be online, offline, disabled")
