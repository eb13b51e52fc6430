"""A run whose processes are stopped, killed or hang ends as it should, and resumes as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from runs import alone, environment, launch, losses, make_place, together
from safetensors.torch import load_file

from dsyolo.cluster import preemption as stop
from dsyolo.cluster import watchdog


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(place):
    done = together(place, "undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "runs/undisturbed"


class Started:
    """A run through the launcher on two ranks, to be disturbed."""

    def __init__(self, place: Path, name: str, *words: str, **options: object) -> None:
        self.folder = place / "runs" / name
        self.log = place / f"{name}.log"
        self._file = self.log.open("a")
        self.process = subprocess.Popen(
            launch(place, name, *words, **options),
            env=environment(place),
            stdout=self._file,
            stderr=subprocess.STDOUT,
            cwd=place,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        """Process ids, by rank."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            words = process.cmdline()
            local = [word for word in words if word.startswith("--local_rank=")]
            if local and process.parent().cmdline()[1:4] != words[1:4]:  # else a worker of its loader
                found[int(local[0].partition("=")[2])] = process.pid
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        end = time.monotonic() + timeout_s
        path = self.folder / "metrics.jsonl"
        while not (path.exists() and f'"step": {step},' in path.read_text()):
            assert time.monotonic() < end, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def end(self, timeout_s: float) -> int:
        """The launcher's exit status."""
        try:
            return self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self._file.close()


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights/last.safetensors")


def assert_same_run(got: Path, expected: Path) -> None:
    first, second = last_weights(got), last_weights(expected)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert losses(got.parent.parent, got.name) == losses(expected.parent.parent, expected.name)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
@pytest.mark.soak
def test_sigterm_to_one_rank_saves_at_the_next_step_and_auto_goes_on(place, undisturbed, rank):
    run = Started(place, f"term{rank}", "--resume", "auto", epochs=3)
    run.wait_for_step(1)
    os.kill(run.ranks()[rank], signal.SIGTERM)
    assert run.end(60) == stop.STATUS, run.log.read_text()
    assert run.log.read_text().count("Preempted: saved after step") == 1
    (saved,) = (run.folder / "checkpoints").iterdir()
    step = json.loads((saved / "progress.json").read_text())["progress"]["step"]
    assert 1 < step < 9
    assert len(losses(place, run.folder.name)) == step
    again = Started(place, f"term{rank}", "--resume", "auto", epochs=3)
    assert again.end(120) == 0, again.log.read_text()
    assert_same_run(run.folder, undisturbed)


@pytest.mark.parametrize(
    ("rank", "sent"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.soak),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.soak),
    ],
)
@pytest.mark.soak
def test_a_lost_rank_ends_all_with_one_message_that_names_it(place, undisturbed, rank, sent):
    name = f"lost{rank}{sent.name}"
    run = Started(place, name)
    run.wait_for_step(4)  # there is a checkpoint of step 3
    pids = run.ranks()
    begin = time.monotonic()
    os.kill(pids[rank], sent)
    status = run.end(90)
    took_s = time.monotonic() - begin
    said = run.log.read_text()
    assert status != 0, said
    assert took_s < 60, said
    assert said.count(f"rank {rank} (process {pids[rank]} on ") == 1, said
    assert re.search("It was last at: .+\\.\n *File ", said), said
    assert not any(psutil.pid_exists(pid) for pid in pids), said
    again = Started(place, name, "--resume", "auto")
    assert again.end(120) == 0, again.log.read_text()
    assert_same_run(run.folder, undisturbed)


@pytest.mark.soak
def test_auto_begins_where_nothing_is_saved_and_sets_a_damaged_checkpoint_aside(place):
    done = alone(place, "auto", "--resume", "auto", epochs=2)
    assert done.returncode == 0, done.stderr
    weights = last_weights(place / "runs/auto")
    folder = place / "runs/auto/checkpoints"
    newest = sorted(folder.iterdir())[-1]
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    done = alone(place, "auto", "--resume", "auto", epochs=2)
    assert done.returncode == 0, done.stderr
    assert "checksum" in done.stdout
    assert (folder / f"damaged_{newest.name}").is_dir()
    assert newest.is_dir()
    for path in folder.glob("step_*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    done = alone(place, "auto", "--resume", "auto", epochs=2)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No other checkpoint of this run is intact" in done.stderr
    assert "before it" not in done.stderr
    assert all(
        torch.equal(weights[name], tensor) for name, tensor in last_weights(place / "runs/auto").items()
    )


def test_a_rank_that_hangs_is_named_with_its_stack(place):
    """In-process: the watchdog of two ranks of which one stops making progress."""
    from ranks import run_ranks

    said = run_ranks(2, hang)
    assert said[0][0] == watchdog.STATUS
    text = said[0][1]
    assert "rank 1 (process " in text
    assert "no rank has made progress for" in text
    assert "It was last at: training step 7." in text
    assert "asleep_in_a_data_loader" in text


def asleep_in_a_data_loader(ended, seconds: float) -> None:
    ended.wait(seconds)


def test_a_rank_that_is_lost_before_its_first_beat_is_named(place):
    from ranks import run_ranks

    (status, said), _ = run_ranks(2, never_beats)
    assert status == watchdog.STATUS
    assert "rank 1 (process " in said
    assert "is lost: it has not answered for" in said
    assert "It was last at: starting." in said


def never_beats() -> tuple[int, str]:
    """Rank 1 stands as if it were stopped as soon as it is watched; its threads too."""
    watchdog.LOST_S = 3.0
    if int(os.environ["RANK"]) == 1:
        watchdog.Watchdog._beat = watchdog.Watchdog._watch = lambda self: None
    return hang(seconds=12)


def hang(seconds: float = 60) -> tuple[int, str]:
    import contextlib
    import io
    import threading

    from dsyolo.engine import process_group

    ended, status = threading.Event(), [0]
    errors = io.StringIO()

    def end(code: int) -> None:
        status[0] = code
        ended.set()

    world = process_group.init_process_group()
    with contextlib.redirect_stderr(errors):
        watch = watchdog.Watchdog(world, late_s=5, end=end)
        watch.at("training step 7")
        if world.rank == 0:
            watch.at("in the optimizer")
            ended.wait(seconds)
        else:
            asleep_in_a_data_loader(ended, seconds)
    return status[0], errors.getvalue()
