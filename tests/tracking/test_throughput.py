"""Where the time of steps goes: phases by any clock, collectives, what ranks use, and the account of an epoch."""

from __future__ import annotations

import json
import logging
import multiprocessing
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from runs import TRAIN, alone, arguments, environment, make_place, rows

from dsyolo.config.spec import PRECISIONS
from dsyolo.engine.memory_profile import MemoryEstimate, MemoryMeasurement, MemoryTerms
from dsyolo.engine.step_timer import (
    BACKWARD,
    COMMUNICATION,
    DATA,
    FORWARD,
    OTHER,
    PHASES,
    DeviceClock,
    HostClock,
    StepTimer,
    StepTimes,
)
from dsyolo.planner import cpu_peak
from dsyolo.planner.cpu_peak import Peak
from dsyolo.planner.local_hardware import peak_of_gpu
from dsyolo.tracking.resource_usage import Gpu, ResourceUsage, load_nvml
from dsyolo.tracking.throughput import LOGGED_STEP, SHARES, describe, measured_every, peak_figures, shares
from dsyolo.trainer.hooks import time_profile_hook
from dsyolo.trainer.hooks.time_profile_hook import TimeProfileHook, device_name


class Ticks:
    """A clock that goes on by a second whenever somebody looks; as an accelerator's, it may lag behind."""

    def __init__(self) -> None:
        self.stamps, self.reached = count(), float("inf")

    def now(self):
        return next(self.stamps)

    def between(self, first, second):
        assert self.has_passed(second)
        return second - first

    def has_passed(self, stamp):
        return stamp <= self.reached

    def wait(self, stamp):
        self.reached = max(self.reached, stamp)


# ---- phases


def test_a_phase_inside_another_takes_its_time_from_it():
    phases = StepTimer(Ticks())
    for _ in phases.steps(iter("a"), 0):
        with phases.phase(BACKWARD), phases.phase(COMMUNICATION):
            pass
    (step,) = phases.take()
    # other 0, data 1, other 2, backward 3, communication 4, backward 5, other 6, end 7
    expected = {DATA: 1, BACKWARD: 2, COMMUNICATION: 1, OTHER: 3}
    assert step.seconds == {name: expected.get(name, 0) for name in PHASES}
    assert (step.step, sum(step.seconds.values())) == (1, 7)


def test_steps_join_without_a_gap_and_keep_their_numbers():
    clock = Ticks()
    phases = StepTimer(clock)
    assert list(phases.steps(iter("abc"), 4)) == ["a", "b", "c"]
    found = phases.take()
    assert [step.step for step in found] == [5, 6, 7]
    # 3 stamps a step, each end being the next one's beginning; the last look finds no batches any more
    assert sum(sum(step.seconds.values()) for step in found) == 9
    assert phases.take() == []


def test_only_each_so_manyth_step_is_measured():
    phases = StepTimer(Ticks(), every=3)
    assert len(list(phases.steps(iter("abcdefg"), 0))) == 7
    assert [step.step for step in phases.take()] == [3, 6]


def test_what_the_device_has_not_done_is_read_later():
    clock = Ticks()
    phases = StepTimer(clock)
    clock.reached = -1
    for _ in phases.steps(iter("ab"), 0):
        assert not phases._done  # nothing was waited for
    assert [step.step for step in phases.take()] == [1, 2]
    assert clock.reached > 0


def test_collectives_count_only_inside_steps():
    phases = StepTimer(Ticks())
    seen = []
    for _ in phases.steps(iter("ab"), 0):
        seen.append(phases.inside)
    assert seen == [True, True]
    assert not phases.inside


def test_a_host_clock_counts_seconds():
    phases = StepTimer(HostClock())
    for _ in phases.steps(iter("a"), 0):
        with phases.phase(FORWARD):
            time.sleep(0.05)
    (step,) = phases.take()
    assert 0.05 <= step.seconds[FORWARD] <= sum(step.seconds.values())


class Accelerator:
    """As DeepSpeed's, with a device that is a second behind for each event."""

    def __init__(self) -> None:
        self.stream, self.recorded, self.done = "computing", 0, 0

    def current_stream(self):
        return self.stream

    def Event(self, enable_timing):
        assert enable_timing
        accelerator = self

        class Event:
            def record(self):
                accelerator.recorded += 1
                self.number = accelerator.recorded

            def elapsed_time(self, other):
                assert other.query()
                return 1000.0 * (other.number - self.number)

            def query(self):
                return self.number <= accelerator.done

            def synchronize(self):
                accelerator.done = self.number

        return Event()


def test_on_an_accelerator_nothing_waits_and_other_streams_are_left_out():
    accelerator = Accelerator()
    phases = StepTimer(DeviceClock(accelerator))
    for _ in phases.steps(iter("a"), 0):
        with phases.phase(BACKWARD):
            accelerator.stream = "beside"  # where ZeRO sends while backward goes on
            with phases.phase(COMMUNICATION):
                pass
            accelerator.stream = "computing"
        assert accelerator.done == 0
    (step,) = phases.take()
    assert accelerator.done > 0
    assert step.seconds[COMMUNICATION] == 0
    assert step.seconds[BACKWARD] == 1


# ---- collectives, on real ranks


def collectives() -> dict:
    import torch.distributed as torch_dist
    from deepspeed.comm import comm as deepspeed_comm

    from dsyolo.engine import process_group
    from dsyolo.engine.comm_timer import CommTimer, comms_logged

    before = torch_dist.all_reduce
    with process_group.started(60):
        pass
    phases = StepTimer(HostClock())
    counted, logged = CommTimer(phases), {}
    ones = torch.ones(1000)
    torch_dist.all_reduce(ones)  # outside of steps
    outside = counted.calls
    for step in phases.steps(iter(range(2)), 0):
        with comms_logged(logged) if step == 1 else nullcontext():
            deepspeed_comm.all_reduce(torch.ones(1000))
            torch_dist.all_gather([torch.empty(10), torch.empty(10)], torch.ones(10))
            work = torch_dist.all_reduce(torch.ones(500), async_op=True)
            if torch_dist.get_rank() == 1:
                time.sleep(0.2)
            work.wait()
            with phases.phase(BACKWARD):
                deepspeed_comm.barrier()
    steps = phases.take()
    counted.close()
    return {
        "outside": outside,
        "calls": counted.calls,
        "sizes": dict(counted.sizes),
        "communication": sum(step.seconds[COMMUNICATION] for step in steps),
        "logged": logged,
        "is_put_back": torch_dist.all_reduce is before,
        "log_is_off": not deepspeed_comm.comms_logger.enabled,
    }


def test_collectives_are_counted_and_timed_with_the_waiting_in_them():
    first, second = run_ranks(2, collectives)
    for rank in (first, second):
        assert rank["outside"] == 0
        assert rank["calls"] == 2 * 4
        assert rank["sizes"] == {"all_reduce": 2 * (4000 + 2000), "all_gather": 2 * 80, "barrier": 0}
        assert rank["is_put_back"]
        assert rank["log_is_off"]
        assert rank["logged"]["all_reduce"] == {
            "calls": 1,
            "bytes": 4000,
        }  # of DeepSpeed's own calls, in one step
    assert first["communication"] > 0.3  # it waited twice for the other, which slept
    assert second["communication"] < first["communication"]


# ---- what is used


def test_usage_counts_processor_time_of_its_own():
    usage = ResourceUsage(of_machine=True)
    before = usage.look()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = usage.look()
    assert after["cpu_s"] - before["cpu_s"] == pytest.approx(0.3, abs=0.1)
    assert after["machine_cpu_s"] - before["machine_cpu_s"] > 0.15
    assert before["memory_bytes"] > 2**20
    assert "gpu" not in before
    assert set(ResourceUsage(of_machine=False).look()) == {"cpu_s"}


def spin(done) -> None:
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    done.set()
    time.sleep(60)


def test_usage_counts_a_worker_once_however_often_it_looks():
    usage, context = ResourceUsage(of_machine=False), multiprocessing.get_context("spawn")
    done = context.Event()
    worker = context.Process(target=spin, args=(done,), daemon=True)
    worker.start()
    try:
        assert done.wait(60)
        first, second = (usage.look()["cpu_s"] for _ in range(2))
    finally:
        worker.kill()
        worker.join()
    assert second - first < 0.3


def test_usage_asks_a_gpu_not_more_often_than_it_samples():
    asked = []

    def gpu():
        asked.append(1)
        return {"busy": 0.5, "memory_busy": 0.25, "memory_bytes": 3, "power_w": 90.0}

    usage = ResourceUsage(of_machine=False, gpu=gpu)
    assert usage.look()["gpu"] == {"busy": 0.5, "memory_busy": 0.25, "memory_bytes": 3, "power_w": 90.0}
    assert "gpu" not in usage.look()
    assert len(asked) == 1


class NvmlError(Exception):
    """As pynvml's."""


def nvml(*, reports_power: bool = True) -> SimpleNamespace:
    """As the module pynvml, on a machine with one GPU."""

    def handle(uuid):
        if uuid != "GPU-1":
            raise NvmlError("Not Found")
        return "handle"

    def power(_):
        if not reports_power:
            raise NvmlError("Not Supported")
        return 250_500

    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=75, memory=40),
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(total=100, free=70, used=30),
        nvmlDeviceGetPowerUsage=power,
    )


def test_nvml_reports_the_gpu_that_was_named():
    use = {"busy": 0.75, "memory_busy": 0.4, "memory_bytes": 30, "power_w": 250.5}
    assert Gpu(nvml(), "GPU-1").use() == use
    assert Gpu(nvml(), "GPU-2").use() is None  # unknown to the driver
    assert Gpu(nvml(reports_power=False), "GPU-1").use() is None  # as on some virtual GPUs


def test_nvml_is_optional(monkeypatch):
    class NoDriver(SimpleNamespace):
        NVMLError = NvmlError

        def nvmlInit(self):
            raise NvmlError("Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where the package is not installed
    assert load_nvml() is None
    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())
    assert load_nvml() is None
    module = SimpleNamespace(NVMLError=NvmlError, nvmlInit=lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert load_nvml() is module


# ---- the account of an epoch


def test_shares_are_means_over_ranks_and_sum_to_one():
    even = dict.fromkeys(PHASES, 1.0)
    waits = {**dict.fromkeys(PHASES, 0.0), DATA: 7.0}
    found = shares([even, waits], flops=28e9, peak_flops_per_s=8e9)
    assert found[SHARES[DATA]] == pytest.approx((1 / 7 + 1) / 2)
    assert sum(found[key] for key in SHARES.values()) == pytest.approx(1)
    assert found["mfu"] == pytest.approx(28e9 / 7 / 8e9)
    assert "mfu" not in shares([even], 1e9, 0)
    assert shares([even, dict.fromkeys(PHASES, 0.0)], 1e9, 1e9) == {}


def test_memory_is_reported_of_the_rank_that_needs_most():
    def measured(activations: int, peak: int | None) -> MemoryMeasurement:
        terms = MemoryTerms(2**30, 2**30, 2**30, 0, 0, activations)
        return MemoryMeasurement(MemoryEstimate(terms, MemoryTerms(0, 0, 0, 0, 0, 0)), peak)

    found = peak_figures([measured(2**30, 5 * 2**30), measured(2**31, 6 * 2**30)])
    assert (found["peak_gib"], found["peak_activations_gib"], found["peak_parameters_gib"]) == (6, 2, 1)
    assert "peak_gib" not in peak_figures([measured(2**30, None)])


def test_a_line_has_what_is_known():
    assert describe({"images_per_s": 3.0}) == ""
    row = {"images_per_s": 30.0, SHARES[DATA]: 0.02, SHARES[COMMUNICATION]: 0.1}
    assert describe(row) == "30.0 images/s; data 2 %, communication 10 %"
    row |= {"peak_gib": 1.5, "peak_activations_gib": 1.25, "mfu": 0.4}
    assert describe(row).endswith("; peak 1.50 GiB (activations 1.25); 40 % of peak FLOP/s")


def test_peaks_of_devices():
    assert peak_of_gpu("NVIDIA A100-SXM4-80GB", PRECISIONS["autocast_bf16"]).flops_per_s == 312e12
    assert peak_of_gpu("NVIDIA A100-SXM4-80GB", PRECISIONS["fp32"]).flops_per_s < 100e12
    assert peak_of_gpu("NVIDIA Unheard", PRECISIONS["fp32"]) is None


@pytest.mark.parametrize(
    ("bursts", "flops_per_s", "source"),
    [
        # the first one is disturbed, and slow, though it was the second that was the fastest of all
        (
            [(9e9, 0.5), (95e9, 0.99), (100e9, 0.9)],
            100e9,
            "100 GFLOP/s, the fastest of 3 bursts of it, 2 of them",
        ),
        (
            [(40e9, 1.0), (100e9, 1.0), (60e9, 1.0), (98e9, 1.0)],
            100e9,
            "4 bursts of it, 4 of them undisturbed",
        ),
        (
            [(100e9, 0.5)] * 8,
            0.0,
            "not known, and no share of it is given: other load disturbed 8 of 8 bursts of it",
        ),
        ([(100e9, 0.5)] * 7 + [(310e9, 1.0)], 0.0, "other load disturbed 7 of 8 bursts of it"),
        ([(10e9 * 1.5**i, 1.0) for i in range(8)], 0.0, "it ran at 10 to 171 GFLOP/s, median 42"),
    ],
)
def test_a_busy_moment_does_not_set_the_peak_of_a_cpu(monkeypatch, bursts, flops_per_s, source):
    monkeypatch.setattr(cpu_peak, "PAUSE_S", 0)
    left = [cpu_peak.Burst(*burst) for burst in bursts]
    found = cpu_peak.judged(lambda: left.pop(0), "it")
    assert found.flops_per_s == flops_per_s
    assert source in found.source


def test_a_burst_beside_others_is_seen_as_disturbed(monkeypatch):
    seconds = iter([0.0, 0.05])  # of CPU, while the products take more than that
    monkeypatch.setattr(cpu_peak.time, "process_time", lambda: next(seconds))
    monkeypatch.setattr(
        cpu_peak.time, "perf_counter", iter([0.0, 0.0, 0.1, 0.1, 0.3, 0.3, 0.4, 0.4]).__next__
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu_peak.psutil, "cpu_times", lambda: None)
    burst = cpu_peak._burst(torch.ones(4, 4))
    assert burst.share == pytest.approx(0.05 / 0.4)
    assert burst.flops_per_s == pytest.approx(2 * cpu_peak.SIDE**3 / 0.1)


def test_the_peak_of_a_cpu_is_measured_or_reported_as_unknown():
    found = cpu_peak.peak_of_cpu(PRECISIONS["fp32"])
    assert found.flops_per_s > 1e8 or found.source.startswith("not known")
    assert "float32" in found.source


@pytest.mark.parametrize(
    ("has_bf16", "dtypes"), [(False, {torch.float32}), (True, {torch.float32, torch.bfloat16})]
)
def test_the_peak_is_not_measured_in_a_type_that_the_cpu_emulates(has_bf16, dtypes, monkeypatch):
    measured = []
    monkeypatch.setattr(cpu_peak, "has_bf16_instructions", lambda _: has_bf16)
    monkeypatch.setattr(cpu_peak, "_peak_of", lambda dtype: measured.append(dtype) or Peak(1.0, str(dtype)))
    assert cpu_peak.peak_of_cpu(PRECISIONS["autocast_bf16"]).flops_per_s == 1.0
    assert set(measured) == dtypes


def test_a_peak_is_measured_again_and_the_highest_one_stays(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    peaks = [
        Peak(0.0, "not known"),
        Peak(100e9, "100"),
        Peak(310e9, "310"),
        Peak(120e9, "120"),
        Peak(900e9, "900"),
    ]
    monkeypatch.setattr(time_profile_hook, "_peak_of_rank", lambda *_: peaks.pop(0))
    hook = TimeProfileHook(in_detail=False)
    engine = SimpleNamespace(device=torch.device("cpu"), all_gather=lambda item: [item, item])
    trainer = SimpleNamespace(engine=engine, figures={}, world=SimpleNamespace(is_main_process=True))
    trainer.spec = SimpleNamespace(ds=SimpleNamespace(precision=None))
    hook.trainer, hook._timer = trainer, SimpleNamespace(take=lambda: taken.pop(0))
    taken = [[StepTimes(1, dict.fromkeys(PHASES, seconds / len(PHASES)))] for seconds in (5, 5, 61, 61, 61)]
    monkeypatch.setattr(hook, "_flops_of_step", lambda step: 61e9)
    hook._flops_per_image = 1e9
    hook._measure_peak()
    seen = []
    for _ in range(5):
        trainer.figures.clear()
        hook.after_epoch()
        seen.append(trainer.figures.get("mfu"))
    assert seen[0] is None
    assert seen[1:] == pytest.approx([12.2e9 / 200e9, 1e9 / 200e9, 1e9 / 620e9, 1e9 / 620e9])
    assert len(peaks) == 1  # the fifth is not asked for
    assert [record.getMessage() for record in caplog.records] == [
        f"peak of a rank: {source}" for source in ("not known", "100", "310")
    ]
    assert hook.mfu(62.0) == pytest.approx(0.1)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * threads)  # others' load has gone
    assert hook.mfu(62.0) == pytest.approx(0.05)


def test_only_a_gpu_that_trains_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU for {device}")
    assert device_name(torch.device("cpu")) == ""
    assert device_name(torch.device("cuda:1")) == "a GPU for cuda:1"


def test_a_run_accounts_for_its_epochs_and_steps(tmp_path):
    place = make_place(tmp_path)
    done = alone(place, "timed", "--time_profile", "steps", "--no-rect_val", epochs=2)
    assert done.returncode == 0, done.stdout + done.stderr
    # On a busy machine the peak is not known, and no share of it is given.
    shares_given = ["mfu" in row for row in rows(place, "timed", "epoch")]
    assert shares_given in ([True, True], [False, True], [False, False])
    assert done.stdout.count("% of peak FLOP/s") == sum(shares_given)
    # Known later, the peak is told again; after the last epoch no share is left to give.
    later = {(True, True): (0,), (False, True): (1,), (False, False): (0, 1)}[tuple(shares_given)]
    assert done.stdout.count("peak of a rank: ") - 1 in later
    for row in rows(place, "timed", "epoch"):
        assert sum(row[key] for key in SHARES.values()) == pytest.approx(1)
        assert 0 < row.get("mfu", 0.5) < 1
        assert row["peak_gib"] > row["peak_activations_gib"] > 0
    (rank,) = json.loads((place / "runs/timed/steps.json").read_text())["ranks"]
    assert [step["step"] for step in rank["steps"]] == [1, 2, 3, 4, 5, 6]
    assert all(set(step["seconds"]) == set(PHASES) for step in rank["steps"])
    assert all(step["seconds"][FORWARD] > 0 for step in rank["steps"])
    assert len(rank["outside"]["validation"]) == 2
    assert rank["images_per_step"] == 8
    seen = [step["seen"] for step in rank["steps"]]
    assert all(a["cpu_s"] <= b["cpu_s"] for a, b in pairwise(seen))
    assert seen[0]["cpu_s"] < seen[-1]["cpu_s"]
    assert LOGGED_STEP in [step["step"] for step in rank["steps"]]


@pytest.mark.soak
def test_steps_of_a_run_that_stops_and_goes_on_are_kept(tmp_path):
    place = make_place(tmp_path)
    words = ["--time_profile", "steps", "--resume", "auto"]
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments(place, "stops", epochs=8), *words],
        env=environment(place),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = place / "runs/stops/metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and '"step": 4,' in metrics.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    stopped_at = int(re.search(r"after step (\d+)", said)[1])
    first = (place / "runs/stops/steps.json").read_text()
    kept = json.loads(first)["ranks"][0]["steps"]
    assert [step["step"] for step in kept] == list(range(1, stopped_at + 1))
    assert all(sum(step["seconds"].values()) > 0 and step["seen"] for step in kept)
    done = alone(place, "stops", *words, epochs=8, max_skipped_steps=30)
    assert done.returncode == 0, done.stderr
    (later,) = json.loads((place / f"runs/stops/steps_{stopped_at:08d}.json").read_text())["ranks"]
    assert [step["step"] for step in later["steps"]] == list(range(stopped_at + 1, 25))
    assert (place / "runs/stops/steps.json").read_text() == first


def test_the_account_can_be_left_out(tmp_path):
    place = make_place(tmp_path)
    done = alone(place, "plain", "--time_profile", "off", epochs=1)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows(place, "plain", "epoch")
    assert not set(SHARES.values()) - {"data_wait_share"} & set(row)
    assert "images/s  data " in done.stdout
    assert not (place / "runs/plain/steps.json").exists()


def test_in_every_epoch_a_step_is_measured():
    for steps_of_epoch in range(1, 40):
        every = measured_every(10, steps_of_epoch)
        assert 1 <= every <= 10
        shortest = max(1, steps_of_epoch - 1)
        assert all(any(step % every == 0 for step in range(k, k + shortest)) for k in range(60))
