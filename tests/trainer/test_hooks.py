"""Hooks: their order, and that everything is closed whatever a hook raises, in a real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from ranks import asked, long_but
from runs import ROOT, alone, arguments, environment, make_place, rows, together

from dsyolo.base.errors import UserError
from dsyolo.trainer.hooks.base import Hook, HookList

EVENTS = (
    "open",
    "before_epoch",
    "before_step",
    "after_step",
    "before_validation_batch",
    "after_validation",
    "after_epoch",
    "between_epochs",
    "finish",
    "close",
    "steps",
    "state_dict",
    "around step",
    "around validation",
    "around checkpoint",
)
QUICK = ("after_step", "finish")
HOOKS = """
import os
from dsyolo.trainer.hooks.base import Hook

EVENT = os.environ.get("RAISE_IN", "")


class Raising(Hook):
    def around(self, part):
        if EVENT == f"around {part}":
            raise ZeroDivisionError(EVENT)
        return super().around(part)


def raising(self, *args):
    raise ZeroDivisionError(EVENT)


if EVENT and " " not in EVENT:
    setattr(Raising, EVENT, raising)
"""
# Forks a run for each event, since the imports take longer than the training.
DRIVER = """
import json, os, sys, types
import deepspeed
import deepspeed, faster_coco_eval, matplotlib.pyplot, torch  # once, and not in each run
from dsyolo import train
from dsyolo.cluster import run_lock
from dsyolo.data import loader

def run(event, words):
    closed = []
    wandb = types.ModuleType("wandb")
    wandb.Settings, wandb.Image, wandb.id = dict, str, "id"
    wandb.init = lambda **options: wandb
    wandb.define_metric = wandb.log = lambda *a, **k: None
    wandb.finish = lambda: closed.append("W&B")
    sys.modules["wandb"] = wandb
    def noting(cls, name, what):
        plain = getattr(cls, name)
        setattr(cls, name, lambda self, *a: (closed.append(what), plain(self, *a))[1])
    noting(loader.TrainLoader, "close", "training loader")
    noting(loader.EvalLoader, "close", "validation loader")
    noting(run_lock.RunLock, "leave", "run lock")
    os.environ["RAISE_IN"] = event
    try:
        raised = f"status {train.main([event.replace(' ', '_') if before == '--name' else word for before, word in zip(['', *words], words)])}"
    except ZeroDivisionError as error:
        raised = str(error)
    joined = torch.distributed.is_initialized()
    workers = [c for c in __import__("multiprocessing").active_children()]
    return {"raised": raised, "closed": sorted(set(closed)), "joined": joined, "workers": len(workers)}

events, words = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for event in events:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(2, 1)
        with os.fdopen(writer, "w") as out:
            json.dump(run(event, words), out)
            out.flush()
        os._exit(0)
    os.close(writer)
    print(json.dumps({event: json.loads(os.fdopen(reader).read() or '"nothing"')}), flush=True)
    os.wait()
"""
ALL_CLOSED = ["W&B", "run lock", "training loader", "validation loader"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("hooks"))
    (place / "my_hooks.py").write_text(HOOKS)
    return place


@pytest.fixture(scope="module")
def runs_that_raise(request: pytest.FixtureRequest, place: Path) -> dict[str, dict]:
    events = asked(request, "event")
    words = arguments(place, "x", hook="my_hooks.py:Raising", wandb="offline", epochs=1, workers=1)
    command = [sys.executable, "-c", DRIVER, json.dumps(events), json.dumps(words)]
    done = subprocess.run(
        command, env=environment(place), cwd=place, capture_output=True, text=True, timeout=900
    )
    found: dict[str, dict] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert set(found) == set(events), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("event", long_but(QUICK, EVENTS))
def test_everything_is_closed_whatever_a_hook_raises(runs_that_raise: dict[str, dict], event: str):
    assert runs_that_raise[event] == {"raised": event, "closed": ALL_CLOSED, "joined": False, "workers": 0}


@pytest.mark.parametrize("event", long_but(QUICK, EVENTS))
def test_what_a_hook_raises_is_in_the_log_file_of_its_rank(place: Path, runs_that_raise: dict, event: str):
    text = (place / "runs" / event.replace(" ", "_") / "logs/rank_0000.log").read_text(encoding="utf-8")
    assert f"ZeroDivisionError: {event}" in text
    assert "Traceback" in text


def test_the_examples_of_a_hook_and_a_writer_work(place: Path):
    """The target is set to what any network reaches."""
    hook = place / "my_hook.py"
    hook.write_text(
        (ROOT / "examples/my_hook.py").read_text().replace("TARGET_MAP50 = 0.5", "TARGET_MAP50 = 0.0")
    )
    writer = ROOT / "examples/my_writer.py"
    done = alone(place, "own", hook=f"{hook}:StopAtTarget", writer=f"{writer}:CsvWriter", epochs=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mAP50 reached 0.00" in done.stdout
    epochs = rows(place, "own", "epoch")
    assert [row["epoch"] for row in epochs] == [0]
    assert epochs[0]["missing_map50"] == -epochs[0]["map50"]
    (line,) = (place / "runs/own/epochs.csv").read_text().splitlines()
    assert line.split(",")[:2] == ["1", str(epochs[0]["step"])]
    assert (place / "runs/own/weights/best.safetensors").exists()


def test_a_class_that_is_no_writer_is_refused(place: Path):
    done = alone(place, "refused", writer="my_hooks.py:Raising", epochs=1)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        "--writer: my_hooks.py:Raising given, but it is not a subclass of dsyolo.tracking.writers.Writer"
        in done.stderr
    )


def test_a_writer_that_fails_costs_a_warning(place: Path):
    (place / "my_writer.py").write_text(
        "from dsyolo.tracking.writers import Writer\n\n\nclass Failing(Writer):\n"
        "    def __init__(self, folder): ...\n\n    def write(self, row):\n        raise OSError('no room')\n"
    )
    done = alone(place, "fails", writer="my_writer.py:Failing", epochs=1)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count("my_writer.py:Failing failed, and the run goes on without it. OSError: no room") == 1


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        ("my_hooks.py", "it must be MODULE:NAME or FILE.py:NAME"),
        ("gone.py:Hook", "gone.py cannot be imported: FileNotFoundError"),
        ("my_hooks.py:Conting", "my_hooks.py has no Conting"),
        ("json:loads", "is not a subclass of"),
        ("needy.py:Needy", "it raised TypeError"),
    ],
)
def test_a_hook_that_cannot_be_used_is_an_error_in_words(place: Path, hook: str, problem: str):
    (place / "needy.py").write_text(
        "from dsyolo.trainer.hooks.base import Hook\n\n\nclass Needy(Hook):\n    def __init__(self, x): ...\n"
    )
    done = alone(place, "refused", "--hook", hook, epochs=1)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--hook: {hook} given" in done.stderr
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "runs/refused").exists()


EXITS = """
import os, sys
from dsyolo.base.errors import UserError
from dsyolo.trainer.hooks.base import Hook


class Steps(Hook):
    def after_step(self, result):
        sys.exit(0)


class Begins(Hook):
    def __init__(self):
        sys.exit(0)


class OnRank1(Hook):
    def after_step(self, result):
        if os.environ["RANK"] == "1":
            raise UserError("Something only rank 1 can see")


class StopsRank0(Hook):
    def after_validation(self, validation):
        self.trainer.state.stopped_early = os.environ["RANK"] == "0"
"""


@pytest.mark.parametrize(
    ("hook", "problem"), [("Steps", "it called sys.exit(0). Raise StopTraining"), ("Begins", "SystemExit: 0")]
)
def test_a_hook_that_exits_is_an_error_in_words(place: Path, hook: str, problem: str):
    (place / "exits.py").write_text(EXITS, encoding="utf-8")
    done = alone(place, f"exits_{hook}", hook=f"exits.py:{hook}", epochs=1)
    assert done.returncode == 2, done.stdout + done.stderr
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def ranks_with(place: Path, name: str, **options: object) -> subprocess.CompletedProcess:
    (place / "exits.py").write_text(EXITS, encoding="utf-8")
    return together(place, name, hook=f"exits.py:{name}", **options)


def test_what_one_rank_alone_meets_is_logged(place: Path):
    done = ranks_with(place, "OnRank1", epochs=1)
    assert done.returncode != 0
    assert "Something only rank 1 can see" in (place / "runs/OnRank1/logs/rank_0001.log").read_text(
        encoding="utf-8"
    )
    assert done.stderr.count("Something only rank 1 can see") == 1


@pytest.mark.soak
def test_a_rank_that_ends_alone_is_named_after_the_hang_timeout(place: Path):
    done = ranks_with(place, "StopsRank0", epochs=3, hang_timeout_s=8)
    assert done.returncode != 0
    assert "rank 0 (process " in done.stderr
    assert "no rank has made progress for 8 s" in done.stderr


class Noting(Hook):
    def __init__(self, name: str, log: list[str], raises: str = "") -> None:
        self.name, self.log, self.raises = name, log, raises

    def _note(self, event: str) -> None:
        self.log.append(f"{self.name} {event}")
        if event == self.raises:
            raise ZeroDivisionError

    def open(self) -> None:
        self._note("open")

    def close(self) -> None:
        self._note("close")

    def around(self, part):
        self._note(part)
        return nullcontext()


def test_two_hooks_may_not_keep_their_states_under_one_key():
    first, second, third = Noting("a", []), Noting("b", []), Hook()
    first.state_dict, second.state_dict = lambda: {"mine": 1}, lambda: {"ours": 2}
    hooks = HookList([first, second, third])
    assert hooks.state_dict() == {"mine": 1, "ours": 2}
    second.state_dict = first.state_dict
    with pytest.raises(
        UserError, match=r"Noting\.state_dict returns the key 'mine', which another hook uses"
    ):
        hooks.state_dict()


def test_hooks_open_in_order_and_close_in_reverse_even_where_one_fails_to_open_or_close():
    log: list[str] = []
    hooks = HookList([Noting("a", log), Noting("b", log, "open"), Noting("c", log)])
    with pytest.raises(ZeroDivisionError), hooks.running(None):
        raise AssertionError("not reached")
    assert log == ["a open", "b open", "b close", "a close"]
    log.clear()
    hooks = HookList([Noting("a", log), Noting("b", log, "close")])
    with pytest.raises(KeyError), hooks.running(None):  # the first error is the one to tell
        raise KeyError
    assert log == ["a open", "b open", "b close", "a close"]
    log.clear()
    hooks = HookList([Noting("a", log), Noting("b", log, "close"), Noting("c", log)])
    with pytest.raises(ZeroDivisionError), hooks.running(None):
        pass
    assert log == ["a open", "b open", "c open", "c close", "b close", "a close"]


@pytest.mark.parametrize(
    ("method", "value", "told"),
    [
        ("steps", None, "steps returned None, but it must return an iterator of batches"),
        ("around", None, "around returned None, but it must return a context"),
        ("state_dict", None, "state_dict returned None, but it must return a dict"),
        ("state_dict", {"mine": object}, "state_dict returned {'mine': <class 'object'>}, but"),
    ],
)
def test_a_hook_that_returns_what_it_must_not_is_named(method: str, value: object, told: str):
    hook = Noting("a", [])
    setattr(hook, method, lambda *_: value)
    hooks = HookList([Hook(), hook])
    calls = {
        "steps": lambda: hooks.steps(iter([])),
        "around": lambda: hooks.around("step").__enter__(),
        "state_dict": hooks.state_dict,
    }
    with pytest.raises(UserError, match=re.escape(f"--hook: Noting.{told}")):
        calls[method]()
