"""Stopping a run on request wherever it is, and streams that nobody reads any more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port
from runs import ROOT, TRAIN, arguments, environment, launch, losses, make_place, rows

from dsyolo.cluster import preemption
from dsyolo.cluster.world import World


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("stop"))


def wait_for(path: Path, text: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, text
        time.sleep(0.05)


def newest(place: Path, name: str) -> dict:
    folder = max((place / "runs" / name / "checkpoints").glob("step_*"))
    return json.loads((folder / "progress.json").read_text())["progress"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_nobody_reads_is_lost_and_the_program_goes_on(tmp_path, stream):
    script = f"""
import logging, pathlib, sys, time
from dsyolo.base.stdio import outlive_readers
outlive_readers()
print("hello", file=sys.{stream})
logging.basicConfig(stream=sys.{stream})
while not pathlib.Path("gone").exists():
    time.sleep(0.01)
for _ in range(3):
    print("anybody?", file=sys.{stream}, flush=True)
    logging.warning("anybody?")
pathlib.Path("done").touch()
"""
    pipe = {stream: subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **pipe,
    )
    reader = getattr(process, stream)
    assert reader.readline() == "hello\n"
    reader.close()
    (tmp_path / "gone").touch()
    assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


def test_sigterm_to_deepspeed_saves_though_it_passes_nothing_on_and_nobody_reads(place):
    """The launcher ends at once, and its ranks go on: they must see it, and outlive the broken pipe until then."""
    process = subprocess.Popen(
        launch(place, "orphans", epochs=200),
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=place,
        start_new_session=True,
    )
    metrics = place / "runs/orphans/metrics.jsonl"
    try:
        wait_for(metrics, '"step": 1,')
        process.stdout.close()
        wait_for(metrics, '"kind": "epoch", "step": 6,')  # which tells of itself, in a line
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
        wait_for_end_of_group(process.pid, 60)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    step = newest(place, "orphans")["step"]
    assert 6 <= step < 600
    assert [row[0] for row in losses(place, "orphans")] == list(range(1, step + 1))


@pytest.mark.soak
def test_a_terminal_that_ends_stops_a_run_with_all_saved_unless_nohup_is_before_it(place):
    pipes = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    # as a terminal starts it: whoever runs the tests may have it ignored
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name, before in (("hangs_up", []), ("nohup", ["nohup"])):
        command = [*before, sys.executable, str(TRAIN), *arguments(place, name, epochs=40)]
        process = subprocess.Popen(command, env=environment(place), cwd=place, **pipes)
        wait_for(place / "runs" / name / "metrics.jsonl", '"step": 2,')
        process.send_signal(signal.SIGHUP)
        if before:
            wait_for(place / "runs" / name / "metrics.jsonl", '"step": 12,')
            process.terminate()
        said = process.communicate(timeout=60)[0]
        assert process.returncode == preemption.STATUS, said
        assert f"Preempted: saved after step {newest(place, name)['step']}." in said


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end_of_group(group: int, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while group_lives(group):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_rank_that_waits_for_others_ends_at_once(place):
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env = {**environment(place), **told, "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(TRAIN), *arguments(place, "waits")]
    process = subprocess.Popen(command, env=env, cwd=place, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not listens(int(env["MASTER_PORT"])):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)  # it waits now, in C++
    process.terminate()
    said = process.communicate(timeout=10)[1]
    assert process.returncode == preemption.STATUS, said
    assert (
        "Preempted before the first step: nothing to save. Run the same command with --resume auto." in said
    )
    assert not (place / "runs/waits").exists()


def listens(port: int) -> bool:
    wanted = f":{port:04X} "
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return any(words[1].endswith(wanted.strip()) and words[3] == "0A" for words in lines)


HEARS = """
import time
from dsyolo.cluster.preemption import Preempted, PreemptionHandler
from dsyolo.cluster.world import World
handler = PreemptionHandler(World(0, 1, 0, 1))
print("ready", flush=True)
while not handler.is_requested():
    time.sleep(0.01)
try:
    handler.raise_if_requested()
except Preempted as request:
    print("asked", request.status, flush=True)
time.sleep(60)
"""


def hearing(script: str, **variables: str) -> subprocess.Popen[str]:
    """A process that has come to its first line of output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # as a terminal starts it: whoever runs the tests may have it ignored
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen([sys.executable, "-c", script], env=env, preexec_fn=restore, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_ctrl_c_ends_at_once_and_the_first_one_counts_once():
    process = hearing(HEARS)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked 130\n"
    process.send_signal(signal.SIGINT)  # a program between may pass on what the terminal has sent already
    time.sleep(2 * preemption.AGAIN_S)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == preemption.INTERRUPTED
    assert "Interrupted again: this rank ends without saving." in said


def test_the_terminal_is_left_before_a_launcher_ends_at_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    monkeypatch.setattr(preemption, "_handled_signals", list)  # this process keeps its own
    handler = preemption.PreemptionHandler(World(0, 1, 0, 1), on_interrupt=lambda: events.append("left"))
    monkeypatch.setattr(handler._launcher, "end", lambda: events.append("ended"))
    handler._interrupt()
    assert events == ["left", "ended"]
    assert handler.requested_status() == preemption.INTERRUPTED


def test_sigterm_asks_with_another_status_than_ctrl_c():
    process = hearing(HEARS)
    process.terminate()
    assert process.stdout.readline() == "asked 75\n"
    process.kill()
    process.communicate()


def test_signals_are_handled_as_before_once_the_start_has_ended():
    """A rank that waits for another one's message after a mistake must hear Ctrl-C."""
    alone, own = World(0, 1, 0, 1), lambda *_: None
    before = signal.signal(signal.SIGINT, own)
    try:
        with preemption.ends_at_once(alone):
            assert signal.getsignal(signal.SIGINT) is not own
        assert signal.getsignal(signal.SIGINT) is own
        other = lambda *_: None  # noqa: E731
        with preemption.ends_at_once(alone):
            signal.signal(signal.SIGINT, other)  # as the PreemptionHandler does
        assert signal.getsignal(signal.SIGINT) is other
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("rank", "text"), [("0", "Interrupted before the run began: nothing to save."), ("1", "")]
)
def test_ctrl_c_while_torch_is_imported_is_one_line(rank, text):
    script = "import time; from dsyolo.base.start import prepare_training; prepare_training()\n"
    process = hearing(script + "print('ready', flush=True)\ntime.sleep(60)", RANK=rank)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert said.strip() == text


STOPS_IN_VALIDATION = """
import os, signal, sys
from dsyolo import train
from dsyolo.engine.engine import Engine
plain, calls = Engine.predict_with_loss, []

def predict(self, images, targets):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(self, images, targets)

Engine.predict_with_loss = predict
sys.exit(train.main())
"""


@pytest.mark.soak
def test_a_validation_that_is_stopped_leaves_the_trained_weights_and_comes_again(place):
    options = {"epochs": 1, "val_batch_size": 1}
    whole = subprocess.run(
        [sys.executable, str(TRAIN), *arguments(place, "whole", **options)],
        env=environment(place),
        cwd=place,
        timeout=120,
    )
    assert whole.returncode == 0
    words = [*arguments(place, "validation", **options), "--resume", "auto"]
    env = {**environment(place), "PYTHONPATH": str(ROOT)}
    first = subprocess.run(
        [sys.executable, "-c", STOPS_IN_VALIDATION, *words],
        env=env,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert first.returncode == preemption.STATUS, first.stdout + first.stderr
    assert "Preempted: saved after step 3." in first.stderr
    assert rows(place, "validation", "epoch") == []
    assert (newest(place, "validation")["step"], newest(place, "validation")["epoch"]) == (3, 0)
    again = subprocess.run(
        [sys.executable, str(TRAIN), *words], env=env, cwd=place, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert losses(place, "validation") == losses(place, "whole")
    figures = [
        [{key: row[key] for key in ("map50", "map50_95", "box")} for row in rows(place, name, "epoch")]
        for name in ("validation", "whole")
    ]
    assert len(figures[0]) == 1
    assert figures[0] == figures[1]
