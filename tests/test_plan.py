"""The plan: published peaks, its own code's agreement with a run's, and what it tells."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from dsyolo.account import Load, predict
from dsyolo.cli import main
from dsyolo.ds_config import check
from dsyolo.model.activations import PRIME, count_activations
from dsyolo.model.costs import node_costs, parameters_in_order
from dsyolo.model.moments import follow
from dsyolo.model.yolov5 import build_yolov5
from dsyolo.plan import command
from dsyolo.plan.counts import Counts, _Loss, count
from dsyolo.plan.hardware import read_hardware
from dsyolo.plan.memory import Ledger
from dsyolo.plan.scale import cover, simulate
from dsyolo.plan.strategies import strategies
from dsyolo.wire import gathered_elements, step_bytes

# GB (10^9 bytes) that torch's allocator had reserved, 16 images, fp16 autocast, SGD
PUBLISHED_GB = {
    ("yolov5n", 640): 1.5,
    ("yolov5m", 640): 5.0,
    ("yolov5l", 640): 8.1,
    ("yolov5x", 640): 12.2,
    ("yolov5s6", 1280): 10.5,
    ("yolov5l6", 1280): 30.5,
}


def meta(variant: str):
    with torch.device("meta"):
        return build_yolov5(variant, 80)


def plan_json(capsys, *words: object) -> tuple[int, list[dict]]:
    status = main(["plan", *map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


def entry(plans: list[dict], **settings: object) -> dict:
    (found,) = [one for one in plans if settings.items() <= one["settings"].items()]
    return found


PLAIN_FP16 = {
    "zero_stage": 0,
    "precision": "autocast_fp16",
    "micro_batch": 16,
    "accumulation": 1,
    "recompute": "none",
    "pipeline_stages": 1,
}


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(command, "count", counted)


@cache
def counted(model: str, size_px: int, num_classes: int) -> Counts:
    return count(model, size_px, num_classes)


def counted_plain(model: str, size_px: int) -> Counts:
    """Of autocast without recompute alone, which takes a third of the time."""
    network = meta(model)
    kinds = {"autocast_bf16": count_activations(network, (PRIME, 3, size_px, size_px), "autocast_bf16")}
    moments = follow(network, size_px, "autocast_bf16", _Loss(size_px))
    costs = tuple(node_costs(network, (1, 3, size_px, size_px)))
    modules = tuple(parameters_in_order(network))
    total = sum(map(sum, modules))
    return Counts(model, size_px, network, (costs, costs), modules, total, 0, kinds, moments, moments)


@pytest.mark.parametrize(("model", "size_px"), PUBLISHED_GB)
def test_published_peaks_are_predicted(model, size_px):
    source = {
        "train_batch_size": 16,
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "zero_optimization": {"stage": 0},
    }
    ds = check(source, world_size=1, accelerator="cuda")
    ledger = Ledger(counted_plain(model, size_px))
    peak = ledger.peak(ds, {"stage": 0}, ledger.plan(ds))
    assert peak.total / 1e9 == pytest.approx(PUBLISHED_GB[model, size_px], rel=0.06)
    assert peak.device["activations"] > 0.75 * peak.total
    assert {"parameters", "optimizer", "ema", "passing", "images", "workspace"} <= peak.device.keys()


def test_json_has_every_strategy_and_its_terms(capsys):
    words = ("--imgsz", 128, "--global-batch", 16, "--gpus", "1x24GiB")
    status, plans = plan_json(capsys, *words)
    assert status == 0
    one = entry(plans, **PLAIN_FP16)
    assert one["fits"]
    assert one["why_not"] is None
    for plan in plans:
        assert sum(plan["terms_gib"].values()) == pytest.approx(plan["peak_gpu_gib"])
        assert sum(plan["time_s"].values()) == pytest.approx(plan["step_s"])
        settings = plan["settings"]
        assert settings["micro_batch"] * settings["accumulation"] * settings["replicas"] == 16
    kinds = {(plan["settings"]["zero_stage"], plan["settings"]["precision"]) for plan in plans}
    # ZeRO 0 has no weights of two bytes, and alone has fp16 autocast
    assert kinds == {
        (0, "autocast_fp16"),
        *((stage, kind) for stage in range(4) for kind in ("fp32", "autocast_bf16")),
        *((stage, kind) for stage in (1, 2, 3) for kind in ("bf16", "fp16")),
    }


def test_one_count_tells_every_batch():
    network, loss = meta("yolov5s"), _Loss(128)
    for precision in ("fp32", "autocast_bf16"):
        counted = count_activations(network, (PRIME, 3, 128, 128), precision)
        for images in (2, 16):
            there = count_activations(network, (images, 3, 128, 128), precision)
            for names in (frozenset(), network.blocks()):
                assert counted.of_batch(images).peak_bytes(names) == there.peak_bytes(names)
    moments = follow(network, 128, "autocast_bf16", loss)
    saved = count_activations(network, (16, 3, 128, 128), "autocast_bf16").peak_bytes()
    assert moments.live(16).max() >= saved
    whole = follow(network, 128, "fp32", loss, network.blocks())
    assert whole.fixed[-1] < 2**20  # weights are not among what is made, nor are their gradients
    assert moments.gradients[0] == 0
    assert moments.gradients[-1] == 1
    assert np.all(np.diff(moments.gradients) >= 0)
    maps = 3 * 85 * sum((128 // stride) ** 2 for stride in network.strides)
    assert moments.per_image[-1] == 2 * maps  # nothing else of a batch outlives its pass, but the images


def test_the_plan_holds_what_a_run_predicts_at_its_start():
    ledger = Ledger(counted("yolov5n", 128, 80))
    hardware = read_hardware("4x24GiB", 1, None, None, None, [])
    network = ledger.counts.network
    seen = set()
    for strategy in strategies("yolov5n", 16, hardware):
        ds = strategy.ds
        if ds.stages > 1 or ds.micro_batch != 2 or ds.precision != "bf16" or ds.recompute != "none":
            continue
        zero = ds.deepspeed_json(ledger.counts.num_parameters, cpu=False)["zero_optimization"]
        plan = ledger.plan(ds)
        peak = ledger.peak(ds, zero, plan)
        kept = count_activations(network, (2, 3, 128, 128), "bf16").peak_bytes()
        load = Load(ledger.counts.groups(0, len(network.order)), kept, kept, kept, 0, 4, True)
        wanted = predict(load, ds, zero)
        if ds.zero_stage != 2:
            assert peak.at_start == wanted
        for term in ("parameters", "optimizer", "ema"):
            assert peak.device[term] == getattr(peak.at_start.device, term)
        seen.add((ds.zero_stage, ds.offload_optimizer, ds.offload_param))
    assert len(seen) == 7  # ZeRO 1 to 3, these with the optimizer on the host, and with the weights too


def test_costs_grow_linearly_with_the_batch():
    ledger = Ledger(counted("yolov5n", 128, 80))
    assert ledger.costs(5) == node_costs(ledger.counts.network, (5, 3, 128, 128))


# MB that a host sent in a step of yolov5s, by its counters (README, Between hosts)
MEASURED_MB = {
    (0, 2): 29.1,
    (1, 2): 29.1,
    (2, 2): 29.1,
    (3, 2): 40.8,
    (0, 4): 43.6,
    (2, 4): 43.6,
    (3, 4): 61.3,
}


@pytest.mark.parametrize(("stage", "ranks"), MEASURED_MB)
def test_traffic_is_that_of_measured_steps(stage, ranks):
    network = meta("yolov5s")
    source = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    ds = check(source, world_size=ranks, accelerator="cpu")
    modules = tuple(parameters_in_order(network))
    zero = ds.deepspeed_json(sum(map(sum, modules)), cpu=True)["zero_optimization"]
    moving = sum(b.numel() for name, b in network.named_buffers() if "running" in name)
    sent = step_bytes(modules, ds, zero, num_statistics=moving).total
    assert sent / 1e6 == pytest.approx(MEASURED_MB[stage, ranks], rel=0.01)


def test_what_is_not_kept_is_gathered_twice():
    zero = {"stage3_param_persistence_threshold": 5, "stage3_max_reuse_distance": 1}
    zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
    assert gathered_elements(((100, 5), (200,), (300,)), zero) == (2 * 300 + 300, 5)  # the last stays
    zero["stage3_max_reuse_distance"] = 10**9
    assert gathered_elements(((100, 5), (200,), (300,)), zero) == (600, 5)


def test_a_written_config_is_taken_and_another_file_is_not_lost(tmp_path, capsys):
    file = tmp_path / "my.json"
    words = ["plan", "--imgsz", "128", "--gpus", "2x24GiB", "--write", str(file)]
    assert main(words) == 0
    assert f"--deepspeed_config {file}" in capsys.readouterr().out
    assert check(file, world_size=2, accelerator="cuda").global_batch == 64
    assert main(words) == 0  # it says the same
    file.write_text("{}")
    assert main(words) == 2
    assert file.read_text() == "{}"
    assert main([*words, "--force"]) == 0


def test_where_nothing_fits_the_nearest_is_told(capsys):
    words = ["plan", "--imgsz", "128", "--gpus", "1x0.61GiB", "--global-batch", "4"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "Nothing fits. Nearest: ZeRO" in said
    assert "GiB would do" in said


def test_all_mistakes_are_told_at_once(capsys):
    words = ["--gpus", "8y24", "--imgsz", "100", "--nodes", "0", "--gpu", "Abacus", "--bandwidth", "fast"]
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    for option in ("--gpus", "--imgsz", "--nodes", "--gpu: Abacus", "--bandwidth"):
        assert option in said


def test_many_ranks_see_every_image_once_and_hold_what_zero_says():
    found = simulate("yolov5l", 80, 5000, (8, 64, 4096), 64, 1)
    for one in found:
        assert one.coverage[1:] == (1, 1), one
        if one.zero_stage != 2:
            assert one.states == pytest.approx((one.formula, one.formula), rel=0.01)
        if one.zero_stage != 3:
            assert one.sent == pytest.approx(one.sent_formula, rel=0.01)
    assert cover(1000, 64, 4, 16).steps == 16
