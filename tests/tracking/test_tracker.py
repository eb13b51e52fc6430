"""The reports of a run: rows, lines, curves and W&B; that it waits for the device rarely, and that it resumes unseen."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from dsyolo.base.batch import Detections, GroundTruth, StepStats
from dsyolo.detection.metrics import Metrics, evaluate
from dsyolo.tracking import tracker as track
from dsyolo.tracking.log_setup import RunLog
from dsyolo.tracking.tracker import RunTracker
from dsyolo.tracking.writers import JsonlWriter, SafeWriter, WandbWriter, Writer

STEPS_PER_EPOCH, EPOCHS, BATCH = 5, 4, 64
TIMINGS = ("images_per_s", "data_wait_share", "memory_gib", "train_s", "val_s")


@dataclasses.dataclass
class TrainState:
    """As the loop's, moved by the tests."""

    step: int = 0
    epoch: int = 0
    total_steps: int = STEPS_PER_EPOCH * EPOCHS
    epochs: int = EPOCHS
    images_seen: int = 0


class CountedTensor(torch.Tensor):
    """Counts how often it is read back."""

    num_reads = 0

    def tolist(self) -> list[float]:
        CountedTensor.num_reads += 1
        return super().tolist()


def stats_of(step: int) -> StepStats:
    losses = torch.tensor([1.0, 0.3, 0.7]) / step
    return StepStats(losses.as_subclass(CountedTensor), torch.tensor(2.5), BATCH)


VALIDATION = {"val_box": 0.5, "val_obj": 0.25, "val_cls": 0.125}


def some_metrics() -> Metrics:
    box = np.array([[0, 0, 10, 10]], np.float32)
    ground_truth = GroundTruth(0, (20, 20), box, np.array([0]), 1.0, (0.0, 0.0))
    return evaluate([ground_truth], [Detections(box, np.array([0.5], np.float32), np.array([0]))], ["cat"])


def go_on(tracker: RunTracker, progress: TrainState, *, until_step: int, **losses: float) -> None:
    """The loop, without a model. Every second epoch is validated, with such losses."""
    while progress.step < until_step:
        progress.step += 1
        progress.images_seen += BATCH
        tracker.step(progress, stats_of(progress.step), lr=0.01 / progress.step, data_wait_s=0.0)
        if progress.step % STEPS_PER_EPOCH == 0:
            tracker.epoch(
                progress, dataclasses.replace(some_metrics(), **losses) if progress.epoch % 2 else None
            )
            progress.epoch += 1
            tracker.begin(progress)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def without_timings(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows_of(folder)]


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The panels that are drawn, without the seconds that drawing takes."""
    panels: list[dict[str, Any]] = []
    monkeypatch.setattr(
        track, "save_curves", lambda path, drawn_panels, best_epoch: panels.append(drawn_panels)
    )
    return panels


def test_a_step_is_read_back_only_when_it_is_logged(tmp_path: Path):
    tracker, progress = RunTracker(tmp_path, TrainState(), log_every=8), TrainState()
    CountedTensor.num_reads = 0
    for step in range(1, 20):
        progress.step = step
        tracker.step(progress, stats_of(step), 0.01, 0.0)
    assert CountedTensor.num_reads == 3
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 8, 16]
    progress.step = progress.total_steps
    tracker.step(progress, stats_of(progress.step), 0.01, 0.0)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 8, 16, 20]
    tracker.close()


def test_skipped_steps_are_reported_once(tmp_path: Path):
    progress = TrainState()
    tracker = RunTracker(tmp_path, progress, log_every=4)
    for step in range(1, 9):
        progress.step = step
        tracker.step(progress, stats_of(step)._replace(was_applied=step not in (2, 3)), 0.01, 0.0)
    tracker.close()
    assert [row.get("skipped_steps") for row in rows_of(tmp_path)] == [None, 2, None]


def test_rows_hold_the_losses_of_a_step_and_the_means_of_an_epoch(tmp_path: Path):
    tracker = RunTracker(tmp_path, TrainState(), log_every=10, memory_gib=lambda: 1.5)
    go_on(tracker, TrainState(), until_step=10)
    tracker.close()
    first, epoch0, tenth, epoch1 = rows_of(tmp_path)
    assert (first["kind"], first["step"], first["epoch"]) == ("step", 1, 0)
    assert (first["box"], first["obj"], first["cls"], first["loss"]) == pytest.approx((1.0, 0.3, 0.7, 2.0))
    assert (first["lr"], first["memory_gib"], first["grad_norm"]) == (0.01, 1.5, 2.5)
    assert (epoch0["kind"], epoch0["step"], epoch0["epoch"]) == ("epoch", 5, 0)
    assert epoch0["box"] == pytest.approx(
        np.mean([1 / step for step in range(1, 6)])
    )  # though 2 to 5 have no row
    assert "map50" not in epoch0
    assert (tenth["kind"], tenth["step"], tenth["epoch"]) == ("step", 10, 1)
    assert epoch1["loss"] == pytest.approx(np.mean([2 / step for step in range(6, 11)]))
    assert (epoch1["map50"], epoch1["map50_95"], epoch1["recall"]) == pytest.approx((1, 1, 1))


def test_rates_count_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(track, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    progress = TrainState()
    tracker = RunTracker(tmp_path, progress, log_every=2)
    clock.now = 100.0  # building the engine
    tracker.begin(progress)
    for step in range(1, 5):
        clock.now += 1.0 if step <= 2 else 4.0
        progress.step, progress.images_seen = step, step * BATCH
        tracker.step(progress, stats_of(step), 0.01, data_wait_s=0.5)
    clock.now += 7.0  # validation
    tracker.epoch(progress, None)
    tracker.close()
    *_, last_step, epoch = rows_of(tmp_path)
    assert (last_step["images_per_s"], last_step["data_wait_share"]) == (2 * BATCH / 8.0, 1 / 8.0)
    assert (epoch["images_per_s"], epoch["data_wait_share"]) == (4 * BATCH / 10.0, 2 / 10.0)
    assert (epoch["train_s"], epoch["val_s"]) == (10.0, 7.0)


def test_a_loss_that_is_not_finite_becomes_null(tmp_path: Path):
    tracker, progress = RunTracker(tmp_path, TrainState()), TrainState(step=1)
    tracker.step(progress, StepStats(torch.tensor([float("nan"), 1.0, float("inf")]), None, BATCH), 0.01, 0.0)
    tracker.close()
    (row,) = rows_of(tmp_path)
    assert (row["box"], row["obj"], row["cls"], row["loss"]) == (None, 1.0, None, None)
    assert "grad_norm" not in row


@pytest.mark.parametrize("saved_at", [3, 5, 7, 10])
def test_a_resumed_file_reads_like_that_of_a_run_never_interrupted(tmp_path: Path, saved_at: int):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    tracker = RunTracker(whole, TrainState(), log_every=2)
    go_on(tracker, TrainState(), until_step=20)
    tracker.close()

    tracker, progress = RunTracker(broken, TrainState(), log_every=2), TrainState()
    go_on(tracker, progress, until_step=saved_at)
    saved, state = dataclasses.replace(progress), json.loads(json.dumps(tracker.state()))
    go_on(tracker, progress, until_step=saved_at + 6)  # and then it is killed while it writes:
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 1')

    tracker = RunTracker(broken, saved, log_every=2, state=state)
    go_on(tracker, dataclasses.replace(saved), until_step=20)
    tracker.close()
    assert without_timings(broken) == without_timings(whole)
    assert not list(broken.glob("*.tmp"))


def test_a_new_run_drops_the_rows_of_an_old_one(tmp_path: Path):
    for _ in range(2):
        tracker = RunTracker(tmp_path, TrainState(), log_every=1)
        go_on(tracker, TrainState(), until_step=3)
        tracker.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_without_a_terminal_there_is_a_line_per_logged_step_and_per_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    RunLog(rank=0)
    tracker = RunTracker(tmp_path, TrainState(), log_every=5, memory_gib=lambda: 1.5)
    tracker.mfu = lambda images_per_s: 0.25
    go_on(tracker, TrainState(), until_step=10)
    tracker.close()
    out, err = capsys.readouterr()
    _, step, first, _, second, validated = out.splitlines()
    assert re.match(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO rank 0: epoch 1  step 5/20  ETA 0:00:0\d  ", step
    )
    assert all(
        part in step for part in (" images/s  MFU 25 %  box 0.2000  obj 0.0600", "lr 0.002", "1.50 GiB")
    )
    assert "INFO rank 0: epoch 1/4  box 0.4567  obj 0.1370  cls 0.3197  " in first
    assert "mAP" not in first
    assert "mAP50 1.0000  mAP50-95 1.0000  * best" in validated
    assert all(part in second for part in ("epoch 2/4", " images/s", "data 0 %", "1.50 GiB", " s"))
    assert err == ""


def test_curves_are_drawn_and_drawing_takes_a_small_share_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[dict[str, Any]]
):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(track, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    record = track.save_curves

    def draw_for_a_second(path: Path, panels: dict[str, Any], best_epoch: int | None) -> None:
        clock.now += 1.0
        record(path, panels, best_epoch)

    monkeypatch.setattr(track, "save_curves", draw_for_a_second)
    tracker, progress = RunTracker(tmp_path, TrainState(), log_every=100), TrainState()
    for epoch, num_drawn in enumerate([1, 1, 2, 2], start=1):
        go_on(tracker, progress, until_step=epoch * STEPS_PER_EPOCH)
        tracker.plotter.wait()
        assert len(drawn) == num_drawn
        clock.now += 60.0
    tracker.close()
    tracker.close()
    assert len(drawn) == 3
    assert drawn[-1]["mAP"]["mAP50"] == ([2, 4], pytest.approx([1, 1]))
    assert drawn[-1]["box loss"]["training"][0] == [1, 2, 3, 4]


def test_results_png_is_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the real drawing
    tracker = RunTracker(tmp_path, TrainState())
    go_on(tracker, TrainState(), until_step=STEPS_PER_EPOCH)
    tracker.close()
    picture = cv2.imread(str(tmp_path / "results.png"))
    assert picture.shape[1] > 1000
    assert picture.std() > 5


class Counting(Writer):
    """Counts rows, over resumes too."""

    def __init__(self) -> None:
        self.rows = 0

    def write(self, row: Any) -> None:
        self.rows += 1

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.rows}

    def load_state_dict(self, state: Any) -> None:
        self.rows = state["counted"]


def test_a_writer_of_ones_own_gets_its_state_back_after_a_resume():
    first = SafeWriter("own", Counting)
    first.write({"step": 1})
    second = SafeWriter("own", Counting, {**first.state_dict(), "run_id": "of another writer"})
    second.write({"step": 2})
    assert second.state_dict() == {"counted": 2}


def test_a_writer_needs_no_constructor_of_its_own(tmp_path: Path):
    class Plain(Writer):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SafeWriter("own", lambda: Plain(tmp_path)).write({"step": 1})


def test_a_state_that_a_writer_cannot_take_costs_a_warning_and_not_the_run():
    with pytest.warns(UserWarning, match="own failed"):
        writer = SafeWriter("own", Counting, {"run_id": "of another writer"})
    writer.write({"step": 1})


@pytest.mark.parametrize("state", [["a"], "text", {"a": object()}, None])
def test_a_state_that_is_no_json_is_its_writers_failure(state: Any):
    class Stateful(Writer):
        def __init__(self) -> None: ...

        def state_dict(self) -> Any:
            return state

    with pytest.warns(UserWarning, match="own failed"):
        writer = SafeWriter("own", Stateful)
    assert writer.state_dict() == {}


@pytest.mark.parametrize("event", ["write", "close"])
def test_a_writer_that_exits_costs_a_warning_and_not_the_run(event: str, tmp_path: Path):
    writer = type("Exits", (Writer,), {event: lambda *_: sys.exit(0)})(tmp_path)
    safe = SafeWriter("own", lambda: writer)
    with pytest.warns(UserWarning, match="own failed, and the run goes on without it. SystemExit: 0"):
        safe.write({"step": 1}) if event == "write" else safe.close()


def test_a_writers_state_replaces_no_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    writers = [
        type("Stateful", (Writer,), {"state_dict": lambda _, n=n: {"num_summed": 7, "mine": n}})(tmp_path)
        for n in (1, 2)
    ]
    state = RunTracker(tmp_path, TrainState(), writers=writers).state()
    assert (state["num_summed"], state["mine"], state["run_id"]) == (0, 1, None)
    for key in ("num_summed", "mine"):
        assert f"A writer's state has the key '{key}', which is another's" in caplog.text


def wandb_writer(folder: Path, **options: Any) -> SafeWriter:
    """As trainer/build.py makes it."""
    options = {"mode": "online", "project": "p", "name": None, "config": {}, "run_id": None, **options}
    return SafeWriter("W&B", lambda: WandbWriter(folder, **options))


class FakeWandb(types.ModuleType):
    """Records what it is told; fails at the call named `fails`."""

    def __init__(self, fails: str | None = None) -> None:
        super().__init__("wandb")
        self.fails, self.init_with, self.logged, self.finished = fails, {}, [], False
        self.Settings, self.id = dict, "abc123"

    def init(self, **options: Any) -> FakeWandb:
        self.init_with = options
        self.id = options["id"] or self.id
        return self._unless("init")

    def define_metric(self, name: str, **_: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self._unless("log")
        self.logged.append(values)

    def Image(self, path: str) -> str:
        return f"image {Path(path).name}"

    def finish(self) -> None:
        self._unless("finish")
        self.finished = True

    def _unless(self, call: str) -> FakeWandb:
        if self.fails == call:
            raise ConnectionError("no network")
        return self


def test_wandb_gets_figures_and_pictures_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    options: dict[str, Any] = {
        "mode": "online",
        "project": "p",
        "name": "n",
        "config": {"seed": 0},
    }
    progress = TrainState()
    tracker = RunTracker(tmp_path, progress, writers=[wandb_writer(tmp_path, **options)])
    go_on(tracker, progress, until_step=12, **VALIDATION)  # the last two are not logged
    tracker.picture(tmp_path / "grid.jpg")
    tracker.close()
    assert wandb.finished
    told = wandb.init_with
    assert (told["project"], told["name"], told["config"], told["dir"]) == (
        "p",
        "n",
        {"seed": 0},
        str(tmp_path),
    )
    assert (told["id"], told["resume"]) == (None, "allow")
    step, epoch, _, validated, picture = wandb.logged
    assert (step["step"], step["train/box"], step["train/lr"]) == (1, 1.0, 0.01)
    assert (epoch["step"], epoch["epoch/lr"]) == (5, 0.01 / 5)
    assert not any("val/" in name for name in epoch)
    assert validated["val/map50_95"] == pytest.approx(1)
    assert (validated["val/box"], validated["val/obj"], validated["val/cls"]) == (0.5, 0.25, 0.125)
    assert not [name for name in validated if name.removeprefix("epoch/") in VALIDATION]
    assert picture == {"predictions": "image grid.jpg", "step": 12}

    wandb.id = "another"
    state = tracker.state()
    again = wandb_writer(tmp_path, **options, run_id=state["run_id"])
    resumed = RunTracker(tmp_path, progress, writers=[again], state=state)
    assert wandb.init_with["id"] == resumed.state()["run_id"] == state["run_id"] == "abc123"
    resumed.close()


@pytest.mark.parametrize(
    ("variable", "key"),
    [
        ("WANDB_DIR", "dir"),
        ("WANDB_RESUME", "resume"),
        ("WANDB_CONSOLE", "console"),
        ("WANDB_SILENT", "quiet"),
        ("WANDB_QUIET", "quiet"),
        ("WANDB_INIT_TIMEOUT", "init_timeout"),
    ],
)
def test_a_variable_of_wandb_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, key: str):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def given(run_id: str | None = None) -> dict[str, Any]:
        wandb_writer(tmp_path, run_id=run_id)
        return {**wandb.init_with, **wandb.init_with["settings"]}

    for name in ("DIR", "RESUME", "CONSOLE", "SILENT", "QUIET", "INIT_TIMEOUT"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    plain = given()
    assert {"dir", "resume", "console", "quiet", "init_timeout"} <= plain.keys()
    monkeypatch.setenv(variable, "never")
    assert plain.keys() - given().keys() == {key}
    resumed = given("abc")
    assert (resumed["id"], resumed["resume"]) == ("abc", "allow")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failing_wandb_warns_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tracker = RunTracker(tmp_path, TrainState(), log_every=1, writers=[wandb_writer(tmp_path)])
        go_on(tracker, TrainState(), until_step=10)
        tracker.picture(tmp_path / "grid.jpg")
        tracker.close()
    assert [str(w.message) for w in warned] == [
        "W&B failed, and the run goes on without it. ConnectionError: no network"
    ]
    assert len(rows_of(tmp_path)) == 12


def test_without_wandb_it_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    tracker = RunTracker(tmp_path, TrainState())
    go_on(tracker, TrainState(), until_step=1)
    tracker.close()
    assert tracker.state()["run_id"] is None


def log_offline(folder: Path, state: dict[str, Any], until_step: int) -> None:
    progress = TrainState(step=until_step - 5, epoch=until_step // 5 - 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="W&B failed")
        writer = wandb_writer(folder, mode="offline", config={"seed": 0}, run_id=state.get("run_id"))
        tracker = RunTracker(folder, progress, writers=[writer], state=state)
        go_on(tracker, progress, until_step=until_step, **VALIDATION)
        tracker.picture(folder / "grid.png")
        tracker.close()
    print(json.dumps(tracker.state()))


def test_the_real_wandb_works_offline(tmp_path: Path):
    """Each part in a process of its own, as W&B writes its file to the end only when its process ends."""
    pytest.importorskip("wandb")
    cv2.imwrite(str(tmp_path / "grid.png"), np.zeros((8, 8, 3), np.uint8))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    state: dict[str, Any] = {}
    for until_step in (5, 10):
        call = f"import test_tracker as t; t.log_offline(t.Path({str(tmp_path)!r}), {state!r}, {until_step})"
        done = subprocess.run(
            [sys.executable, "-c", call], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        state = json.loads(done.stdout.splitlines()[-1])
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.stem for path in runs] == [f"run-{state['run_id']}"] * len(runs)
    written = b"".join(path.read_bytes() for path in runs)
    for name in (b"epoch/box", b"val/map50", b"val/box", b"val/obj", b"val/cls"):
        assert name in written, {path: path.stat().st_size for path in runs}


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"kind": "step"}', "[]", "7", '{"kind": "step", "step": "x", "epoch": 0}', "\udcff"],
)
def test_lines_that_no_run_wrote_are_left_out_of_metrics(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    own = {"kind": "step", "step": 1, "epoch": 0, "box": 0.5}
    path.write_text(f"{json.dumps(own)}\n{line}\n", errors="surrogateescape")
    rows = JsonlWriter(path, step=5, epoch=1)
    rows.close()
    assert rows.read() == [own]
