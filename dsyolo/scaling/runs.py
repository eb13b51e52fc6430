"""Run the trainings of `dsyolo scale` one at a time, through the launcher, as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import dsyolo
from dsyolo.base.environment import all_variables
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import list_images
from dsyolo.doctor.hosts import Host
from dsyolo.scaling.cases import ScalingCase

GRACE_S = 40  # for a run to end after SIGTERM
POLL_S = 0.05
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_REASON = 300  # characters


class EndRequest:
    """Record a signal that asks to end, so that the run in progress is ended and the report written."""

    number = 0  # number of the first signal; 0: none

    def __enter__(self) -> EndRequest:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._before = {number: one for number, one in before.items() if one != signal.SIG_IGN}  # nohup
        for number in self._before:
            signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: object) -> None:
        self.number = self.number or number


class ScalingPlan(NamedTuple):
    """The settings that all trainings share."""

    folder: Path
    options: Sequence[str]  # options of train.py
    warmup: int  # optimizer steps that are dropped
    steps: int  # those that are measured
    hostfile: Path | None
    hosts: Sequence[Host]
    port: int
    timeout_s: float
    cores_per_rank: int | None  # cores of this machine, workers included; None: no limit
    launcher_options: Sequence[str]  # options of deepspeed
    end: EndRequest


class Outcome(NamedTuple):
    """The steps.json of one training, or why it failed."""

    found: dict[str, Any] | None
    wall_s: float
    why_not: str = ""


def epochs_and_images(case: ScalingCase, steps: int, available: int) -> tuple[int, int]:
    """Return (epochs, images of an epoch) for at least `steps` steps and few more."""
    needed = case.global_batch * steps
    images = min(available, needed)
    return -(-needed // images), images


def write_data(data: DataSpec, folder: Path, num_train: int, num_val: int) -> Path:
    """Write a data.yaml of the first images of both splits, which stay where they are."""
    assert data.train
    assert data.val
    folder.mkdir(parents=True, exist_ok=True)
    lists = {}
    for split, sources, count in (("train", data.train, num_train), ("val", data.val, num_val)):
        path = folder / f"{split}_{count}.txt"
        path.write_text(
            "".join(f"{image.resolve()}\n" for image in list_images(sources)[:count]), encoding="utf-8"
        )
        lists[split] = str(path.resolve())
    path = folder / f"data_{num_train}.yaml"
    path.write_text(yaml.safe_dump({**lists, "names": list(data.names)}), encoding="utf-8")
    return path


def run(
    plan: ScalingPlan, case: ScalingCase, turn: int, number: int, epochs: int, data: Path, config: Path
) -> Outcome:
    """Run one training of a case, in round `turn` from 0, as run `number` of all. Its log lies beside its folder."""
    name = f"{case.name}_round{turn + 1}"
    train = str(Path(dsyolo.__file__).with_name("train.py"))
    command = [*_launcher(plan, case.ranks, number), train, *arguments(plan, name, epochs, data, config)]
    begin = time.monotonic()
    log = plan.folder / f"{name}.log"
    with log.open("wb") as output:
        status = _wait(plan, case, command, output)
    wall_s = time.monotonic() - begin
    file = plan.folder / name / "steps.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if found and (status == 0 or (status is None and _has_enough(found, plan.warmup))):
        return Outcome(found, wall_s)
    return Outcome(None, wall_s, f"{_reason(status, log, plan)} See {log}")


def arguments(plan: ScalingPlan, name: str, epochs: int, data: Path, config: Path) -> list[str]:
    """Return the arguments of train.py for one training."""
    options = {"deepspeed_config": config, "data": data, "project": plan.folder, "name": name}
    options |= {"epochs": epochs, "val_every": epochs, "save_every": epochs, "time_profile": "steps"}
    return [*(str(part) for key, value in options.items() for part in (f"--{key}", value)), *plan.options]


def _end(process: subprocess.Popen) -> None:
    """Stop what is left of a training: ranks may still save after their launcher has ended."""
    end = time.monotonic() + GRACE_S
    number = signal.SIGTERM if process.poll() is None else 0
    with contextlib.suppress(ProcessLookupError):  # the group is gone
        while True:
            os.killpg(process.pid, number)
            process.poll()
            number = signal.SIGKILL if time.monotonic() > end else 0
            time.sleep(0.1)
    process.wait()


def _has_enough(found: dict[str, Any], warmup: int) -> bool:
    """Return whether a training that was stopped has measured steps on all ranks."""
    return all(any(step["step"] > warmup for step in rank["steps"]) for rank in found["ranks"])


def _launcher(plan: ScalingPlan, ranks: int, number: int) -> list[str]:
    if ranks == 1 and not plan.hostfile:
        return [sys.executable]
    port = str(plan.port + number % 50)  # each run has its own
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launcher = [deepspeed, "--master_port", port, *plan.launcher_options]
    if not plan.hostfile:
        return [*launcher, "--num_gpus", str(ranks)]
    return [*launcher, "--hostfile", str(plan.hostfile), "--include", include(plan.hosts, ranks)]


def include(hosts: Sequence[Host], ranks: int) -> str:
    """Return the first `ranks` slots of the hosts, host by host, for the launcher's --include."""
    names = [host.name for host in hosts for _ in range(host.slots)][:ranks]
    return "@".join(f"{name}:{','.join(map(str, range(n)))}" for name, n in Counter(names).items())


def _wait(plan: ScalingPlan, case: ScalingCase, command: Sequence[str], output: Any) -> int | None:
    """Return the exit status; None after a timeout or a request to end. The run has ended in any case."""
    path = os.pathsep.join([str(Path(sys.executable).parent), all_variables().get("PATH", "")])
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    options["env"] = {**all_variables(), "PATH": path}
    process = subprocess.Popen(command, start_new_session=True, **options)
    if plan.cores_per_rank:
        # The processes that it starts inherit this; it has started none yet.
        os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[: plan.cores_per_rank * case.ranks])
    try:
        end = time.monotonic() + plan.timeout_s
        while process.poll() is None and time.monotonic() < end and not plan.end.number:
            time.sleep(POLL_S)
        return process.returncode
    finally:
        _end(process)


def _reason(status: int | None, log: Path, plan: ScalingPlan) -> str:
    """Return the last lines of the log that explain why the run ended."""
    if status is None:
        return f"took longer than the {plan.timeout_s:.0f} s of --timeout before a step was measured."
    stripped = map(str.strip, log.read_text(errors="replace", encoding="utf-8").splitlines())
    lines = [line for line in stripped if line and not line.startswith("raise ")]
    telling = re.compile(r"Error|error:|cannot|memory$|given, but|Stopped|does not")
    errors = [line for line in lines if telling.search(line)]
    text = " ".join((errors or lines)[-2:])[:MAX_REASON]
    remedy = f" Run dsyolo doctor --hostfile {plan.hostfile}." if plan.hostfile else ""
    return f"ended with status {status}: {text}{remedy}"
