"""`dsyolo scale`: the trainings, the combination of their times, the fit, the report, and mistakes in the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import psutil
import pytest
from hosts import Cluster, why_not
from ranks import free_port, long_but
from runs import CONFIG, ROOT, begin, environment, make_place

from dsyolo import cli
from dsyolo.base.errors import UserError
from dsyolo.commands import scale as command
from dsyolo.commands.scale_options import check
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS
from dsyolo.doctor.hosts import Host
from dsyolo.engine.step_timer import PHASES
from dsyolo.scaling.bottleneck import bottleneck
from dsyolo.scaling.cases import (
    STRONG,
    WEAK,
    ScalingCase,
    ScalingStrategy,
    deepspeed_json,
    read_strategy,
    wanted,
)
from dsyolo.scaling.fit import SIZES, efficiency, fit, solve, step_seconds
from dsyolo.scaling.html_report import page
from dsyolo.scaling.report import build, to_json
from dsyolo.scaling.results import combine_rounds
from dsyolo.scaling.runs import epochs_and_images, include
from dsyolo.scaling.tables import to_markdown

RANKS = np.array([1.0, 2.0, 4.0, 8.0])


def read(tmp_path: Path, text: dict, **sizes: int | None) -> tuple[ScalingStrategy | None, list[str]]:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(text))
    problems: list[str] = []
    wanted_sizes = {"smallest": 1, "micro_batch": None, "accumulation": None, **sizes}
    return read_strategy(path, problems=problems, **wanted_sizes), problems


# ---- which trainings


def test_what_has_no_effect_is_set_aside_and_not_handed_to_trainings(tmp_path):
    found, problems = read(tmp_path, {"train_batch_size": 8, "_why": "x", "aio": {"block_size": 1}})
    assert not problems
    assert found is not None
    assert [path for path, _ in found.set_aside] == ["_why", "aio"]
    assert not found.source


@pytest.mark.parametrize(
    ("source", "sizes", "expected"),
    [
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16}, {}, (16, 4, 64)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16}, {"smallest": 2}, (16, 2, 64)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, {}, (4, 2, 8)),
        ({"train_batch_size": 64}, {"micro_batch": 8, "accumulation": 1}, (8, 1, 8)),
        ({"train_batch_size": 16, "pipeline": {"stages": 2}}, {"smallest": 2}, (16, 1, 16)),
        ({"train_batch_size": 16, "pipeline": {"stages": 2}}, {"smallest": 1}, (16, 2, 16)),
    ],
)
def test_sizes_are_those_of_the_smallest_world(tmp_path, source, sizes, expected):
    found, problems = read(tmp_path, source, **sizes)
    assert not problems
    assert (found.micro_batch, found.accumulation, found.global_batch) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"train_batch_size": "auto"}, 'train_batch_size: "auto" given'),
        ({"train_batch_size": "many"}, 'train_batch_size: "many" given, but it must be a whole number'),
        ({"train_micro_batch_size_per_gpu": -2}, "train_micro_batch_size_per_gpu: -2 given"),
        ({"train_batch_size": 8, "pipeline": {"stages": 0}}, "pipeline.stages: 0 given, but it must be"),
    ],
)
def test_a_fault_is_reported_by_its_own_key(tmp_path, source, message):
    found, (problem,) = read(tmp_path, source)
    assert found is None
    assert f"some.json: {message}" in problem


def test_what_is_left_to_the_machine_reaches_the_training(tmp_path):
    zero = {"stage": 1, "reduce_bucket_size": "auto"}
    source = {"train_batch_size": "auto", "zero_optimization": zero, "bf16": {"enabled": "auto"}}
    found, problems = read(tmp_path, source, micro_batch=4)
    assert not problems
    (row,) = wanted([found], [WEAK], [2], "yolov5n", "cpu")
    assert row.case, row.why_not
    given = deepspeed_json(found, row.case)
    assert [given[key] for key in BATCH_KEYS] == [8, 4, 1]
    assert {key: given[key] for key in ("zero_optimization", "bf16")} == {
        key: source[key] for key in ("zero_optimization", "bf16")
    }


def test_a_rank_of_a_pipeline_has_as_many_images_as_one_without(tmp_path):
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16}
    piped = {**sizes, "pipeline": {"stages": 2}}
    for smallest in (1, 2, 4):
        plain, pipe = (read(tmp_path, source, smallest=smallest)[0] for source in (sizes, piped))
        ranks = max(2, smallest)
        images = [(one.micro_batch * one.accumulation) / one.stages for one in (plain, pipe)]
        assert images[0] == images[1] == 64 / smallest, ranks
        assert plain.global_batch == pipe.global_batch == 64


def test_weak_scaling_keeps_a_ranks_images_and_strong_scaling_a_steps():
    one = ScalingStrategy("s", {}, 1, 8, 2, 16)
    assert [one.on(n, WEAK) for n in (1, 2, 4)] == [(8, 2)] * 3
    assert [one.on(n, STRONG) for n in (1, 2, 4, 16)] == [(8, 2), (8, 1), (4, 1), (1, 1)]
    assert one._replace(global_batch=24, micro_batch=7).on(2, STRONG) == (6, 2)
    with pytest.raises(UserError, match="cannot be divided"):
        one.on(3, STRONG)


def test_every_row_has_a_training_that_is_accepted_or_says_why_not():
    plain = ScalingStrategy("zero1", {"zero_optimization": {"stage": 1}}, 1, 4, 1, 4)
    piped = ScalingStrategy(
        "pipe", {"zero_optimization": {"stage": 1}, "pipeline": {"stages": 2}}, 2, 4, 1, 4
    )
    rows = list(wanted([plain, piped], [WEAK, STRONG], [1, 2, 4], "yolov5n", "cpu"))
    assert [(row.strategy, row.scaling, row.ranks) for row in rows] == [
        (s, scaling, n) for scaling in (WEAK, STRONG) for s in ("zero1", "pipe") for n in (1, 2, 4)
    ]
    assert [row.ranks for row in rows if row.case is None] == [1, 1]
    assert "2 stages" in rows[3].why_not
    assert rows[0].case == rows[6].case  # run once
    case = rows[2].case
    assert deepspeed_json(plain, case)["train_batch_size"] == case.global_batch == 16


def test_runs_are_long_enough_and_hardly_longer():
    case = ScalingCase("s", 2, 1, 4, 2)
    assert epochs_and_images(case, 10, 1000) == (1, 160)
    epochs, images = epochs_and_images(case, 100, 300)
    assert images == 300
    assert 1600 <= epochs * images < 1600 + 300


def test_ranks_fill_the_first_hosts():
    hosts = [Host("a", 4), Host("b", 4), Host("c", 4)]
    assert include(hosts, 2) == "a:0,1"
    assert include(hosts, 6) == "a:0,1,2,3@b:0,1"


# ---- the fit


@pytest.mark.parametrize(
    ("scaling", "true"),
    [
        (WEAK, {"a": 0.5, "b": 0.1, "d": 0.02}),
        (WEAK, {"a": 0.5, "b": 0.0, "d": 0.0}),
        (STRONG, {"s": 0.05, "p": 2.0, "d": 0.01}),
        (STRONG, {"s": 0.0, "p": 2.0, "d": 0.0}),
    ],
)
def test_the_fit_finds_what_made_the_times(scaling, true):
    seconds = step_seconds(scaling, true, RANKS)
    assert solve(scaling, list(true), RANKS, seconds) == pytest.approx(true, abs=1e-9)
    found = fit(scaling, {int(n): [[s] * 5] * 2 for n, s in zip(RANKS, seconds, strict=True)})
    assert [one.ranks for one in found.predictions] == list(SIZES)
    expected = efficiency(scaling, true, np.array(SIZES, float), 1)
    np.testing.assert_allclose([one.efficiency for one in found.predictions], expected, rtol=1e-6)
    assert found.coefficients == pytest.approx(true, abs=1e-9)


def test_amdahls_law_is_what_strong_scaling_without_communication_comes_to():
    share = 0.1  # serial
    values = {"s": share, "p": 1 - share, "d": 0.0}
    expected = [1 / (n * (share + (1 - share) / n)) for n in (2, 4, 1024)]
    np.testing.assert_allclose(efficiency(STRONG, values, np.array([2.0, 4.0, 1024.0]), 1), expected)


def test_noise_widens_the_band_and_the_band_holds_the_true_value():
    true = {"a": 0.5, "b": 0.1, "d": 0.02}
    rng = np.random.default_rng(1)
    seconds = step_seconds(WEAK, true, RANKS)

    def widths(noise: float) -> np.ndarray:
        rounds = {
            int(n): (s * (1 + noise * rng.standard_normal((3, 20)))).tolist()
            for n, s in zip(RANKS, seconds, strict=True)
        }
        found = fit(WEAK, rounds).predictions
        assert all(one.low <= one.efficiency <= one.high for one in found)
        for one, expected in zip(found, efficiency(WEAK, true, np.array(SIZES, float), 1), strict=True):
            assert one.low - 0.02 <= expected <= one.high + 0.02
        return np.array([one.high - one.low for one in found])

    assert (widths(0.05) > 2 * widths(0.005)).all()


def test_a_fit_that_misses_what_was_measured_says_so():
    found = fit(
        STRONG, {1: [[1.0] * 5], 2: [[1.35] * 5]}
    )  # slower by more ranks than latency of a tree would make it
    assert "misses the measured times by 1" in found.reliability  # without latency no such time comes out
    assert "misses" not in fit(WEAK, {1: [[1.0] * 5], 2: [[1.1] * 5]}).reliability


def test_two_sizes_leave_open_how_it_goes_on_and_one_says_nothing():
    found = fit(WEAK, {1: [[1.0] * 5], 2: [[1.1] * 5]})
    last = found.predictions[-1]
    # all growth as a ring's bytes, or all of it as log2 n
    assert last.high == pytest.approx(1 / (1 + 0.2 * 1023 / 1024))
    assert last.low == pytest.approx(1 / (1 + 0.1 * 10))
    assert "measure a third size" in found.reliability
    assert fit(WEAK, {4: [[1.0]]}).predictions == []


# ---- what runs come to


def steps_json(seconds: float, ranks: int, waits: float = 0.0, steps: int = 6) -> dict:
    """As a run leaves it: forward takes `seconds`, waiting for others `waits`; the first step takes ten times as long."""
    about = {
        "rank": 0,
        "host": "h",
        "started_at": 100.0,
        "first_step_at": 104.0,
        "images_per_step": 4 * ranks,
        "num_images": 40,
        "threads": 1,
        "cores": 2,
        "workers": 1,
        "device": "CPU",
        "peak_flops_per_s": 1e9,
        "peak_source": "a test",
        "flops_per_image": 1e7,
        "outside": {"validation": [2.0], "checkpoint": [0.5]},
        "comms_logger": {},
        "memory": {"peak_gib": 1.0, "peak_activations_gib": 0.5},
    }
    rows, at, cpu = [], 1000.0, 0.0
    for step in range(1, steps + 1):
        factor = 10 if step == 1 else 1
        split = dict.fromkeys(PHASES, 0.0) | {"forward": factor * seconds, "communication": waits}
        at, cpu = at + sum(split.values()), cpu + seconds
        seen = {"at": at, "cpu_s": cpu, "collectives": 3 * step, "collective_bytes": 1_000_000 * step}
        seen |= {"machine_cpu_s": cpu * ranks, "sent": 2_000_000 * step, "received": 0, "inside": 0}
        rows.append({"step": step, "seconds": split, "seen": seen | {"memory_bytes": 2**31}})
    others = [
        {
            **row,
            "seen": {
                k: v
                for k, v in row["seen"].items()
                if k in ("at", "cpu_s", "collectives", "collective_bytes")
            },
        }
        for row in rows
    ]
    return {
        "ranks": [
            {**about, "rank": rank, "steps": rows if rank == 0 else others, "machine_cores": 2}
            for rank in range(ranks)
        ]
    }


def test_times_are_medians_after_the_warm_up():
    found = combine_rounds([steps_json(0.2, 2, 0.05), steps_json(0.2, 2, 0.05)], [9.0, 11.0], warmup=1)
    assert found.step_s == pytest.approx(0.25)
    assert [len(one) for one in found.rounds_s] == [5, 5]
    assert found.images_per_s == pytest.approx(8 / 0.25)
    assert found.split_s["forward"] == pytest.approx(0.2)
    assert sum(found.split_s.values()) == pytest.approx(found.step_s)
    assert (found.startup_s, found.validation_s, found.checkpoint_s, found.wall_s) == (4, 2, 0.5, 10)
    assert (found.collectives_a_step, found.collective_mb_a_step, found.use.sent_mb) == pytest.approx(
        (3, 1, 2)
    )
    assert found.use.cpu_own == pytest.approx(2 * 0.2 / 0.25 / 2)
    assert found.use.process_gib == 1
    assert found.use.machine_gib == 2
    assert found.mfu == pytest.approx(1e7 * 8 / 0.25 / 2e9)
    with pytest.raises(ValueError, match="no step"):
        combine_rounds([steps_json(0.2, 1, steps=3)], [1.0], warmup=3)


@pytest.fixture(scope="module")
def report():
    plain = ScalingStrategy("zero<1>", {"zero_optimization": {"stage": 1}}, 1, 4, 1, 4)
    rows = list(wanted([plain], [WEAK], [1, 2, 4], "yolov5n", "cpu"))
    measured = {
        row.case: combine_rounds([steps_json(0.2, row.ranks, waits)], [9.0], 1)
        for row, waits in zip(rows[:2], (0.0, 0.05), strict=True)
    }
    return build(rows, measured, {rows[2].case: "memory ran out"}, {"model": "yolov5n"}, ["a note"])


def test_the_report_reports_speedup_efficiency_and_bottleneck(report):
    (group,) = to_json(report)["groups"]
    first, second, third = group["rows"]
    assert (first["speedup"], first["efficiency"]) == (1, 1)
    assert second["speedup"] == pytest.approx(2 * 0.2 / 0.25)
    assert second["efficiency"] == pytest.approx(0.8)
    assert second["against"] == {"strategy": "zero<1>", "ranks": 1}
    assert "Communication" in second["bottleneck"]
    assert "50 ms in communication" in second["bottleneck"]
    assert third == {"ranks": 4, "why_not": "memory ran out"}
    assert len(group["fit"]["predictions"]) == len(SIZES)


def test_the_remedy_for_an_optimizer_is_one_that_there_is():
    measured = combine_rounds([steps_json(0.2, 1, 0.0)], [9.0], 1)
    slow = measured._replace(split_s={**measured.split_s, "optimizer": 0.3 * measured.step_s})
    text = {ranks: bottleneck(slow, ranks, None, ranks, WEAK) for ranks in (1, 2)}
    assert "The optimizer takes 30% of a step: use more accumulation" in text[1]
    assert "The optimizer takes 30% of a step: use a ZeRO stage that shards it" in text[2]


def test_the_markdown_has_even_tables(report):
    text = to_markdown(report)
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
    assert "did not run: memory ran out" in text


def bases(*strategies: ScalingStrategy) -> tuple[dict, str]:
    """Return what the first strategy, a pipeline, is compared with, and the text on it."""
    rows = list(wanted(strategies, [WEAK], [1, 2], "yolov5n", "cpu"))
    measured = {row.case: combine_rounds([steps_json(0.2, row.ranks)], [9.0], 1) for row in rows if row.case}
    _, row = to_json(build(rows, measured, {}, {}, []))["groups"][0]["rows"]
    return row["against"], row["bottleneck"]


def test_a_pipeline_is_compared_with_what_computes_alike():
    bf16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    blocks = {"activation_checkpointing": {"recompute": "blocks"}}
    pipe = ScalingStrategy("pipe", {**bf16, "pipeline": {"stages": 2}}, 2, 4, 1, 4)
    fp32 = ScalingStrategy("fp32", {"zero_optimization": {"stage": 1}}, 1, 4, 1, 4)
    alike = ScalingStrategy("alike", bf16, 1, 4, 1, 4)
    nearly = ScalingStrategy("nearly", {**bf16, **blocks}, 1, 4, 1, 4)
    against, text = bases(pipe, fp32, nearly, alike)
    assert against == {"strategy": "alike", "ranks": 1}
    assert "include that difference" not in text
    against, text = bases(pipe, fp32, nearly._replace(source={**nearly.source, "bf16": {"enabled": False}}))
    assert against == {"strategy": "fp32", "ranks": 1}
    base = "Its base fp32 has precision fp32 (this pipeline bf16), so speedup and efficiency include that difference."
    assert base in text
    left_open = pipe._replace(source={**pipe.source, "bf16": {"enabled": "auto"}})
    assert "Its base alike has precision bf16 (this pipeline auto)" in bases(left_open, alike)[1]


class Checker(HTMLParser):
    """Fail for elements that are not closed, and collect the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [
            value for key, value in attributes if key in ("src", "href") and not value.startswith("#")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_beside_it(report):
    checker = Checker()
    checker.feed(page(report))
    checker.close()
    assert checker.open == []
    assert checker.seen.count("svg") == 3
    assert checker.links == []
    assert "script" not in checker.seen
    assert "zero<1>: weak scaling" in checker.text  # escaped
    assert page(report) == page(report)


# ---- the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0,2"], "--ranks: '0,2' given"),
        (["--ranks", "two"], "--ranks: 'two' given"),
        (["--ranks", "1", "--imgsz", "100"], "multiple of 32"),
        (["--ranks", "1", "--strategies", "zero1,"], "--strategies: a name is empty"),
        (["--ranks", "1", "--strategies", ""], "--strategies: a name is empty"),
        (["--ranks", "1", "--strategies", "nothing"], "ds_configs/nothing.json does not exist, seen from /"),
        (["--ranks", "1", "--strategies", "zero11"], "Did you mean ds_configs/zero1.json?"),
        (["--ranks", "1", "--strategies", "zero1,auto"], "--strategies: auto given, but scale compares"),
        (["--ranks", "1", "--deepspeed_config", "auto"], "dsyolo plan --write FILE"),
        (["--ranks", "1", "--strategies", "zero1,other/zero1.json"], "both would be zero1. Rename one."),
        (["--ranks", "1", "--steps", "0"], "--steps: 0 given"),
        (["--ranks", "1", "--hostfile", "missing"], "--hostfile"),
        (["--ranks", "64", "--cores", "2"], "--cores: 2 given, but for 64 ranks this machine has"),
        (["--ranks", "1", "--launcher_options=--a 'b"], "Close its quotes"),
    ],
)
def test_mistakes_are_reported_before_anything_runs(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zero1.json").write_text('{"train_batch_size": 8}')
    assert cli.main(["scale", *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "scale").exists()


def test_a_file_given_twice_is_one_strategy(tmp_path):
    (tmp_path / "zero.json").write_text('{"train_batch_size": 8}')
    names = [str(tmp_path / "zero.json"), str(tmp_path / "." / "zero.json"), str(tmp_path / "x/../zero.json")]
    (tmp_path / "x").mkdir()
    args = cli.parse(["scale", "--ranks", "1", "--strategies", ",".join(names)])
    assert [one.name for one in check(args).strategies] == ["zero"]


def scale(place: Path, *more: str) -> list[str]:
    """Return the command of a short report; `more` may give an option another value."""
    usual = {"--imgsz": "64", "--micro_batch": "2", "--accumulation": "1", "--steps": "3", "--warmup": "1"}
    usual |= {"--rounds": "1", "--workers": "1", "--data": str(place / "sample/data.yaml"), "--out": "report"}
    options = [word for option, value in usual.items() if option not in more for word in (option, value)]
    return [sys.executable, "-m", "dsyolo.cli", "scale", *options, *more]


@pytest.mark.soak
def test_trainings_are_run_and_reported(tmp_path):
    place = make_place(tmp_path)
    (place / "pipe.json").write_text(json.dumps({"train_batch_size": 2, "pipeline": {"stages": 2}}))
    zero = {"stage": 2, "reduce_bucket_size": "auto"}
    (place / "ds.json").write_text(json.dumps({**CONFIG, "zero_optimization": zero}))
    options = ["--ranks", "1,2", "--strategies", "ds.json,pipe.json", "--master_port", str(free_port())]
    done = subprocess.run(
        scale(place, *options), cwd=place, env=environment(place), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plain, piped = json.loads((place / "report/scale.json").read_text())["groups"]
    assert [row["ranks"] for row in plain["rows"]] == [1, 2]
    for row in plain["rows"]:
        assert sum(row["split_s"].values()) == pytest.approx(row["step_s"])
        assert row["global_batch"] == 2 * row["ranks"]
        assert len(row["rounds_s"][0]) >= 3
        assert row["validation_s"] > 0
        assert row["use"]["inside_mb"] >= 0
    assert plain["rows"][1]["split_s"]["communication"] > 0
    assert plain["rows"][1]["collective_mb_a_step"] > 5  # gradients of 1.8 million weights
    assert "all_reduce" in plain["rows"][1]["comms_logger"]
    assert "stages" in piped["rows"][0]["why_not"]
    assert piped["rows"][1]["against"] == {"strategy": "ds", "ranks": 1}
    assert {"scale.md", "scale.html", "scale.json"} <= {path.name for path in (place / "report").iterdir()}


def test_a_size_that_fails_says_why_and_the_others_are_reported(tmp_path):
    place = make_place(tmp_path)
    (place / "report").mkdir()
    (place / "report/scale.json").write_text("{}")
    command = scale(place, "--ranks", "1", "--strategies", "ds.json", "--timeout", "5", "--warmup", "4000")
    done = subprocess.run(
        command, cwd=place, env=environment(place), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    # a report of nothing lies beside its trainings only
    assert (place / "report/scale.json").read_text() == "{}"
    assert len(list(place.glob("report/runs/*/scale.json"))) == 1
    assert "did not run: took longer than the 5 s of --timeout" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_mistake_in_the_trainings_options_is_reported_before_any_training(tmp_path):
    place = make_place(tmp_path)
    for options, message in (
        (["--nosuch", "3"], "--nosuch: unknown option"),
        (["--name", "mine"], "-- --name: given, but dsyolo scale sets it itself"),
    ):
        command = scale(place, "--ranks", "1", "--strategies", "ds.json", "--", *options)
        done = subprocess.run(
            command, cwd=place, env=environment(place), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stdout
        assert message in done.stderr
        assert "round 1" not in done.stdout


def test_each_size_of_images_has_a_sample_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SYNTHETIC_IMAGES", 4)
    for size in ("64", "128"):
        options = ["--ranks", "1", "--deepspeed_config", str(ROOT / "ds_configs/zero1.json"), "--imgsz", size]
        assert cli.main(["scale", *options, "--out", str(tmp_path / "out"), "--", "--nosuch", "3"]) == 2
        assert "--nosuch: unknown option" in capsys.readouterr().err  # found once there is a data set


def as_a_terminal_starts_it() -> None:
    """Undo what a shell or nohup has ignored for what it starts in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", long_but([signal.SIGTERM], SIGNALS), ids=lambda one: one.name)
def test_a_signal_leaves_a_report_of_what_was_measured_and_no_training(tmp_path, number):
    place = make_place(tmp_path)
    command = scale(place, "--ranks", "1", "--strategies", "ds.json", "--rounds", "50")
    process = begin(
        place,
        command,
        stderr=subprocess.PIPE,
        preexec_fn=as_a_terminal_starts_it,
    )
    output = ""
    while "round 2" not in output:
        letter = process.stdout.read(1)
        assert letter, output + process.stderr.read()  # it has ended before
        output += letter
    time.sleep(1)
    if number == signal.SIGHUP:
        process.stdout.close()  # as a terminal that ends
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)  # impatience changes nothing
    rest, errors = process.communicate(timeout=90)
    assert process.returncode == 128 + number, errors
    assert errors == ""
    assert number == signal.SIGHUP or "Interrupted: the report has what was measured before." in rest
    (group,) = json.loads((place / "report/scale.json").read_text())["groups"]
    assert len(group["rows"][0]["rounds_s"]) == 1
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(place / "report") in " ".join(p.info["cmdline"] or [])
    ]


@pytest.mark.soak
def test_steps_of_a_training_that_a_signal_ends_are_reported(tmp_path):
    place = make_place(tmp_path)
    command = scale(place, "--ranks", "1", "--strategies", "ds.json", "--rounds", "1", "--steps", "3000")
    process = begin(place, command)
    end = time.monotonic() + 120
    while not any('"step": 20,' in file.read_text() for file in place.glob("report/runs/*/*/metrics.jsonl")):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.terminate()
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    (group,) = json.loads((place / "report/scale.json").read_text())["groups"]
    assert len(group["rows"][0]["rounds_s"]) == 1, output


@pytest.mark.soak
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_trainings_run_over_hosts(tmp_path):
    place = make_place(tmp_path)
    with Cluster(2, carried={"XDG_CACHE_HOME": str(place / "cache")}) as cluster:
        options = ["--ranks", "1,2", "--strategies", "ds.json", "--hostfile", str(cluster.hostfile())]
        options += ["--launcher_options", f"--no_ssh_check --master_addr {cluster.addresses[0]}"]
        output = cluster.popen(
            scale(place, *options), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ).communicate(timeout=300)[0]
    (group,) = json.loads((place / "report/scale.json").read_text())["groups"]
    assert all("why_not" not in row for row in group["rows"]), output
    # 1.8 million fp32 gradients twice (N - 1) / N
    assert group["rows"][1]["use"]["sent_mb"] == pytest.approx(7.2, rel=0.3)
