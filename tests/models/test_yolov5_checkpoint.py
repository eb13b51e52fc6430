"""Files that YOLOv5 pickles: the same weights as by hand, nothing of them is run, and other networks are named."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resolving import resolved_in
from torch import nn
from yolov5_files import as_module, modules_of_yolov5, save_checkpoint
from yolov5_names import to_yolov5

from dsyolo.base.errors import UserError
from dsyolo.models.weights import load_into, read_weights, rebuild
from dsyolo.models.yolov5 import build_yolov5

NAMES = ("cat", "dog", "emu")


def random_network(variant: str = "yolov5n", seed: int = 0):
    torch.manual_seed(seed)
    network = build_yolov5(variant, len(NAMES)).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return network


def halved(network: nn.Module) -> dict[str, torch.Tensor]:
    state = network.state_dict()
    return {name: one.half().float() if one.is_floating_point() else one for name, one in state.items()}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path)
    (line,) = caught.value.problems
    return line


@torch.no_grad()
@pytest.mark.parametrize("variant", ["yolov5n", "yolov5s6"])
@pytest.mark.parametrize("names", [list(NAMES), dict(enumerate(NAMES))], ids=["list", "dict"])
def test_a_checkpoint_gives_what_its_tensors_give_by_hand(tmp_path, variant, names):
    model, ema = random_network(variant), random_network(variant, seed=1)
    path = tmp_path / "best.pt"
    save_checkpoint(path, model, names, ema)
    found, info = rebuild(path)
    expected = halved(ema)
    assert all(tensor.equal(expected[name]) for name, tensor in found.state_dict().items())
    assert (info.variant, info.names, info.image_size_px) == (variant, NAMES, 320)
    ema.load_state_dict(expected)
    images = torch.randint(0, 256, (2, 3, 128, 192), dtype=torch.uint8)
    assert all(a.equal(b) for a, b in zip(found(images), ema(images), strict=True))


def test_without_an_average_the_trained_weights_are_taken(tmp_path):
    save_checkpoint(tmp_path / "last.pt", random_network(), list(NAMES))
    tensors, _ = read_weights(tmp_path / "last.pt")
    expected = halved(random_network())
    assert tensors.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["module", "state_dict", "in_a_dict", "parallel", "ours"])
def test_other_layouts_are_read(tmp_path, kind):
    network, path = random_network(), tmp_path / "weights.pth"
    theirs = to_yolov5(network.state_dict())
    if kind == "module":
        with modules_of_yolov5() as classes:
            torch.save(as_module(network, list(NAMES), classes), path)
    else:
        torch.save(
            {
                "state_dict": theirs,
                "in_a_dict": {"state_dict": theirs, "epoch": 3},
                "parallel": {f"module.{name}": one for name, one in theirs.items()},
                "ours": network.state_dict(),
            }[kind],
            path,
        )
    tensors, info = read_weights(path)
    assert all(tensors[name].equal(one) for name, one in network.state_dict().items())
    if kind != "ours":
        assert info is not None
        assert info.variant == "yolov5n"
        assert info.names == (NAMES if kind == "module" else ("class0", "class1", "class2"))


def test_fine_tuning_takes_all_but_the_head(tmp_path):
    save_checkpoint(tmp_path / "best.pt", random_network(), list(NAMES))
    target = build_yolov5("yolov5n", 7)
    line = load_into(target, tmp_path / "best.pt")
    assert line.endswith("random values for detect")
    expected = halved(random_network())
    assert target.state_dict()["out5.cv1.conv.weight"].equal(expected["out5.cv1.conv.weight"])


# ---- nothing runs


class Runs:
    """An object whose unpickling would run a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


class RunsBySetstate(nn.Module):
    def __setstate__(self, state: Any) -> None:
        Path(state["proof"]).touch()


def malicious(kind: str, path: Path, proof: Path) -> None:
    if kind == "reduce":
        torch.save(Runs(proof), path)
    elif kind == "in_a_dict":
        save_checkpoint(path, random_network(), [Runs(proof)])
    elif kind == "setstate":
        module = RunsBySetstate()
        module.proof = proof
        torch.save({"model": module}, path)
    elif kind == "object_array":
        array = np.array([Runs(proof)], object)
        torch.save({"state_dict": {"model.0.conv.weight": torch.zeros(1)}, "best_fitness": array}, path)
    elif kind == "nested_load":
        inner = pickle.dumps(Runs(proof))
        torch.save({"x": _Calls("torch.storage", "_load_from_bytes", (inner,))}, path)
    else:
        save_checkpoint(path, random_network(), list(NAMES))
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("best/data/999", bytes(64 << 20))


class _Calls:
    def __init__(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self.call = (module, name, args)

    def __reduce__(self):
        import importlib

        module, name, args = self.call
        return getattr(importlib.import_module(module), name), args


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("reduce", "it names posix.system, which no weights need"),
        ("in_a_dict", "it names posix.system, which no weights need"),
        ("setstate", "RunsBySetstate, which no weights need"),
        ("object_array", "it names posix.system, which no weights need"),
        ("nested_load", "it names torch.storage._load_from_bytes, which no weights need"),
        ("bomb", "is compressed or encrypted, and torch.save does neither"),
    ],
)
def test_a_malicious_file_runs_nothing_and_is_refused_in_words(tmp_path, kind, told):
    proof, path = tmp_path / "proof", tmp_path / "best.pt"
    malicious(kind, path, proof)
    line = refused(path)
    assert told in line
    assert line.endswith("No code of it was run.")
    assert not proof.exists()


def rewritten(path: Path, change: Any) -> None:
    """Write the zip file again with `change(name, data)` for its parts; None leaves one out."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in parts.items():
            if (changed := change(name.partition("/")[2], data)) is not None:
                file.writestr(name, changed)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda name, data: None if name == "data/0" else data, "its part data/0 is missing"),
        (lambda name, data: data[:-2] if name == "data/0" else data, "its part data/0 has"),
        (lambda name, data: data[:-1] if name == "data.pkl" else data, "it is damaged"),
        (lambda name, data: None if name == "data.pkl" else data, "something else than torch.save"),
    ],
)
def test_a_file_without_a_part_is_refused(tmp_path, change, told):
    path = tmp_path / "best.pt"
    save_checkpoint(path, random_network(), list(NAMES))
    rewritten(path, change)
    assert told in refused(path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    path, far = tmp_path / "best.pt", torch.zeros(4).as_strided((2,), (1,), 2)
    torch.save({"state_dict": {"model.0.conv.weight": far}}, path)
    with zipfile.ZipFile(path) as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        data = file.read(name)
    assert data.count(b"K\x02K\x02\x85") == 1  # the offset, and the shape
    rewritten(path, lambda name, data: data.replace(b"K\x02K\x02\x85", b"K\x02K\xff\x85"))
    assert "it has a tensor that is larger than its storage" in refused(path)


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        where = draw.randrange(len(changed))
        how = draw.randrange(3)
        if how == 0:
            changed[where] = draw.randrange(256)
        elif how == 1:
            del changed[where : where + draw.choice([1, 2, 40])]
        else:
            changed[where:where] = draw.choice(
                [b"R", b"b", b"\x81", b"cos\nsystem\n", b"2", b"0", b"(", b"\x93"]
            )
    return bytes(changed)


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.soak)])
def test_changed_bytes_never_end_in_anything_but_a_refusal(tmp_path, count):
    """Whatever is read is weights of the shapes that a network has, or a UserError."""
    path = tmp_path / "best.pt"
    with modules_of_yolov5() as classes:
        small = classes["DetectionModel"]()
        small.model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        small.names = ["cat"]
        torch.save({"model": small, "epoch": 3, "best_fitness": np.float64(0.5)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    draw, num_refused = random.Random(0), 0
    for _ in range(count):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as file:
            for name, data in parts.items():
                file.writestr(name, mutated(data, draw) if name.endswith("data.pkl") else data)
        path.write_bytes(whole.getvalue())
        try:
            read_weights(path)
        except UserError:
            num_refused += 1
    assert count / 4 < num_refused < count


# ---- other networks


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["model.22.cv3.0.0.conv.weight", "model.22.dfl.conv.weight"],
            "its head has no anchors, as those of YOLOv5u",
        ),
        (["model.0.conv.conv.weight"], "a network of YOLOv5 v5.0 or earlier"),
        (["model.0.conv.weight", "model.0.conv.bias"], "its BatchNorm is folded into the convolutions"),
        (["model.24.proto.cv1.conv.weight"], "a network for segmentation"),
    ],
)
def test_other_networks_are_named(tmp_path, names, told):
    path = tmp_path / "x.pt"
    torch.save({name: torch.ones(16, 3, 6, 6) for name in names}, path)
    assert told in refused(path)


@pytest.mark.parametrize("content", [3, [1, 2], {"epoch": 3}, {"model": {"a": 1}}, torch.ones(3)])
def test_a_file_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    assert "no network and no state dict is in it" in refused(path)


# ---- on the command line


def test_a_training_takes_the_variant_of_its_weights_as_yolov5_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "yolov5s.pt", random_network("yolov5s"), list(NAMES))
    for more in (["--weights", "yolov5s.pt"], ["model=yolov5s.pt"]):
        spec = resolved_in(tmp_path, more)
        assert (spec.config.model, spec.config.weights) == ("yolov5s", "yolov5s.pt")
        assert "--weights yolov5s.pt: of a yolov5s, so --model yolov5s" in spec.notes
    spec = resolved_in(tmp_path, ["--weights", "yolov5s.pt", "--model", "yolov5n"])
    assert spec.config.model == "yolov5n"  # and loading says that the two do not fit
    with pytest.raises(
        UserError, match=r"it is of yolov5s, but this run trains yolov5n\. Give --model yolov5s"
    ):
        load_into(build_yolov5("yolov5n", 1), tmp_path / "yolov5s.pt", spec.weights)
    assert "AGPL-3.0" in load_into(build_yolov5("yolov5s", 1), tmp_path / "yolov5s.pt", spec.weights)
