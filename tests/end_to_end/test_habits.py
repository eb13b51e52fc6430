"""Habits of YOLOv5's users in real runs: Ctrl-C, --resume PATH, more --epochs, two runs at once, the same --name again."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import TRAIN, alone, arguments, environment, launcher, make_place, rows

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("habits"))


def log_of(place: Path, name: str) -> str:
    return (place / f"runs/{name}/logs/rank_0000.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(place):
    """A run of one epoch, in a folder where one was stopped before its first checkpoint."""
    folder = place / "runs/long"
    (folder / "weights").mkdir(parents=True)
    (folder / "config.yaml").write_text("data: data.yaml\n", encoding="utf-8")
    (folder / "weights/last.safetensors").write_text("old", encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "epoch": 0}\n', encoding="utf-8")
    done = alone(place, "long", epochs=1, warmup_epochs=0, warmup_min_images=0)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_is_left_of_a_run_without_a_checkpoint_is_not_in_the_way(place, finished):
    folder = place / "runs/long"
    assert "held weights but no checkpoint to resume from. The weights were moved to" in finished.stdout
    assert (folder / "weights.1/last.safetensors").read_text(encoding="utf-8") == "old"
    assert (folder / "metrics.jsonl.1").read_text(encoding="utf-8").count("\n") == 1
    assert [row["step"] for row in rows(place, "long", "step")] == [1, 2, 3]


def resumed(place: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TRAIN), *words],
        env=environment(place),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_resuming_a_finished_run_by_its_path_says_so_in_one_line_and_more_epochs_extend_it(place, finished):
    before = (place / "runs/long/config.yaml").read_text(encoding="utf-8")
    done = resumed(place, "--resume", "runs/long/weights/last.pt")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "runs/long is finished: all of its 1 epochs are trained. To train more, give --epochs 2" in line
    assert (place / "runs/long/config.yaml").read_text(encoding="utf-8") == before
    done = resumed(place, "--resume", "runs/long", "--epochs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumes at epoch 2 of 2, step 4 of 6, from runs/long/checkpoints/step_00000003" in done.stdout
    assert "extended to 2 epochs: lr 0.0001, the end of its schedule over 1 epochs" in done.stdout
    lrs = [row["lr"] for row in rows(place, "long", "step")]
    assert lrs == pytest.approx([0.01, 0.0067, 0.0034, 0.0001, 0.0001, 0.0001])
    progress = json.loads(
        (place / "runs/long/checkpoints/step_00000006/progress.json").read_text(encoding="utf-8")
    )["progress"]
    assert (progress["epochs"], progress["total_steps"], progress["schedule_epochs"]) == (2, 6, 1)


def interrupted(place: Path, command: list[str], log: Path | None, text: str) -> tuple[int, str]:
    """Run a command in a terminal, and press Ctrl-C once `text` is in `log`, or in the output; return status and output.

    It waits for all processes of the terminal.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        # It is ignored where the tests run in the background of a shell.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(place)
        os.execvpe(command[0], command, {**environment(place), "TERM": "xterm"})
    output, end, was_pressed = b"", time.monotonic() + 120, False
    os.set_blocking(terminal, False)
    while time.monotonic() < end:
        try:
            output += os.read(terminal, 4096)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # all processes of the terminal have ended
            break
        seen = output.decode(errors="replace") if log is None else ""
        if log is not None and log.exists():
            seen = log.read_text(encoding="utf-8")
        if not was_pressed and text in seen:
            was_pressed = True
            os.write(terminal, b"\x03")
    else:
        pytest.fail(f"it has not ended: {output!r}")
    assert was_pressed, output
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace")


def test_ctrl_c_under_the_launcher_saves_without_a_traceback(place):
    words = arguments(place, "stopped", epochs=200)
    status, output = interrupted(
        place, [*launcher(), str(TRAIN), *words], place / "runs/stopped/metrics.jsonl", '"step": 4,'
    )
    assert status != 0
    assert "Traceback" not in output
    assert "Interrupted: the run saves in the background, after the prompt is back." in output
    before, after = output.split("^C", 1)
    assert "ETA epoch " in before
    assert "ETA epoch " not in after  # the shell's prompt is there now, and no bar may overwrite it
    step = int(re.search(r"Interrupted: saved after step (\d+)\. To go on: --resume ", output)[1])
    assert (place / f"runs/stopped/checkpoints/step_{step:08d}").is_dir()
    assert step >= 4


VALIDATES = """
import time
from pathlib import Path
from dsyolo.trainer.hooks.base import Hook

class Slow(Hook):
    def before_validation_batch(self):
        Path("validates.log").write_text("validates", encoding="utf-8")
        time.sleep(0.5)
"""


@pytest.mark.soak
def test_ctrl_c_in_a_validation_under_the_launcher_saves_the_epoch_before_it(place):
    (place / "slow.py").write_text(VALIDATES, encoding="utf-8")
    words = arguments(place, "validated", epochs=2, hook="slow.py:Slow", val_batch_size=1)
    status, output = interrupted(
        place, [*launcher(), str(TRAIN), *words], place / "validates.log", "validates"
    )
    assert status != 0
    assert "Traceback" not in output
    assert "Interrupted: saved after step 3. To go on: --resume " in output
    assert (place / "runs/validated/checkpoints/step_00000003").is_dir()
    assert rows(place, "validated", "epoch") == []


@pytest.mark.soak
def test_ctrl_c_while_python_imports_under_the_launcher_leaves_no_process(place):
    words = arguments(place, "imports", epochs=200)
    status, _ = interrupted(place, [*launcher(), str(TRAIN), *words], None, "spawned with command")
    assert status != 0
    assert not (place / "runs/imports").exists()


def test_ctrl_c_without_a_launcher_saves_and_ends_with_130(place):
    command = [sys.executable, str(TRAIN), *arguments(place, "one", epochs=200)]
    status, output = interrupted(place, command, place / "runs/one/metrics.jsonl", '"step": 2,')
    assert status == 130
    assert "Traceback" not in output
    assert "Interrupted: saved after step" in output


def test_two_trainings_started_together_at_the_default_port_both_finish(place):
    commands = [
        [DEEPSPEED, "--num_gpus", "2", str(TRAIN), *arguments(place, name, epochs=1)] for name in ("a", "b")
    ]
    logs = [place / f"{name}.log" for name in ("a", "b")]
    runs = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w", encoding="utf-8") as file:
            runs.append(
                subprocess.Popen(command, env=environment(place), cwd=place, stdout=file, stderr=file)
            )
    statuses = [run.wait(200) for run in runs]
    assert statuses == [0, 0], [log.read_text(encoding="utf-8")[-3000:] for log in logs]
    taken = [
        re.findall(r"port 29500 is taken, .*: this one uses (\d+)", log.read_text(encoding="utf-8"))
        for log in logs
    ]
    assert sum(map(len, taken)) >= 1
    for name in ("a", "b"):
        assert [row["step"] for row in rows(place, name, "step")] == [1, 2, 3]
