"""DeepSpeed's own blocks that only look: each does through dsyolo's entry what DeepSpeed says that it does."""

from __future__ import annotations

import csv
import importlib.util
import json
import re

import pytest
from runs import CONFIG, alone, losses, together

from dsyolo.data.synthetic import draw_sample
from dsyolo.models.yolov5 import build_yolov5

LOOKING = {
    "steps_per_print": 2,
    "comms_logger": {"enabled": True, "verbose": True},
    "wall_clock_breakdown": True,
}
# Published: 4.5 GFLOPs of yolov5n at 640 px, two operations each. Here: two images of 64 px, fewer classes.
MACS_IN_MILLIONS = 4500 / 2 * 2 * (64 / 640) ** 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    draw_sample(folder / "sample", num_images=20, image_size=(96, 96))
    looking = {
        **LOOKING,
        "csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(folder / "flops.txt")},
    }
    (folder / "ds.json").write_text(json.dumps({**CONFIG, **looking}))
    (folder / "plain.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def looked_at(place):
    done = together(place, "looked_at", epochs=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_wall_clock_breakdown_prints_the_parts_of_a_step(looked_at):
    assert re.search(r"time \(ms\) \| fwd: [\d.]+ \| bwd: [\d.]+ .*\| step: [\d.]+", looked_at)


def test_steps_per_print_prints(looked_at):
    assert re.search(r"step=2, skipped=0, lr=\[", looked_at)


def test_the_comms_logger_prints_every_collective_and_their_sum(looked_at):
    assert re.search(r"comm op: \w+ .*\| time \(ms\): ", looked_at)
    table = looked_at[looked_at.index("Comm. Op") :]
    assert re.search(r"Message Size\s+Count\s+Total Latency", table)


def test_the_csv_monitor_writes_the_rate_of_every_step(place, looked_at):
    files = {path.name for path in (place / "csv/job").iterdir()}
    assert "Train_Samples_lr.csv" in files
    with (place / "csv/job/Train_Samples_lr.csv").open() as file:
        rows = list(csv.reader(file))
    assert [int(row[0]) for row in rows[1:]] == [8, 16]  # images so far, a row for each of the two steps


def test_the_flops_profiler_counts_the_network(place, looked_at):
    text = (place / "flops.txt").read_text()
    millions = sum(p.numel() for p in build_yolov5("yolov5n", 5).parameters()) / 1e6
    assert re.search(rf"params per GPU:\s+{millions:.2f} M", text)
    macs = float(re.search(r"fwd MACs per GPU:\s+([\d.]+) MMACs", text)[1])
    assert macs == pytest.approx(MACS_IN_MILLIONS, rel=0.15)
    assert "Detect" in text


def test_looking_changes_nothing(place, looked_at):
    done = together(place, "plain", epochs=1, deepspeed_config=place / "plain.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(place, "plain") == losses(place, "looked_at")
    own_words = re.compile(r"\[INFO\] \[(?!runner|launch)|comm op|time \(ms\)|Comm\. Op")
    assert not own_words.search(done.stdout + done.stderr)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.soak
def test_the_profiler_works_at_the_other_stages(place, stage):
    looking = {"flops_profiler": {"enabled": True, "profile_step": 1}, "wall_clock_breakdown": True}
    path = place / f"stage{stage}.json"
    path.write_text(json.dumps({**CONFIG, **looking, "zero_optimization": {"stage": stage}}))
    done = alone(place, f"stage{stage}", epochs=1, deepspeed_config=path)
    assert done.returncode == 0, done.stdout + done.stderr
    # its count of parameters is, under ZeRO 3, of those that are never freed: DeepSpeed's own shortcoming
    assert re.search(rf"params per GPU:\s+{'1.77 M' if stage == 0 else '[0-9.]+ K'}", done.stdout)
    macs = float(re.search(r"fwd MACs per GPU:\s+([\d.]+) MMACs", done.stdout)[1])
    assert macs == pytest.approx(MACS_IN_MILLIONS, rel=0.15)


def test_tensorboard_writes_or_is_refused(place):
    path = place / "tensorboard.json"
    block = {"tensorboard": {"enabled": True, "output_path": str(place / "tb"), "job_name": "job"}}
    path.write_text(json.dumps({**CONFIG, **block}))
    done = alone(place, "tensorboard", epochs=1, deepspeed_config=path)
    if importlib.util.find_spec("tensorboard") is None:
        assert done.returncode == 2
        assert "the package tensorboard is not installed" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert list((place / "tb").rglob("events.out.tfevents.*"))
