"""Weight files: what is written is enough to rebuild a network, and what cannot be used is refused with a remedy."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from yolov5_names import to_yolov5

from dsyolo.base.errors import UserError
from dsyolo.models.weights import (
    describe,
    from_yolov5,
    load_into,
    read_weights,
    rebuild,
    save_weights,
)
from dsyolo.models.yolov5 import anchors_px, build_yolov5

SIZE_PX = 64
NAMES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_yolov5("yolov5n", len(NAMES)).eval()


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, network.state_dict(), describe(network, NAMES, SIZE_PX))
    return path


@torch.no_grad()
def test_a_file_is_enough_to_rebuild_the_network(network, saved):
    images = torch.rand(2, 3, SIZE_PX, SIZE_PX)
    again, info = rebuild(saved)
    assert not again.training
    assert (info.variant, info.names, info.image_size_px) == ("yolov5n", NAMES, SIZE_PX)
    torch.testing.assert_close(torch.tensor(info.anchors_px), anchors_px("yolov5n"))
    assert all(a.equal(b) for a, b in zip(again(images), network(images), strict=True))
    assert again.state_dict().keys() == network.state_dict().keys()
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]  # no part is left behind


def test_anchors_that_are_no_sizes_are_refused_without_metadata_too(network, tmp_path):
    path = tmp_path / "theirs.safetensors"
    theirs = {name: t.contiguous() for name, t in to_yolov5(network.state_dict()).items()}
    theirs["model.24.anchors"] = torch.zeros(3, 3, 2)
    save_file(theirs, path)
    with pytest.raises(UserError, match=r"detect\.anchors has a value that is not above 0"):
        read_weights(path)


def test_a_file_keeps_the_dtype_of_its_tensors(network, tmp_path):
    path = tmp_path / "half.safetensors"
    half = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    save_weights(path, half, describe(network, NAMES, SIZE_PX))
    tensors, _ = read_weights(path)
    assert all(tensors[name].equal(half[name]) and tensors[name].dtype == half[name].dtype for name in half)
    again, _ = rebuild(path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", ["yolov5n", "yolov5n6"])
def test_a_file_with_the_names_of_yolov5_is_read_under_ours(variant, tmp_path):
    torch.manual_seed(1)
    source, target = build_yolov5(variant, 2), build_yolov5(variant, 2)
    path = tmp_path / "theirs.safetensors"
    theirs = to_yolov5(source.state_dict())
    assert all(name.startswith("model.") for name in theirs)
    save_file({name: t.contiguous() for name, t in theirs.items()}, path)
    tensors, info = read_weights(path)
    assert info is None
    assert tensors.keys() == source.state_dict().keys()
    total = len(tensors)
    assert f"{total} of {total} tensors" in load_into(target, path)
    assert all(t.equal(target.state_dict()[name]) for name, t in source.state_dict().items())
    with pytest.raises(UserError, match="has no metadata on variant and classes"):
        rebuild(path)


def test_names_go_in_and_out():
    assert to_yolov5({"stem.conv.weight": 1, "p3.m.0.cv1.bn.bias": 2, "detect.m.1.bias": 3}) == {
        "model.0.conv.weight": 1,
        "model.4.m.0.cv1.bn.bias": 2,
        "model.24.m.1.bias": 3,
    }
    assert to_yolov5({"p6.cv1.conv.weight": 1, "detect.anchors": 2}) == {
        "model.10.cv1.conv.weight": 1,
        "model.33.anchors": 2,
    }
    assert from_yolov5({"model.24.m.1.bias": 3}) == {"detect.m.1.bias": 3}
    assert from_yolov5({"model.33.m.1.bias": 3, "model.24.conv.weight": 4}) == {
        "detect.m.1.bias": 3,
        "down3.conv.weight": 4,
    }
    for name in ("model.x.weight", "backbone.0.weight", "model.3", "model.34.weight"):
        with pytest.raises(ValueError, match="YOLOv5"):
            from_yolov5({name: 0})
    with pytest.raises(ValueError, match="classifier"):
        to_yolov5({"classifier.weight": 0})


def problem(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "cannot be used as weights" in caught.value.headline
    (line,) = caught.value.problems
    return line


def test_other_classes_take_all_but_the_last_layer(network, saved):
    torch.manual_seed(7)
    other = build_yolov5("yolov5n", 5)
    first = {name: t.clone() for name, t in other.state_dict().items()}
    line = load_into(other, saved)
    total = len(first)
    # three levels, weight and bias
    assert line == f"{saved}: {total - 6} of {total} tensors loaded; random values for detect"
    source = network.state_dict()
    for name, tensor in other.state_dict().items():
        kept = name.startswith("detect.m.")
        assert tensor.equal(first[name] if kept else source[name]), name


@pytest.mark.parametrize("variant", ["yolov5s", "yolov5n6"])  # most of n's tensors would fit into n6
def test_weights_of_another_variant_are_refused(saved, variant):
    line = problem(lambda: load_into(build_yolov5(variant, 3), saved))
    assert f"this run trains {variant}. Give --model yolov5n" in line


def test_weights_of_part_of_a_network_are_distinguished_from_those_of_all_of_it(network, tmp_path):
    """Files with YOLOv5's own names do not say their variant, and half of an n6 is an n."""
    path = tmp_path / "theirs.safetensors"
    save_file(to_yolov5(network.state_dict()), path)
    line = load_into(build_yolov5("yolov5n6", len(NAMES)), path)
    assert "random values for conv5, p5, " in line
    assert line.endswith("These are not the weights of a yolov5n6")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(network, tmp_path, value):
    state = {name: t.clone() for name, t in network.state_dict().items()}
    state["stem.conv.weight"].view(-1)[3] = value
    path = tmp_path / "diverged.safetensors"
    save_weights(path, state, describe(network, NAMES, SIZE_PX))
    for read in (rebuild, lambda path: load_into(network, path)):
        line = problem(lambda read=read: read(path))
        assert f"1 of its {len(state)} tensors hold NaN or infinity (stem.conv.weight ...)" in line
        assert "diverged" in line


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl"])
def test_pickled_files_that_torch_did_not_save_are_refused_with_the_remedy(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"never read")
    line = problem(lambda: read_weights(path))
    assert "pickle" in line
    assert "safetensors.torch.save_file" in line


def test_files_that_are_missing_cut_or_something_else_are_refused(saved, tmp_path):
    assert "no such file" in problem(lambda: read_weights(tmp_path / "nowhere.safetensors"))
    assert "it is a folder" in problem(lambda: read_weights(tmp_path))
    whole = saved.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:50], b"", b"not safetensors at all"):
        saved.write_bytes(content)
        assert "not a complete safetensors file" in problem(lambda: read_weights(saved))


def rewrite(path, *, text: str | None = None, drop: str | None = None) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118 (not a dict)
        metadata = dict(file.metadata())
    save_file(tensors, path, metadata=metadata if text is None else {"dsyolo": text})


def test_metadata_that_is_damaged_or_of_other_tensors_is_refused(saved):
    with safe_open(saved, framework="pt") as file:
        text = file.metadata()["dsyolo"]
    for damaged in ("{", "[]", json.dumps({"variant": "yolov5n"})):
        rewrite(saved, text=damaged)
        assert "metadata is damaged" in problem(lambda: read_weights(saved))
    rewrite(saved, text=json.dumps({**json.loads(text), "variant": "yolov9"}))
    assert "its metadata says yolov9, but the variants are yolov5n, " in problem(lambda: rebuild(saved))
    for changes, rule in (
        ({"variant": "yolov5s"}, "do not fit its metadata"),
        ({"names": ["cat"]}, "its metadata names 1 classes, which are 18 outputs"),
        ({"names": []}, "its metadata names 0 classes, which are 15 outputs"),
    ):
        rewrite(saved, text=json.dumps({**json.loads(text), **changes}))
        assert rule in problem(lambda: rebuild(saved))
    rewrite(saved, text=text, drop="stem.conv.weight")
    assert "stem.conv.weight" in problem(lambda: rebuild(saved))


def test_yolov5_names_of_no_layer_are_refused(tmp_path):
    path = tmp_path / "strange.safetensors"
    save_file({"model.77.weight": torch.zeros(1)}, path)
    assert "layers" in problem(lambda: read_weights(path))
