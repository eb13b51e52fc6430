"""A network of the user's own, examples/my_net.py: all that is done with a YOLOv5 works for it, and only if asked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from activations import kept
from ranks import run_ranks
from recompute import allocations, forward, images_of, step
from runs import ROOT, alone, environment, losses, make_place
from safetensors.torch import save_file

from dsyolo.base.errors import UserError
from dsyolo.config.resolve import resolve
from dsyolo.config.run_config import MODELS, RunConfig, image_size_fault
from dsyolo.config.spec import PRECISIONS
from dsyolo.detection.assigner import Assigner
from dsyolo.engine.optimizer import parameter_groups
from dsyolo.models.activation_memory import choose, count_activations
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.registry import build_model, meta_network
from dsyolo.models.weights import describe, load_into, rebuild, save_weights
from dsyolo.models.yolov5 import VARIANTS, build_yolov5, level_strides
from dsyolo.planner.model_profile import ModelProfile

FILE = ROOT / "examples" / "my_net.py"
MODEL = f"{FILE}:build"
NAMES = ("cat", "dog", "emu")


def own_network(seed: int = 0) -> DetectionNetwork:
    torch.manual_seed(seed)
    return build_model(MODEL, training.NUM_CLASSES)


def use_own_network() -> None:
    """From now on the small training of tests is that of the user's network."""
    network = own_network()
    anchors_px = network.anchors * torch.tensor(network.strides).view(-1, 1, 1)
    training.network = own_network
    training.assigner = lambda: Assigner(anchors_px.numpy(), network.strides, 4.0)


@pytest.fixture
def own_training(monkeypatch):
    monkeypatch.setattr(training, "network", training.network)  # undone at the end
    monkeypatch.setattr(training, "assigner", training.assigner)
    use_own_network()


# ---- what the registry knows


def test_variants_are_entries_that_need_no_network():
    assert MODELS == VARIANTS
    for name in VARIANTS:
        with torch.device("meta"):
            network = build_model(name, 2)
        parts = [network.get_submodule(node) for node in network.order]
        assert meta_network(name).has_parameters == tuple(
            any(True for _ in part.parameters()) for part in parts
        )
        assert level_strides(name) == network.strides
        assert meta_network(name).size_multiple_px == network.size_multiple_px == network.strides[-1]
        with_batchnorm = {
            n
            for n in network.order
            if any(".bn." in p for p, _ in network.named_parameters() if p.startswith(f"{n}."))
        }
        assert network.blocks() == with_batchnorm


def test_an_own_network_gives_its_facts():
    assert build_model(MODEL, 2).strides == (8, 16)
    assert meta_network(MODEL).size_multiple_px == 16
    assert sum(meta_network(MODEL).has_parameters) == 11
    network = own_network()
    assert network.variant == "my_net.py:build"
    assert network.blocks() == set(network.order) - {"up4", "join3", "detect"}
    assert type(network.attention3) is type(own_network().attention3)  # the file runs once


def test_gains_are_not_decayed_whatever_their_module_is_called():
    network = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4), "conv": torch.nn.Conv2d(1, 2, 1)})
    kinds = {kind: [tuple(p.shape) for p in params] for kind, params in parameter_groups(network).items()}
    assert kinds == {"weights": [(2, 1, 1, 1)], "norms": [(4,)], "biases": [(4,), (2,)]}


# ---- memory, activation checkpointing, pipeline


@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16"])
def test_counted_activations_are_those_that_the_allocator_gave_out(precision):
    network, images = own_network(), images_of(2, 320)
    counted = count_activations(network, tuple(images.shape), PRECISIONS[precision])
    step(network, images, precision)
    for names in (frozenset(), frozenset({"stem", "attention3"}), network.blocks()):
        network.checkpointed = names
        measured, _ = allocations(lambda: forward(network, images, precision))
        assert kept(counted, names) == pytest.approx(measured, rel=0.02)
    plan = choose(counted, counted.peak_bytes(counted.blocks), offload=False)
    assert plan.peak_bytes == counted.peak_bytes(counted.blocks) < counted.peak_bytes()


def test_a_plan_knows_an_own_network():
    profile = ModelProfile(MODEL, 3, 64)
    assert profile.layers == meta_network(MODEL).has_parameters
    assert profile.flops > 0
    # two levels of three anchors: gradients of the maps, the largest once more, logits and targets of objectness
    cells = [3 * (64 // stride) ** 2 for stride in (8, 16)]
    assert profile.loss_bytes(1, PRECISIONS["fp32"]) == 4 * 8 * (sum(cells) + max(cells)) + 8 * sum(cells)


def test_checkpointed_blocks_change_no_bit(own_training):
    def one_step(names: frozenset[str]) -> dict[str, torch.Tensor]:
        network = own_network()
        network.checkpointed = names
        images = training.batch(0, 0).images.contiguous(memory_format=torch.channels_last)
        sum(level.square().mean() for level in network(images)).backward()
        return {name: p.grad for name, p in network.named_parameters()} | dict(network.named_buffers())

    plain, checkpointed = one_step(frozenset()), one_step(own_network().blocks())
    assert not [name for name in plain if not plain[name].equal(checkpointed[name])]


def train_two_stages(folder: str) -> dict[str, Any]:
    use_own_network()
    json = {"pipeline": {"stages": 2}, "activation_checkpointing": {"recompute": "blocks"}}
    engine, partitions, ema, _ = training.build(1, Path(folder), **json)
    result = training.result(engine, partitions, ema, training.train(engine, ema, 0, 3))
    return {**result, "mine": sum(p.numel() for p in engine.network.parameters())}


def test_two_stages_train_as_the_plain_loop(own_training, tmp_path):
    first, second = run_ranks(2, train_two_stages, str(tmp_path))
    assert first["mine"] + second["mine"] == sum(p.numel() for p in own_network().parameters())
    assert min(first["mine"], second["mine"]) > 0
    found = training.differences(first, training.plain(3))
    assert found["losses"] < 1e-5
    assert max(found.values()) < 1e-4


# ---- a run


def dsyolo(place: Path, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dsyolo.cli", *map(str, words)]
    variables = {**environment(place), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, cwd=place)


@pytest.mark.soak
def test_a_run_trains_resumes_and_its_weights_are_validated(tmp_path):
    place = make_place(tmp_path)
    link = place / "my_net.py"
    link.write_bytes(FILE.read_bytes())
    options = {"model": "my_net.py:build", "imgsz": 80, "epochs": 4}  # 80 is a multiple of 16, not of 32
    through = alone(place, "through", **options)
    assert through.returncode == 0, through.stderr
    half = alone(place, "half", **options, hook=stops_after_epoch_2(place))
    assert half.returncode == 75, half.stderr
    assert losses(place, "half") == losses(place, "through")[: len(losses(place, "half"))]
    again = alone(place, "half", "--resume", **options)
    assert again.returncode == 0, again.stderr
    assert losses(place, "half") == losses(place, "through")

    weights, data = place / "runs/half/weights/best.safetensors", place / "sample/data.yaml"
    metrics = place / "metrics.json"
    done = dsyolo(
        place, "val", "--weights", weights, "--data", data, "--model", "my_net.py:build", "--json", metrics
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(metrics.read_text())["num_images"] == 6
    found = dsyolo(
        place, "detect", "--weights", weights, "--model", "my_net.py:build", place / "sample/images/val"
    )
    assert found.returncode == 0, found.stderr
    refused = dsyolo(place, "val", "--weights", weights, "--data", data)
    assert refused.returncode == 2
    assert "it is of my_net.py:build, a user's own network" in refused.stderr
    assert "--model my_net.py:build" in refused.stderr
    # what a run's folder names is not run
    link.write_text("raise SystemExit('it ran')")
    refused = alone(place, "half", "--resume", **{k: v for k, v in options.items() if k != "model"})
    assert refused.returncode == 2
    assert "Add --model my_net.py:build." in refused.stderr
    assert "it ran" not in refused.stderr
    refused = alone(place, "small", **{**options, "imgsz": 72})
    assert refused.returncode != 0


def stops_after_epoch_2(place: Path) -> str:
    """A hook that ends the training as SIGTERM does, so that what follows is a resume."""
    path = place / "stops.py"
    path.write_text(
        "import os, signal\n"
        "from dsyolo.trainer.hooks.base import Hook\n"
        "class Stops(Hook):\n"
        "    def between_epochs(self):\n"
        "        if self.trainer.state.epoch == 2 and not os.path.exists('stopped'):\n"
        "            open('stopped', 'w').close()\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    return f"{path}:Stops"


# ---- what is refused


HEAD = """
import torch
from torch import nn
from dsyolo.models.blocks import *
from dsyolo.models.blocks import BatchNorm, Conv, Detect, Stem, Upsample
from dsyolo.models.detection_network import DetectionNetwork
from dsyolo.models.network import Node
ANCHORS_PX = [[[10, 13], [16, 30]]]
def detector(k, *middle, strides=(4,), head=None, **more):
    nodes = [Node("stem", Stem(3, 8)), Node("down", Conv(8, 8, 3, 2)), *middle]
    nodes += [Node("detect", head or Detect((8,), k, ANCHORS_PX, (4,)))]
    return DetectionNetwork(nodes, k, strides, **more)
class Pair(nn.Module):
    def forward(self, x): return x, x
"""
BUILDS = {
    "is not a function": "build = 3",
    "has no build. It has: .*detector": "",
    r"cannot be imported: SyntaxError": "def",
    r"it raised ZeroDivisionError: .* \(net.py, line \d+\). Fix the function": "def build(k): return 1 / 0",
    "it raised TypeError": "def build(): ...",
    "it returned a Linear. It must return a DetectionNetwork": "def build(k): return nn.Linear(1, 1)",
    "it returned a network of 7 classes": "def build(k): return detector(7)",
    r"are \(4, 2\), .* Give 1 to 5 strides, finest first": "def build(k): return detector(k, strides=(4, 2))",
    r"are \(0, 16\), .*, as whole pixels": "def build(k): return detector(k, strides=(0, 16))",
    r"are \(8.0, 16.0\)": "def build(k): return detector(k, strides=(8.0, 16.0))",
    "its size_multiple_px is -16": "def build(k): return detector(k, size_multiple_px=-16)",
    "down.conv.weight is frozen, without a shape yet, or not in fp32": (
        "def build(k): d = detector(k); d.down.conv.weight.requires_grad_(False); return d"
    ),
    "down.conv.weight is frozen, .*, or not in fp32": "def build(k): d = detector(k); d.down.double(); return d",
    "lazy.weight is frozen, without a shape yet": "def build(k): return detector(k, Node('lazy', nn.LazyConv2d(8, 1)))",
    "size_multiple_px, 6, must be a multiple of every stride": "def build(k): return detector(k, size_multiple_px=6)",
    "the buffer `anchors` of its last node, detect, is None": "def build(k): return detector(k, head=nn.Identity())",
    r"detect, is \(1, 2, 2\). It must be \(2, A, 2\)": "def build(k): return detector(k, strides=(4, 8))",
    "norm is a BatchNorm2d of torch": "def build(k): return detector(k, Node('norm', nn.BatchNorm2d(8)))",
    "drop is a Dropout": "def build(k): return detector(k, Node('drop', nn.Dropout()))",
    "it raised SystemExit: 3": "def build(k): raise SystemExit(3)",
    "a network needs at least one node": "def build(k): return DetectionNetwork([], k, (4,))",
    "hides keeps modules or parameters in convs, a plain collection": (
        "class Hides(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.convs = [Conv(8, 8)]\n"
        "    def forward(self, x): return self.convs[0](x)\n"
        "def build(k): return detector(k, Node('hides', Hides()))"
    ),
    "in two nodes": "def build(k): c = Conv(8, 8); return detector(k, Node('a', c), Node('b', c))",
    "node pair returned tuple. Return one tensor": "def build(k): return detector(k, Node('pair', Pair()))",
    r"node wide raised RuntimeError: .*Images come as uint8": "def build(k): return detector(k, Node('wide', Conv(9, 8)))",
    r"it raised AssertionError: .* \(net.py, line \d+\). Fix": "def build(k): return DetectionNetwork([Node('a', 1)] * 2, k, (4,))",
    r"last node returned \[\(2, 2, 8, 12, 7\)\].*Return maps of shapes \[\(2, 2, 2, 3, 7\)\]": (
        "def build(k): return detector(k, Node('up', Upsample()), strides=(8,), head=None)"
    ),
}


@pytest.mark.parametrize("message", BUILDS)
def test_what_is_no_detector_is_refused_with_the_rule(tmp_path, message):
    (tmp_path / "net.py").write_text(HEAD + BUILDS[message])
    with pytest.raises(UserError) as caught:
        meta_network(f"{tmp_path}/net.py:build")
    (line,) = caught.value.problems
    assert line.startswith(f"--model: {tmp_path}/net.py:build given, but ")
    assert re.search(message, line, re.DOTALL), line


def test_a_file_that_is_missing_and_a_name_that_is_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        build_model(f"{tmp_path}/nowhere.py:build", 2)
    with pytest.raises(
        ValueError, match=r"yolov5q given, .* or FILE.py:FUNCTION for your own. Did you mean yolov5"
    ):
        RunConfig(data="", model="yolov5q")


def test_sizes_of_images_are_judged_by_the_network(tmp_path):
    assert image_size_fault(48, MODEL, meta_network(MODEL).size_multiple_px) is None
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    (tmp_path / "ds.json").write_text("{}")
    argv = ["--data", str(tmp_path / "data.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")]
    no = dict.fromkeys(("plan", "saved_state"), lambda *_: pytest.fail("not refused before"))
    with pytest.raises(
        UserError, match=r"--imgsz: 40 given, .* multiple of 16, and at least 32. Set it to 32."
    ):
        resolve(
            [*argv, "--model", MODEL, "--imgsz", "40"],
            "train.py",
            world_size=1,
            accelerator="cpu",
            check_folder=print,
            **no,
        )


# ---- weights


def test_weights_never_name_what_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\nbuild = lambda k: None")
    network, path = own_network(), tmp_path / "w.safetensors"
    for variant in ("evil.py:build", f"{tmp_path}/evil.py:build", "evil:build", "os:system"):
        info = describe(network, NAMES, 64).model_copy(update={"variant": variant})
        save_weights(path, network.state_dict(), info)
        for read in (rebuild, lambda path: rebuild(path, MODEL)):
            with pytest.raises(UserError, match="cannot be used as weights"):
                read(path)
        load_into(own_network(1), path)  # tensors alone
    assert sorted(os.listdir()) == ["evil.py", "w.safetensors"]


def test_weights_go_back_into_the_network_that_the_user_names(tmp_path):
    network, path = own_network(), tmp_path / "w.safetensors"
    save_weights(path, network.state_dict(), describe(network, NAMES, 64))
    again, info = rebuild(path, MODEL)
    assert info.variant == "my_net.py:build"
    assert all(t.equal(network.state_dict()[name]) for name, t in again.state_dict().items())
    with pytest.raises(UserError, match="but --model yolov5n was given"):
        rebuild(path, "yolov5n")
    changed = tmp_path / "my_net.py"
    changed.write_text(
        FILE.read_text()
        .replace('"out3", C3(192, 64,', '"out3", C3(192, 32,')
        .replace("Detect((64,", "Detect((32,")
    )
    with pytest.raises(
        UserError, match=r"do not fit its metadata.*Give the --model my_net.py:build it was trained with"
    ):
        rebuild(path, f"{changed}:build")


def test_an_own_network_starts_from_what_it_shares_with_a_yolov5(tmp_path):
    theirs, path = build_yolov5("yolov5n", 5), tmp_path / "yolov5n.safetensors"
    save_weights(path, theirs.state_dict(), describe(theirs, list("abcde"), 64))
    network = own_network()
    line = load_into(network, path)
    assert "random values for " in line
    assert "attention3" in line
    assert network.state_dict()["p3.cv1.conv.weight"].equal(theirs.state_dict()["p3.cv1.conv.weight"])
    other = tmp_path / "other.safetensors"
    save_file({"classifier.weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"only 0 of .* Name the nodes as in that file"):
        load_into(network, other)


def test_a_broken_network_hides_no_other_problem(tmp_path):
    (tmp_path / "net.py").write_text("def build(k): return 1 / 0", encoding="utf-8")
    (tmp_path / "data.yaml").write_text("names: [a, a]\ntrain: here\nval: there\n", encoding="utf-8")
    (tmp_path / "ds.json").write_text('{"train_batch_size": "many"}', encoding="utf-8")
    argv = ["--data", str(tmp_path / "data.yaml"), "--deepspeed_config", str(tmp_path / "ds.json")]
    with pytest.raises(UserError) as caught:
        resolve(
            [*argv, "--model", f"{tmp_path}/net.py:build"],
            "train.py",
            world_size=1,
            accelerator="cpu",
            **dict.fromkeys(("plan", "saved_state", "check_folder"), lambda *_: None),
        )
    told = str(caught.value)
    assert told.count("it raised ZeroDivisionError") == 1
    assert 'train_batch_size: "many" given' in told
    assert "a given more than once" in told
