"""A restart after memory ran out: in the folder of the run, however the command line named it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsyolo.cluster import watchdog as watchdogs
from dsyolo.cluster.watchdog import start_again
from dsyolo.config.cli_args import parse, read_command_line
from dsyolo.config.run_config import AUTO
from dsyolo.trainer.hooks.heartbeat_hook import VALIDATING
from dsyolo.trainer.oom_restart import restart_with_less


class Restarted(Exception):
    """The place of the new process."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("kept/a", "runs/train"):  # the second by the defaults of --project and --name
        Path(name, "checkpoints/step_00000003").mkdir(parents=True)
        Path(name, "config.yaml").write_text(f"data: data.yaml\nseed: {len(name)}\n", encoding="utf-8")
    Path("data.yaml").touch()
    return tmp_path


@pytest.mark.parametrize("is_validation", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "kept/a"],
        ["--resume=kept/a/checkpoints/step_00000003"],
        ["resume=kept/a"],
        ["--resume", "--project", "kept", "--name", "a"],
        ["--resume", "auto", "--project", "kept", "--name=a"],
        ["--data", "data.yaml", "--exist_ok", "--project", "kept", "--name", "a"],
    ],
    ids=" ".join,
)
def test_the_run_goes_on_in_its_own_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], is_validation: bool
) -> None:
    commands: list[list[str]] = []

    def execv(_: str, command: list[str]) -> None:
        commands.append(command)
        raise Restarted

    def end_all(text: str, again: Any = ()) -> None:
        start_again(again)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "set_inheritable", lambda *_: None)
    monkeypatch.setattr(watchdogs, "count_restart", lambda: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *words])
    ds = SimpleNamespace(micro_batch=4, accumulation=1, global_batch=4, zero_stage=3)
    spec: Any = SimpleNamespace(config=parse(words), ds=ds)
    assert spec.config.deepspeed_config == AUTO
    where = VALIDATING if is_validation else "step 1"
    with pytest.raises(Restarted):
        restart_with_less(spec, SimpleNamespace(where=where, end_all=end_all))  # type: ignore[arg-type]
    (command,) = commands
    again, point = read_command_line(command[2:])
    assert (again.project, again.name, again.data) == ("kept", "a", "data.yaml")
    assert again.seed == (spec.config.seed if "--exist_ok" not in words else 6)
    assert point is not None
    assert point.folder == Path("kept/a")
    assert (again.halve_micro_batch, again.val_batch_size) == (
        (False, spec.config.val_batch_size // 2) if is_validation else (True, spec.config.val_batch_size)
    )
