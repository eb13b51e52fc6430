"""`dsyolo plan`: published peaks, exact counts for every micro-batch, bytes on the wire, the ranking and what it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from dry_run import dry_run, dry_run_case
from ranks import long_but
from runs import make_place, together

from dsyolo import cli, train
from dsyolo.base.errors import UserError
from dsyolo.cluster.world import World
from dsyolo.config.cli_args import parse
from dsyolo.config.deepspeed.config import UNNAMED, check
from dsyolo.config.deepspeed.json_reader import JsonSource, read_source
from dsyolo.config.resolve import PlannedConfig
from dsyolo.config.run_config import RunConfig
from dsyolo.config.spec import PRECISIONS
from dsyolo.data.sampler import StepSampler
from dsyolo.models.activation_memory import count_activations
from dsyolo.planner import local_hardware as machine
from dsyolo.planner.auto import plan_config
from dsyolo.planner.comm_volume import comm_bytes, num_messages
from dsyolo.planner.hardware import DEVICES, GIB, Hardware, device_named, read_bytes, read_gpus, read_rate
from dsyolo.planner.local_hardware import bf16_warning, hardware_here
from dsyolo.planner.model_profile import ModelProfile, inference_bytes
from dsyolo.planner.predict import Planner
from dsyolo.planner.search import search
from dsyolo.planner.simulation import cover, simulate
from dsyolo.planner.strategy import StrategySettings, settings

# Peak GB that torch's allocator reserved, as published for YOLOv5's own loop: 16 images a GPU, fp16 AMP, SGD, EMA.
PUBLISHED_GB = {
    ("yolov5n", 640): 1.5,
    ("yolov5m", 640): 5.0,
    ("yolov5l", 640): 8.1,
    ("yolov5x", 640): 12.2,
    ("yolov5s6", 1280): 10.5,
    ("yolov5l6", 1280): 30.5,
}
PLAIN = StrategySettings(0, None, None, "none", PRECISIONS["autocast_fp16"], 16, 1, 1, 1, "SGD")


def one_gpu(memory_gib: int = 80) -> Hardware:
    return Hardware(DEVICES["A100-80"], 1, 1, memory_gib * GIB, None, 3e9)


@pytest.mark.parametrize("case", PUBLISHED_GB, ids=lambda case: case[0])
def test_published_peaks_are_predicted(case):
    model, image_size_px = case
    found = Planner(ModelProfile(model, 80, image_size_px), one_gpu()).predict(PLAIN)
    assert found.peak_bytes / 1e9 == pytest.approx(PUBLISHED_GB[case], rel=0.05)
    assert found.peak_bytes == sum(found.terms.values())
    assert found.fits


@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16", "autocast_fp16", "bf16", "fp16"])
def test_activations_of_any_micro_batch_are_those_that_a_run_counts(precision):
    work = ModelProfile("yolov5n", 5, 128)
    for images in (2, 7):
        direct = count_activations(work.network, (images, 3, 128, 128), PRECISIONS[precision])
        drawn = work.activations(images, PRECISIONS[precision])
        assert drawn.peak_bytes() == direct.peak_bytes()
        assert drawn.peak_bytes(drawn.blocks) == direct.peak_bytes(direct.blocks)


def test_settings_are_all_different_and_all_accepted():
    work = ModelProfile("yolov5n", 80, 64)
    found = list(settings(8, 64, "AdamW", tuple(PRECISIONS.values())))
    assert len(set(found)) == len(found) > 200
    for one in found:
        ds = check(one.deepspeed_json(), world_size=8, accelerator="cuda", layers=work.layers)
        assert (ds.micro_batch, ds.accumulation, ds.zero_stage) == (
            one.micro_batch,
            one.accumulation,
            one.zero_stage,
        )
        assert (ds.precision, ds.stages, ds.parallelism.recompute) == (
            one.precision,
            one.pipeline_stages,
            one.recompute,
        )
        assert (ds.optimizer.type, *ds.parallelism.offload.devices) == (
            one.optimizer,
            one.offload_optimizer,
            one.offload_param,
        )


def test_bytes_on_the_network_are_those_that_were_measured():
    """README, Between hosts: yolov5s on 2 and 4 hosts, ZeRO 0 to 3, in MB."""
    network = ModelProfile("yolov5s", 80, 64).network
    numels = [p.numel() for p in network.parameters()]
    measured = {2: (29.1, 29.1, 29.1, 40.8), 4: (43.6, 43.6, 43.6, 61.3)}
    for ranks, figures in measured.items():
        for stage, megabytes in enumerate(figures):
            ds = check(
                {"train_batch_size": ranks, "zero_optimization": {"stage": stage}},
                world_size=ranks,
                accelerator="cpu",
            )
            zero = ds.deepspeed_json(sum(numels), cpu=True)["zero_optimization"]
            got = comm_bytes(zero, numels, ranks, 1)
            assert got / 1e6 == pytest.approx(megabytes, rel=0.015), (ranks, stage)
    owners = {"stage": 2, "use_multi_rank_bucket_allreduce": False}
    once, twice = (comm_bytes(owners, [1000], 2, accumulation) for accumulation in (1, 2))
    assert (once, twice) == (4000, 6000)
    assert comm_bytes({"stage": 2}, [1000], 2, 1) == 6000


def test_a_pipeline_sends_what_was_measured_and_crosses_nodes_where_its_stages_are():
    """The ranks of a stage are neighbours: on two nodes of two GPUs each node has a stage, whose activations cross."""
    pipeline = StrategySettings(1, None, None, "none", PRECISIONS["fp32"], 4, 4, 2, 1, "SGD")
    found = Planner(ModelProfile("yolov5n", 4, 128), one_gpu()._replace(gpus=2)).predict(pipeline)
    assert found.comm_bytes / 1e6 == pytest.approx(1.58, rel=0.01)  # of a rank, on loopback
    work = ModelProfile("yolov5s", 80, 320)
    a10 = Hardware(DEVICES["A10"], 2, 2, 24 * GIB, None, 1e9)
    wide = pipeline._replace(dp_size=2, accumulation=8)
    slow, fast, single = (
        Planner(work, machine).predict(wide).times
        for machine in (a10, a10._replace(network_bytes_s=2e9), a10._replace(nodes=1, gpus=4))
    )
    inside = a10.device.link_bytes_s
    assert slow.communication == single.communication  # gradients stay in a node
    assert a10.border_bytes_s(0, 2) == 1e9 / 2  # two pairs share the network
    assert (slow.bubble - single.bubble) / (fast.bubble - single.bubble) == pytest.approx(
        (2 / 1e9 - 1 / inside) / (2 / 2e9 - 1 / inside)
    )
    ring = Planner(work, a10).predict(wide._replace(pipeline_stages=1, dp_size=4))
    assert ring.times.communication > 5 * single.communication
    assert a10._replace(gpus=4).border_bytes_s(0, 1) == inside
    assert a10._replace(gpus=4).border_bytes_s(1, 3) == 1e9  # of the ranks 3 to 5 one leaves each node


def plan(capsys, *words: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_as_json_every_strategy_has_its_terms(capsys):
    words = "--model yolov5n --imgsz 640 --global-batch 16 --gpus 1x80GiB --json"
    status, out, _ = plan(capsys, *words.split())
    assert status == 0
    found = json.loads(out)
    wanted = {**PLAIN._asdict(), "precision": PLAIN.precision.name}
    plain = [one for one in found if {**one["settings"], **wanted} == one["settings"]]
    assert len(plain) == 1
    assert plain[0]["peak_gpu_gib"] * GIB / 1e9 == pytest.approx(1.5, rel=0.05)
    for one in found:
        assert one["peak_gpu_gib"] == pytest.approx(sum(one["terms_gib"].values()))
        assert one["fits"] == (not one["why_not"])
    assert [one["rank"] for one in found] == list(range(1, len(found) + 1))


def test_a_cpu_is_its_own_host():
    cpu = one_gpu()._replace(accelerator="cpu")
    planner, precisions = Planner(ModelProfile("yolov5s", 80, 64), cpu), (PRECISIONS["fp32"],)
    found = search(planner, 8, "SGD", precisions)
    assert len(found.fitting) > 4
    assert not [one for one in found.fitting + found.others if one.settings.offload_optimizer]
    plain = PLAIN._replace(precision=PRECISIONS["fp32"], micro_batch=8, zero_stage=1)
    own, offloaded = (planner.predict(plain._replace(offload_optimizer=device)) for device in (None, "cpu"))
    assert offloaded.peak_bytes > own.peak_bytes  # copies come on top
    assert offloaded.host_bytes == 0


def test_a_faster_one_without_headroom_says_so(capsys):
    _, out, _ = plan(capsys, *["--model", "yolov5n", "--gpus", "1x0.7GiB"])
    assert "faster, but leaves less than 5% of the memory free." in out
    assert "At most 1 image can be" in out


def test_validation_has_to_fit_too(capsys, tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    words = f"--model yolov5n6 --imgsz 1280 --gpus 1x2GiB --global-batch 64 --write {path}".split()
    status, out, _ = plan(capsys, *words)
    images = int(re.search(r"At most (\d+) images can be validated at a time", out)[1])
    assert status == 0
    assert f"give --val_batch_size {images}." in out
    assert f"--data data.yaml --val_batch_size {images}\n" in out
    assert 8 < images < 16
    work = ModelProfile("yolov5n6", 80, 1280)
    most = inference_bytes(work.network, (images, 3, 1280, 1280), PRECISIONS["autocast_bf16"])
    assert work.most_inferred(most, PRECISIONS["autocast_bf16"]) == images
    assert work.most_inferred(most - 1, PRECISIONS["autocast_bf16"]) == images - 1
    status, out, err = plan(capsys, *words[:4], "--gpus", "1x0.65GiB", "--write", str(tmp_path / "none.json"))
    assert (status, (tmp_path / "none.json").exists()) == (1, False)
    assert "Nothing was written to" in err

    run = run_config(tmp_path, deepspeed_config="auto")
    small = one_gpu()._replace(accelerator="cpu", memory_bytes=int(1.2 * GIB))
    monkeypatch.setattr(train, "hardware_here", lambda *_: small)
    words = f"--deepspeed_config=auto --data={run.data} --model=yolov5n6 --imgsz=1280".split()
    planned = train.read(words, World(0, 1, 0, 1))
    assert planned.config.val_batch_size < 16
    assert any(
        line.startswith(f"val_batch_size: {planned.config.val_batch_size}, as 16") for line in planned.notes
    )
    assert train.read([*words, "--val_batch_size=2"], World(0, 1, 0, 1)).config.val_batch_size == 2


def test_what_is_recommended_fits_and_can_be_written_and_used(capsys, tmp_path):
    path = tmp_path / "configs" / "mine.json"
    words = (
        f"--model yolov5l --imgsz 640 --global-batch 64 --gpus 2x12GiB --gpu RTX3090 --write {path}".split()
    )
    status, out, _ = plan(capsys, *words)
    assert status == 0
    assert f"--num_gpus 2 dsyolo/train.py --deepspeed_config {path} --model yolov5l" in out
    ds = check(path, world_size=2, accelerator="cuda")
    assert ds.global_batch == 64
    first = next(line for line in out.splitlines() if line.startswith(" 1"))
    assert first.split()[-1] == "yes"
    assert plan(capsys, *words)[0] == 0  # the same again
    path.write_text("{}")
    status, _, err = plan(capsys, *words)
    assert status == 2
    assert f"{path} given, but it has other content" in err
    assert path.read_text() == "{}"


def test_a_small_gpu_gets_the_fewest_recomputed_blocks_and_too_small_a_one_is_reported(capsys):
    words = [
        "--model",
        "yolov5m",
        "--global-batch",
        "8",
        "--gpus",
        "1x2.2GiB",
        "--precision",
        "autocast_fp16",
        "--json",
    ]
    found = json.loads(plan(capsys, *words)[1])
    at_once = [
        one for one in found if one["settings"]["micro_batch"] == 8 and one["settings"]["zero_stage"] == 0
    ]
    recompute = {one["settings"]["recompute"]: one["fits"] for one in at_once}
    assert recompute.pop("none") is False
    assert recompute.pop("blocks") is True
    (budget,) = recompute
    assert recompute[budget] is True
    status, out, _ = plan(
        capsys, "--model", "yolov5x6", "--imgsz", "1280", "--global-batch", "2", "--gpus", "2x1GiB"
    )
    assert status == 1
    assert "Nothing fits 2 GPUs of 1.0 GiB. The nearest is " in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--gpus 8",
            "--gpus: '8' given, but it must be a number of GPUs and the memory of each, such as 8x24GiB",
        ),
        ("--gpus 0x24GiB", "--gpus: '0x24GiB' given"),
        (
            "--gpus 8x24GiB --global-batch 60",
            "--global-batch: 60 given, but 8 GPUs take equal shares of it. Take 56 or 64",
        ),
        (
            "--gpus 1x24GiB --imgsz 650",
            "--imgsz: 650 given, but the images of yolov5n must be a multiple of 32, and at least 64. "
            "Set it to 640 or 672.",
        ),
        ("--gpus 1x24GiB --bandwidth 25", "--bandwidth: '25' given, but it must be a rate such as 25GB/s"),
        ("--gpus 1x16GiB --precision bf16", "--precision: bf16 given, but a T4 has no bf16"),
        ("--gpus 1x16GiB --classes 0", "--classes: 0 given, but it must be between 1 and 10000"),
    ],
)
def test_mistakes_are_reported(capsys, words, told):
    status, _, err = plan(capsys, *words.split())
    assert status == 2
    assert told in err


def test_amounts_are_read():
    assert read_gpus("8x24GiB") == (8, 24 * GIB)
    assert read_rate("200Gb/s") == read_rate("200Gbit/s") == read_rate("25GB/s") == 25e9
    for text in ("24", "24B", "x"):
        with pytest.raises(ValueError, match="an amount such as 24GiB"):
            read_bytes(text)
    assert read_bytes("1.5GB") == 1_500_000_000
    assert (read_rate("25GB/s"), read_rate("200Gbit/s")) == (25e9, 25e9)


def test_the_loss_holds_what_it_is_estimated_to():
    """Between the passes of the network: gradients of the maps, and what is added to the largest of them."""
    from dsyolo.detection.loss import DetectionLoss

    work = ModelProfile("yolov5n", 80, 320)
    shapes = [(4, 3, 320 // stride, 320 // stride, 85) for stride in work.network.strides]
    maps = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    loss = DetectionLoss(torch.ones(3, 3, 2), 80, 320)
    import training

    targets = training.batch(0, 0, 1).targets
    with torch.profiler.profile(profile_memory=True) as profile:
        loss(tuple(maps), targets)[0].backward()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    assert most == pytest.approx(work.loss_bytes(4, PRECISIONS["fp32"]), rel=0.15)


# ---- what a JSON leaves to the machine


def run_config(tmp_path, **options) -> RunConfig:
    words = {"data": tmp_path / "data.yaml", "model": "yolov5s", **options}
    (tmp_path / "data.yaml").write_text("train: .\nval: .\nnames: [a]\n")
    return parse([word for key, value in words.items() for word in (f"--{key}", str(value))])


def filled(tmp_path, content: dict, hardware: Hardware, saved_batch: int | None = None) -> PlannedConfig:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return plan_config(
        run_config(tmp_path, deepspeed_config=path), read_source(path), hardware, 80, saved_batch
    )


@pytest.mark.soak
def test_a_plan_heeds_recompute_and_ranks_that_cannot_share_the_batch(tmp_path):
    a10 = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    for recompute in ("none", "blocks", "0.500GiB"):
        run = run_config(tmp_path, deepspeed_config="auto", recompute=recompute)
        got = plan_config(run, None, a10, 80)
        said = got.ds.source.get("activation_checkpointing", {}).get("recompute", "none")
        assert said == recompute
        assert ("recompute" in got.lines[0]) == (recompute != "none")
    activations = float(re.search(r"activations (\d+\.\d+)", got.lines[1])[1])
    assert 0.25 < activations <= 0.5
    with pytest.raises(UserError, match="no strategy fits"):
        plan_config(run.model_copy(update={"recompute": "0.001GiB"}), None, a10, 80)
    words = f"--deepspeed_config=auto --data={run.data} --imgsz=64 --recompute=blocks".split()
    assert (
        train.read(words, World(0, 2, 0, 2)).ds.parallelism.recompute == "blocks"
    )  # said once, and so taken
    (tmp_path / "data.yaml").write_text("train: .\nval: nowhere\nnames: [a]\n")
    with pytest.raises(UserError, match=r"data\.yaml cannot be used.*\n.*nowhere") as told:
        train.read(words, World(0, 2, 0, 2))
    assert "auto cannot be used" not in str(told.value)  # it was not planned yet
    with pytest.raises(UserError, match="64 when it was saved, and 3 ranks do not divide it"):
        plan_config(run_config(tmp_path, deepspeed_config="auto"), None, a10._replace(gpus=3), 80, 64)


def test_what_ran_out_of_memory_is_planned_for_less_and_kept_so(tmp_path):
    a10 = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "train_batch_size": 64}))
    whole = run_config(tmp_path, deepspeed_config=path)
    first, again = (
        plan_config(one, read_source(path), a10, 80)
        for one in (whole, whole.model_copy(update={"halve_micro_batch": True}))
    )
    sizes = [check(one.ds.source, world_size=2, accelerator="cuda") for one in (first, again)]
    assert sizes == [replace(one.ds, path=UNNAMED) for one in (first, again)]
    assert [(ds.micro_batch, ds.accumulation) for ds in sizes] == [(32, 1), (16, 2)]


@pytest.mark.parametrize(
    ("gpu", "stage", "given", "expected"),
    [
        ("A10", 2, {"bf16": "auto", "fp16": {"enabled": "auto"}}, "bf16"),
        ("T4", 2, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "fp16"),
        ("A10", 0, {"bf16": {"enabled": "auto"}}, "autocast_bf16"),
        ("A10", 0, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "autocast_bf16"),
        ("A10", 2, {"fp16": {"enabled": "auto"}}, "autocast_bf16"),
        ("A10", 0, {"fp16": "auto"}, "autocast_bf16"),
        ("A10", 0, {"fp16": "auto", "torch_autocast": {"enabled": False}}, "fp32"),
        ("A10", 0, {"torch_autocast": {"enabled": "auto", "dtype": "float16"}}, "autocast_fp16"),
        ("T4", 0, {"fp16": {"enabled": "auto"}}, "autocast_fp16"),
        ("T4", 2, {"bf16": {"enabled": "auto"}}, "fp32"),
        ("new CPU", 0, {"fp16": {"enabled": "auto"}}, "autocast_bf16"),
        ("new CPU", 2, {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, "bf16"),
        ("new CPU", 2, {"fp16": {"enabled": "auto"}}, "autocast_bf16"),
        ("old CPU", 0, {"fp16": {"enabled": "auto"}}, "fp32"),
        ("A10", 2, {"bf16": {"enabled": "auto"}, "torch_autocast": {"enabled": "auto"}}, "bf16"),
        ("A10", 1, {"torch_autocast": {"enabled": True, "dtype": "auto"}}, "autocast_bf16"),
        ("T4", 0, {"torch_autocast": {"enabled": "auto", "dtype": "auto"}}, "autocast_fp16"),
        ("A10", 2, {"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16"),
        ("T4", 1, {"torch_autocast": {"enabled": True, "dtype": "auto"}}, "autocast_bf16"),
        ("T4", 1, {"torch_autocast": {"enabled": "auto"}}, "fp32"),
        ("A10", 1, {"torch_autocast": {"enabled": "auto", "dtype": "float16"}}, "fp32"),
        ("old CPU", 0, {"torch_autocast": {"enabled": True, "dtype": "auto"}}, "autocast_bf16"),
        ("old CPU", 2, {"torch_autocast": "auto", "bf16": "auto", "fp16": "auto"}, "fp32"),
    ],
)
def test_a_precision_that_is_auto_is_one_that_the_device_has(tmp_path, gpu, stage, given, expected):
    accelerator = "cpu" if "CPU" in gpu else "cuda"
    kind = DEVICES.get(gpu, DEVICES["A10" if gpu == "new CPU" else "T4"])
    hardware = Hardware(kind, 1, 2, 16 * GIB, None, 3e9, accelerator)
    content = {"train_batch_size": 16, "zero_optimization": {"stage": stage}, **given}
    got = filled(tmp_path, content, hardware)
    ds = check(got.ds.source, world_size=2, accelerator=accelerator)
    assert ds.precision.name == got.ds.precision.name == expected
    is_open = not any(block != "auto" and block.get("enabled") is True for block in given.values())
    if expected == "fp32" or (is_open and "autocast" in expected and "torch_autocast" not in given):
        (line,) = [line for line in got.lines if line.startswith("precision: ")]
        assert ("fp32, as" in line) == (expected == "fp32")


def test_an_optimizer_that_is_auto_is_the_recipes(tmp_path):
    a10 = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    for name, rate, decay in (("auto", 0.01, 0.0005), ("AdamW", 0.001, 0.0)):
        optimizer = {"type": name, "params": {"lr": "auto", "weight_decay": "auto"}}
        got = filled(tmp_path, {"train_batch_size": 16, "optimizer": optimizer}, a10)
        params = check(got.ds.source, world_size=2, accelerator="cuda").optimizer.params
        # One value whether it is "auto" or missing: the recipe's, or that of DeepSpeed's Adam.
        assert (params["lr"], params["weight_decay"]) == (rate, decay)
        missing = check(
            {"train_batch_size": 16, "optimizer": {"type": name.replace("auto", "SGD")}},
            world_size=2,
            accelerator="cuda",
        )
        assert missing.optimizer.params == params
        got = filled(tmp_path, {"train_batch_size": 16, "optimizer": {"type": name, "params": "auto"}}, a10)
        assert check(got.ds.source, world_size=2, accelerator="cuda").optimizer.params == params


@pytest.mark.parametrize(("sizes", "ranks"), [((2, 1), 3), ((4, 4), 8), ((1,), 1)])
def test_every_machine_plans_for_the_whole_world(sizes, ranks):
    found = {hardware_here(World(0, ranks, 0, size), "cpu")[1:3] for size in sizes}
    assert len(found) == 1
    assert {nodes * gpus for nodes, gpus in found} == {ranks}


def test_a_gpu_that_is_not_in_the_table_is_asked_for_bf16(monkeypatch):
    for capability, has_bf16 in (((7, 5), False), ((8, 6), True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Quadro RTX 6000")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        monkeypatch.setattr(machine, "total_memory", lambda _: 24 * GIB)
        assert hardware_here(World(0, 1, 0, 1), "cuda").device.has_bf16 == has_bf16


@pytest.mark.parametrize(
    ("precision", "zero_stage", "accelerator", "remedy"),
    [
        ("autocast_bf16", 2, "cpu", {}),
        ("bf16", 1, "cpu", {}),
        ("autocast_bf16", 2, "cuda", {"fp16": {"enabled": True}}),
        ("bf16", 1, "cuda", {"fp16": {"enabled": True}}),
        ("autocast_bf16", 0, "cuda", {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
    ],
)
def test_bf16_without_its_instructions_is_a_warning_and_its_remedy_is_accepted(
    precision, zero_stage, accelerator, remedy, monkeypatch
):
    has_bf16 = False
    monkeypatch.setattr(machine, "has_bf16_instructions", lambda *_: has_bf16)
    text = bf16_warning(PRECISIONS[precision], zero_stage, accelerator)
    assert text.startswith("bf16: " if precision == "bf16" else "torch_autocast: ")
    written = re.search(r"Write (.*) in its place", text)
    assert (json.loads(f"{{{written[1]}}}") if written else {}) == remedy
    followed = {"train_batch_size": 16, "zero_optimization": {"stage": zero_stage}, **remedy}
    taken = check(followed, world_size=1, accelerator=accelerator).precision
    assert taken.compute == ("fp16" if remedy else "fp32")
    assert not bf16_warning(taken, zero_stage, accelerator)
    has_bf16 = True
    assert not bf16_warning(PRECISIONS[precision], zero_stage, accelerator)


def test_a_key_given_twice_is_no_matter_of_auto(tmp_path):
    a10 = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 16, "train_batch_size": 32, "gradient_clipping": "auto"}')
    with pytest.raises(UserError, match="train_batch_size: given twice"):
        plan_config(run_config(tmp_path, deepspeed_config=path), read_source(path), a10, 80)


def test_all_is_planned_for_the_machine_and_again_for_less_memory(tmp_path):
    a10 = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    first = plan_config(run_config(tmp_path, deepspeed_config="auto"), None, a10, 80)
    assert check(first.ds.source, world_size=2, accelerator="cuda").global_batch == 64
    assert first.lines[0].startswith("planned for 2 x 24.0 GiB (A10): ZeRO ")
    halved = run_config(tmp_path, deepspeed_config="auto").model_copy(update={"halve_micro_batch": True})
    again = plan_config(halved, None, a10, 80)
    peaks = [float(one.lines[1].split()[1]) for one in (first, again)]
    assert peaks[1] < 0.65 * peaks[0]
    assert re.search(r"\(A10\), for \d+\.\d GiB of each, as memory ran out: ZeRO", again.lines[0])
    cpu = a10._replace(accelerator="cpu", gpus=1)  # states are most of it: less by a fifth is all there is
    states = run_config(tmp_path, deepspeed_config="auto", model="yolov5l", imgsz=64)
    wide, least = (
        plan_config(one, None, cpu, 80)
        for one in (states, states.model_copy(update={"halve_micro_batch": True}))
    )
    peaks = [float(one.lines[1].split()[1]) for one in (wide, least)]
    assert 0.6 * peaks[0] < peaks[1] < peaks[0]
    assert least.val_images == 1
    one = states.model_copy(update={"halve_micro_batch": True, "recompute": "blocks"})
    with pytest.raises(UserError, match="memory ran out, and no plan needs less"):
        plan_config(one, None, cpu, 80, 1)
    odd = plan_config(run_config(tmp_path, deepspeed_config="auto"), None, a10._replace(gpus=6), 80)
    assert check(odd.ds.source, world_size=6, accelerator="cuda").global_batch == 66
    resumes = plan_config(run_config(tmp_path, deepspeed_config="auto"), None, a10, 80, 48)
    assert check(resumes.ds.source, world_size=2, accelerator="cuda").global_batch == 48
    with pytest.raises(UserError, match=r"no strategy fits into 0\.60 GiB per rank .* at 64 images a step"):
        plan_config(
            run_config(tmp_path, deepspeed_config="auto"),
            None,
            a10._replace(memory_bytes=int(0.6 * GIB)),
            80,
        )


def test_values_that_are_auto_are_filled_in_and_reported(tmp_path):
    a10 = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    content = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01}},
    }
    got = filled(tmp_path, content, a10)
    ds = check(got.ds.source, world_size=2, accelerator="cuda")
    assert (ds.global_batch, ds.micro_batch, ds.accumulation, ds.precision.name) == (64, 32, 1, "bf16")
    assert got.lines == (
        "train_batch_size: auto, so 64",
        "train_micro_batch_size_per_gpu: auto, so 32",
        "gradient_accumulation_steps: auto, so 1",
        "bf16.enabled: auto, so true",
        f"zero_optimization.reduce_bucket_size: auto, so {got.ds.source['zero_optimization']['reduce_bucket_size']}",
        "optimizer.params.lr: auto, so 0.001",
        got.lines[6],
    )
    assert got.lines[6].startswith("peak ")
    assert got.ds.source["optimizer"]["params"] == {"lr": 0.001, "weight_decay": 0.01}
    small = filled(tmp_path, content, a10._replace(memory_bytes=3 * GIB))
    assert check(small.ds.source, world_size=2, accelerator="cuda").micro_batch in (4, 8, 16)
    given = {**content, "train_micro_batch_size_per_gpu": 12}
    ds = check(filled(tmp_path, given, a10).ds.source, world_size=2, accelerator="cuda")
    assert (ds.global_batch, ds.micro_batch, ds.accumulation) == (72, 12, 3)
    lower = filled(tmp_path, {**given, "gradient_clipping": "auto"}, a10)
    assert "gradient_clipping: auto, so 10.0" in lower.lines
    piped = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 1},
        "pipeline": {"stages": 2},
    }
    ds = check(filled(tmp_path, piped, a10).ds.source, world_size=2, accelerator="cuda")
    assert (ds.micro_batch, ds.accumulation) == (16, 4)  # two for each stage, so that they do not wait
    for wrong, told in (
        ({"zero_optimization": {"stagee": "auto"}}, "Did you mean stage"),
        ({"scheduler": {"type": "OneCycle", "params": "auto"}}, "scheduler.type: "),
        ({"train_micro_batch_size_per_gpuu": "auto"}, "Did you mean train_micro_batch_size_per_gpu"),
    ):
        with pytest.raises(UserError, match=told):
            filled(tmp_path, {"train_batch_size": 16, "gradient_clipping": "auto", **wrong}, a10)
    nothing = {"train_batch_size": 8, "activation_checkpointing": {"recompute": "none"}}
    (tmp_path / "ds.json").write_text(json.dumps(nothing))
    assert read_source(tmp_path / "ds.json") == JsonSource(str(tmp_path / "ds.json"), nothing)


def test_an_auto_micro_batch_is_planned_with_the_buckets_of_the_json(tmp_path):
    """The accumulation alone given, so the micro-batch is not what is left of a batch; and 5e8 elements are 1.86 GiB."""
    a10 = Hardware(DEVICES["A10"], 1, 2, 6 * GIB, None, 3e9)
    sizes, peaks = {}, {}
    for name, zero in (
        ("small", {}),
        ("large", {"reduce_bucket_size": 5e8}),
        ("two", {"reduce_bucket_size": 5e8, "overlap_comm": True}),
        ("ZeRO 3", {"stage": 3, "reduce_bucket_size": 5e8, "overlap_comm": True}),
    ):
        content = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2, **zero},
        }
        got = filled(tmp_path, content, a10)
        ds = check(got.ds.source, world_size=2, accelerator="cuda")
        assert (ds.accumulation, ds.global_batch) == (2, 4 * ds.micro_batch)
        assert (ds.micro_batch, ds.batch) == (got.ds.micro_batch, got.ds.batch)
        (line,) = [line for line in got.lines if line.startswith("peak ")]
        buckets = float(re.search(r"buckets (\d+\.\d+)", line)[1])
        assert buckets == pytest.approx({"small": 0, "two": 3.73}.get(name, 1.86), abs=0.06)
        named = [line for line in got.lines if line.startswith("planned with ")]
        assert named == [] if not zero else "reduce_bucket_size 500000000.0" in named[0]
        sizes[name], peaks[name] = ds.micro_batch, float(line.split()[1])
        assert peaks[name] <= 6
    assert sizes["small"] > sizes["large"] == sizes["ZeRO 3"] > sizes["two"]
    none = filled(tmp_path, content, a10._replace(memory_bytes=GIB))
    assert any("no micro-batch fits into 0.40 GiB, not even 1 image" in line for line in none.lines)


def test_a_plan_takes_the_cuts_and_the_type_that_is_sent_of_the_json():
    hardware = Hardware(DEVICES["A10"], 1, 2, 24 * GIB, None, 3e9)
    planner = Planner(ModelProfile("yolov5n", 80, 320), hardware)
    assert [stage.nodes[0] for stage in planner.stages(2, (7,))][1] == planner.profile.network.order[7]
    base = {"train_batch_size": 16, "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000}}
    plain, sent = (
        check({**base, **more}, world_size=2, accelerator="cuda")
        for more in ({}, {"communication_data_type": "bf16"})
    )
    settings = StrategySettings(2, None, None, "none", plain.precision, 8, 1, 1, 2, "SGD")
    more = (
        planner.predict(settings, sent).terms["buckets"] - planner.predict(settings, plain).terms["buckets"]
    )
    assert more == 2 * 1_000_000  # a copy of what is in a bucket


def test_two_ranks_plan_for_this_machine_train_and_keep_the_plan(tmp_path):
    place = make_place(tmp_path)
    done = together(place, "auto", deepspeed_config="auto", epochs=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "planned for 2 x " in done.stdout
    written = place / "runs/auto/deepspeed_auto.json"
    assert check(written, world_size=2, accelerator="cpu").global_batch == 64
    assert (place / "runs/auto/weights/last.safetensors").exists()


# ---- many ranks, on paper


def test_on_thousands_of_ranks_every_image_comes_once_and_states_are_the_formulas():
    found = simulate("yolov5x", 80, 20_001, [8, 512, 4096], 64, 1)
    assert [(one.ranks, one.zero_stage) for one in found] == [
        (n, z) for n in (8, 512, 4096) for z in range(4)
    ]
    for one in found:
        assert (one.coverage.least, one.coverage.most) == (1, 1)
        assert one.coverage.steps == -(-20_001 // one.global_batch)
        assert one.global_batch == max(64, one.ranks)
        assert one.states == pytest.approx([one.formula] * 2, rel=0.01)
        is_small = (
            one.zero_stage in (1, 2) and 86_749_405 // one.ranks < 2**18
        )  # whole buckets are summed then
        assert 0.9 < one.sent / one.sent_formula / (1.5 if is_small else 1) < 1.01
        assert one.saved[0] <= 12 * 86_749_405 / one.ranks <= one.saved[1]


@pytest.mark.parametrize("zero_stage", long_but([2], range(4)))
@pytest.mark.parametrize("ranks", long_but([100], [8, 100, 4096]))
def test_the_engine_that_trains_holds_and_sends_what_is_expected_of_thousands_of_ranks(ranks, zero_stage):
    (found,) = dry_run([dry_run_case("yolov5n", zero_stage, ranks)])
    (paper,) = [
        one for one in simulate("yolov5n", 80, 20_001, [ranks], ranks, 1) if one.zero_stage == zero_stage
    ]
    assert found.states == pytest.approx(found.states_expected, rel=0.01)
    assert found.states == pytest.approx(paper.formula, rel=0.01)
    # beside weights and gradients also BatchNorm's statistics and counts of targets are sent
    assert found.sent_expected < found.sent < 1.01 * found.sent_expected
    assert found.buckets <= 1.01 * found.buckets_expected


def test_what_a_plan_cannot_be_made_for_is_refused(tmp_path, capsys):
    (tmp_path / "other").write_bytes(b"\xff\xfe")
    for words, told in (
        ("--gpus 8x24GiB --nodes 0", "--nodes: 0 given"),
        (
            "--gpus 1x24GiB --imgsz 32",
            "--imgsz: 32 given, but the images of yolov5n must be a multiple of 32, and at least 64",
        ),
        (
            "--gpus 1x24GiB --model yolov5n6 --imgsz 64",
            "the images of yolov5n6 must be a multiple of 64, and at least 128",
        ),
        ("--gpus 8x24", "an amount such as 24GiB"),
        ("--gpus 8x24GiB --bandwidth 9GB/s", "it is between nodes, and there is 1"),
        (f"--gpus 1x24GiB --write {tmp_path}", "is a folder or device"),
        ("--gpus 1x24GiB --write /dev/full --force", "is a folder or device"),
        (f"--gpus 1x24GiB --write {tmp_path}/other", "it has other content"),
    ):
        status, _, said = plan(capsys, *words.split())
        assert status == 2, words
        assert told in said, words
    assert plan(capsys, "--gpus", "1x24GiB", "--gpu", "h100")[0] == 0


def test_messages_cost_time_where_there_are_many(capsys):
    """A small network on two nodes: ZeRO 3 gathers each layer by itself."""
    _, out, _ = plan(capsys, *["--gpus", "8x24GiB", "--nodes", "2", "--json"])
    best = {one["settings"]["zero_stage"]: one["step_s"]["step"] for one in reversed(json.loads(out))}
    assert best[0] < best[3]
    sizes = [100_000] * 60
    zero3 = {"stage": 3, "reduce_bucket_size": 6_000_000, "stage3_param_persistence_threshold": 1000}
    assert num_messages(zero3, sizes, 2) == 2 * (1 + 2 * 60) + 1
    assert num_messages({"stage": 1, "reduce_bucket_size": 2_000_000}, sizes, 2) == 3 + 1


def test_a_sampler_that_loses_images_would_be_seen(monkeypatch):
    plain = StepSampler.micro_batches

    def of_one_rank_less(self, step):
        return iter(()) if self.dp_rank == 3 else plain(self, step)

    monkeypatch.setattr(StepSampler, "micro_batches", of_one_rank_less)
    assert cover(100, 8, 1, 8).least == 0
    assert cli.main(["simulate", "--model", "yolov5n", "--images", "100", "--ranks", "8", "--json"]) == 1
    assert cli.main(["simulate", "--ranks", "\u00b2"]) == 2  # a digit, but no number


def test_the_simulation_is_printed_and_its_mistakes_reported(capsys):
    words = ["simulate", "--model", "yolov5n", "--images", "200", "--ranks", "2,4"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1 + 2 * 4 :] == [
        "ZeRO 3 sends less, as the last layers' weights stay whole from forward to backward."
    ]
    assert cli.main([*words, "--global-batch", "7", "--json"]) == 0
    assert {row["global_batch"] for row in json.loads(capsys.readouterr().out)} == {8}
    assert cli.main([*words[:-1], "2,none"]) == 2
    assert "--ranks: 'none' given, but each must be a number from 1 to 4096" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "memory_gib", "wanted"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 39, "A100-40"),
        ("NVIDIA A10", 23, "A10"),
        ("NVIDIA A10G", 22, "A10"),
        ("NVIDIA L40S", 45, "L40S"),
        ("NVIDIA L4", 23, "L4"),
        ("NVIDIA GeForce RTX 4090", 24, "RTX4090"),
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("Tesla V100-SXM2-32GB", 32, "V100"),
        ("Tesla T4", 15, "T4"),
        ("NVIDIA T400", 4, None),
        ("AMD Instinct MI300X", 192, None),
    ],
)
def test_devices_are_known_by_the_names_that_drivers_give(name, memory_gib, wanted):
    found = device_named(name, memory_gib * GIB)
    assert (found.name if found else None) == wanted
