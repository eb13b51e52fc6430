"""Files of strangers: weights, checkpoints and settings that would run code, or take all memory, are refused in words."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from source_files import FILES, each, name_of, parse

from dsyolo.base import safe_io as untrusted
from dsyolo.base.errors import UserError
from dsyolo.checkpoint import manifest as manifests
from dsyolo.checkpoint.manifest import Manifest, read_buffers, read_manifest
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.agreed_port import AgreedPort
from dsyolo.config import cli_args
from dsyolo.config import run_config as config
from dsyolo.config.deepspeed.config import check
from dsyolo.data.formats.yolo import MOST_CLASSES, list_images, read_data_yaml
from dsyolo.data.images import NOT_FOUND, check_image
from dsyolo.data.index_cache import load_cache
from dsyolo.models.weights import read_weights


def refused(call: Callable[[], object]) -> str:
    """Return what the user is told, in seconds."""
    begin, begin_s = time.process_time(), time.monotonic()
    with pytest.raises(UserError) as caught:
        call()
    assert time.monotonic() - begin_s < 60  # reading waits for nothing
    assert time.process_time() - begin < 15  # PyYAML takes 3 s for 100,000 names
    text = str(caught.value)
    assert len(text) < 3000
    return text


# ---- weights


class Malicious:
    """Makes a file where its pickle is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def pickles(proof: Path) -> dict[str, bytes]:
    zipped, saved, legacy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Malicious(proof)))
    torch.save({"model": Malicious(proof)}, saved)
    torch.save({"model": Malicious(proof)}, legacy, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    np.save(array, np.array([Malicious(proof)], object))
    return {
        "pickle": pickle.dumps(Malicious(proof)),
        "old_pickle": pickle.dumps(Malicious(proof), protocol=0),
        "zip": zipped.getvalue(),
        "torch": saved.getvalue(),
        "legacy_torch": legacy.getvalue(),
        "numpy": array.getvalue(),
    }


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.safetensors", "weights", "w.bin"])
def test_a_pickle_is_never_read_whatever_its_name(tmp_path, name):
    proof = tmp_path / "proof"
    for kind, content in pickles(proof).items():
        path = tmp_path / name
        path.write_bytes(content)
        text = refused(lambda path=path: read_weights(path))
        assert not proof.exists(), kind
        if kind in ("zip", "torch"):
            assert "No code of it was run." in text, text
        elif kind != "numpy" or path.suffix in (".pt", ".pth", ".bin"):
            assert "pickle" in text, kind
            assert "may run code" in text
            assert "safetensors.torch.save_file" in text
    torch.load(io.BytesIO(pickles(proof)["torch"]), weights_only=False)
    assert proof.exists()  # it does run where it is loaded


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"{}", length=1 << 40),
        safetensors(b"{}", length=(1 << 63) + 1),
        safetensors(b"[" * 100_000),
        safetensors(json.dumps({"a": entry([1 << 40], 0, 4 << 40)}).encode()),
        safetensors(json.dumps({"a": entry([4], 0, 8)}).encode(), bytes(8)),
        safetensors(json.dumps({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}).encode(), bytes(4)),
        safetensors(json.dumps({"a": entry([1 << 33, 1 << 33], 0, 4)}).encode(), bytes(4)),
    ],
    ids=["huge_header", "longer_than_any", "deep", "beyond_the_end", "too_short", "overlap", "overflow"],
)
def test_safetensors_that_lie_are_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert "not a complete safetensors file" in refused(lambda: read_weights(path))


def test_weights_that_are_too_many_of_a_strange_type_or_a_device_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with path.open("wb") as file:
        file.truncate(5 << 30)  # takes no room
    assert "5.0 GiB" in refused(lambda: read_weights(path))
    save_file({"stem.conv.weight": torch.zeros(4, dtype=torch.bool)}, path)
    assert "stem.conv.weight is of type BOOL" in refused(lambda: read_weights(path))
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "no such file" in refused(lambda: read_weights(tmp_path / "pipe.safetensors"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        json.dumps({"variant": "yolov5n", "names": ["a"], "image_size_px": 10**9, "anchors_px": []}),
        json.dumps({"variant": "yolov5n", "names": ["a"] * 10**6, "image_size_px": "x" * 10**6}),
    ],
    ids=["deep", "huge_image", "many_names"],
)
def test_metadata_that_would_take_all_memory_is_refused(tmp_path, text):
    path = tmp_path / "weights.safetensors"
    save_file({"stem.conv.weight": torch.zeros(4)}, path, metadata={"dsyolo": text})
    assert "metadata is damaged" in refused(lambda: read_weights(path))


# ---- checkpoints


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of one tensor."""
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    name = "tensors-00000-of-00001.safetensors"
    save_file({"buffers/network": torch.ones(3)}, folder / name)
    progress = TrainState(total_steps=9, epochs=3, num_images=24, global_batch=8, seed=0, step=3)
    manifest = Manifest(
        format=manifests.FORMAT,
        progress=progress,
        optimizer_scalars={},
        ema_updates=3,
        files={name: manifests.sha256_of(folder / name)},
        tensors={"buffers/network": name},
    )
    (folder / "progress.json").write_text(manifest.model_dump_json())
    read_manifest(folder)
    assert read_buffers(folder).tolist() == [1.0] * 3
    return folder


def change(folder: Path, **values: object) -> None:
    path = folder / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "../other.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\..\\b.safetensors",
        "",
        ".",
        "weights.pt",
    ]
    + ["x.safetensors\n", "\x00.safetensors", "step.safetensors/.."],
)
def test_a_checkpoint_names_only_files_of_its_own_folder(saved, name):
    shutil.copy(next(saved.glob("*.safetensors")), saved.parent / "other.safetensors")
    before = json.loads((saved / "progress.json").read_text())
    checksum = next(iter(before["files"].values()))
    change(saved, files={name: checksum}, tensors={"buffers/network": name})
    for read in (read_manifest, lambda path: read_manifest(path, verify=False), read_buffers):
        assert "its own folder" in refused(lambda read=read: read(saved))
    change(saved, files=before["files"], tensors={"buffers/network": name})
    assert "its own folder" in refused(lambda: read_buffers(saved))


def test_a_checkpoint_has_no_links_out_of_its_folder(saved):
    file = next(saved.glob("*.safetensors"))
    file.rename(saved.parent / "elsewhere.safetensors")
    file.symlink_to(saved.parent / "elsewhere.safetensors")
    assert "no links" in refused(lambda: read_manifest(saved))


def test_a_checkpoint_whose_parts_do_not_agree_is_refused(saved):
    file = next(saved.glob("*.safetensors"))
    change(saved, tensors={"buffers/network": file.name, "param/x": file.name})
    assert "param/x" in refused(lambda: read_buffers(saved))
    change(saved, tensors={})
    assert "buffers/network: missing" in refused(lambda: read_buffers(saved))
    change(saved, tensors={"buffers/network": file.name})
    save_file({"buffers/network": torch.tensor([1.0, float("nan")])}, file)
    assert "checksum" in refused(lambda: read_manifest(saved))
    assert "NaN" in refused(lambda: read_buffers(saved))
    save_file({"buffers/network": torch.ones(3, dtype=torch.int8)}, file)
    assert "type I8" in refused(lambda: read_buffers(saved))
    file.write_bytes(pickles(saved / "proof")["torch"])
    assert "damaged" in refused(lambda: read_buffers(saved))
    assert not (saved / "proof").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"format": 1e999}',
        '{"format": ' + "9" * 5000 + "}",
        " " * (manifests.MOST_MANIFEST_BYTES + 1),
        "\x80\x04",
    ],
    ids=["deep", "infinite", "digits", "large", "pickle"],
)
def test_a_manifest_that_is_none_is_refused(saved, content):
    (saved / "progress.json").write_text(content, encoding="latin-1")
    assert "progress.json cannot be read" in refused(lambda: read_manifest(saved))


@pytest.mark.parametrize(
    "values",
    [
        {"optimizer_scalars": {"step": float("inf")}},
        {"loss_scale": {"scale": float("nan"), "good_steps": 1}},
        {"loss_scale": {"scale": 1.0}},
        {"loss_scale": {"scale": -1.0, "good_steps": 1}},
        {"optimizer_scalars": {"step": 1e300}},
        {"ema_updates": 10**400},
        {"ema_updates": -50},
    ],
)
def test_numbers_that_no_run_has_are_refused(saved, values):
    read_manifest(saved)
    change(saved, **values)
    assert "numbers that no run has" in refused(lambda: read_manifest(saved))


@pytest.mark.parametrize(
    "values",
    [
        {"step": -1},
        {"epoch": 2},  # which begins with step 7
        {"epoch": 10**9},
        {"num_images": 0},
        {"images_seen": -1},
        {"images_seen": 10**18},
        {"best_fitness": float("inf")},
        {"best_fitness": float("nan")},
        {"best_epoch": 10**9},
        {"skipped_in_a_row": -(10**9)},
        {"tracking": {"num_summed": -1}},
        {"tracking": {"num_summed": "many"}},
        {"tracking": {"loss_sum": [0.0] * 7}},
        {"tracking": {"loss_sum": [0.0, 0.0, float("nan")]}},
        {"tracking": {"loss_sum": "none"}},
    ],
    ids=str,
)
def test_progress_that_no_run_made_is_refused(saved, values):
    read_manifest(saved)
    progress = json.loads((saved / "progress.json").read_text())["progress"]
    change(saved, progress={**progress, **values})
    refused(lambda: read_manifest(saved))


# ---- settings and data

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
YAMLS = {
    "bomb": BOMB + "names: *l\n",
    "object": "names: !!python/object/apply:os.system ['touch proof']\n",
    "name": "names: !!python/name:os.system\n",
    "module": "!!python/module:this {}\n",
    "new": "names: !!python/object/new:os.mkdir [proof]\n",
    "deep": "names: " + "[" * 20_000,
    "date": "names: 2001-99-99\n",
    "digits": "names: " + "9" * 5000 + "\n",
    "large": "#" * (untrusted.MOST_TEXT_BYTES + 1),
    "binary": "\x00\x01",
    "cycle": "names: &a [*a]\n",
}


@pytest.mark.parametrize("kind", YAMLS)
def test_yaml_is_plain_data_of_a_bounded_size(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "strange.yaml"
    path.write_text(YAMLS[kind])
    refused(lambda: read_data_yaml(path))
    refused(lambda: config.RunConfig.load(path))
    assert "strange.yaml" in refused(lambda: cli_args.parse(["--data", str(path), "--hyp", str(path)]))
    assert not (tmp_path / "proof").exists()


def test_an_alias_is_refused_by_its_place():
    with pytest.raises(untrusted.BadYamlError, match=r"line 2: \*a stands for another value"):
        untrusted.parse_yaml("x: &a [1]\ny: *a\n")


@pytest.mark.parametrize(
    "lines",
    [
        f"nc: {10**12}",
        f"names: {{0: a, {10**12}: b}}",
        "names: [" + ",".join(f"c{i}" for i in range(MOST_CLASSES + 1)) + "]",
        "names: [a]\npath: " + "x" * 1_000_000,
        "names: [a]\ntest: " + "x" * 1_000_000 + "\ntrain: " + "y" * 1_000_000,
    ],
    ids=["nc", "number", "names", "path", "split"],
)
def test_numbers_and_names_of_a_data_set_have_bounds(tmp_path, lines):
    path = tmp_path / "data.yaml"
    text = lines if "train:" in lines else f"{lines}\ntrain: ."
    path.write_text(f"{text}\nval: .\n")
    refused(lambda: read_data_yaml(path))


def test_a_data_set_is_data(tmp_path, monkeypatch):
    """Nothing is downloaded or run for it, and what its paths look like does not matter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$(touch proof); `touch proof`").mkdir()
    (tmp_path / "data.yaml").write_text(
        "download: touch proof\npath: .\ntrain: $(touch proof); `touch proof`\nval: .\nnames: [a]\n"
    )
    spec = read_data_yaml("data.yaml")
    assert spec.train is not None
    assert spec.train[0].is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["$(touch proof); `touch proof`", "data.yaml"]
    assert "no such file" in refused(
        lambda: read_weights(Path("https://example.invalid/weights.safetensors"))
    )


def test_images_that_are_devices_or_no_paths_are_reported(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "data.yaml").write_text("train: /dev/zero\nval: .\nnames: [a]\n")
    assert "data.yaml" in (said := refused(lambda: read_data_yaml(tmp_path / "data.yaml")))
    assert "train: /dev/zero is a device or pipe" in said
    for path in (tmp_path / "a.jpg", "/dev/zero", "/dev/random", tmp_path, "a\x00b.jpg", "x" * 5000):
        size_hw, reason, _ = check_image(path)
        assert (size_hw, reason) == (None, NOT_FOUND)
    (tmp_path / "list.txt").write_text("x" * 100_000)
    (listed,) = list_images([tmp_path / "list.txt"])  # such a line costs one image
    assert check_image(listed) == (None, NOT_FOUND, "File name too long")


def test_a_deepspeed_json_has_bounds(tmp_path):
    path = tmp_path / "ds.json"
    for content in ("[" * 100_000, " " * (untrusted.MOST_TEXT_BYTES + 1)):
        path.write_text(content)
        refused(lambda: check(path, world_size=1, accelerator="cpu"))


def test_a_scan_cache_of_objects_is_not_loaded(tmp_path):
    import hashlib

    proof = tmp_path / "proof"
    buffer = io.BytesIO()
    np.savez(buffer, header=np.array([Malicious(proof)], object))
    for payload in (buffer.getvalue(), b"PK\x03\x04 no zip", b""):
        (tmp_path / "scan.npz").write_bytes(hashlib.sha256(payload).digest() + payload)
        with pytest.warns(UserWarning, match="all files are read again"):
            assert load_cache(tmp_path / "scan.npz", "key") is None
    assert not proof.exists()


# ---- the source

RUNS_CODE = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load"}
RUNS_CODE |= {
    "yaml.full_load",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
}
RUNS_CODE |= {"urllib.request.urlretrieve", "urllib.request.urlopen", "torch.hub.load_state_dict_from_url"}
ALLOWED = {("dsyolo/cluster/collectives.py", "pickle.loads")}  # what ranks of one run send each other


def code_running(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # under another name they would not be found
            yield from (
                (node.lineno, f"{node.module}.{a.name}")
                for a in node.names
                if f"{node.module}.{a.name}" in RUNS_CODE
            )
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in RUNS_CODE:
            yield node.lineno, name
        for word in node.keywords:
            value = word.value.value if isinstance(word.value, ast.Constant) else "unknown"
            if word.arg in ("shell", "allow_pickle") and value is not False:
                yield node.lineno, f"{word.arg}={value}"
        if name in ("np.load", "numpy.load") and "allow_pickle" not in {word.arg for word in node.keywords}:
            yield node.lineno, name


def test_nothing_in_the_source_runs_what_it_reads():
    found = set()

    def check_file(path: Path) -> Iterator[str]:
        for line, call in code_running(parse(path)):
            if (name_of(path), call) in ALLOWED:
                found.add((name_of(path), call))
            else:
                yield f"line {line}: {call}"

    each(check_file)
    assert found == ALLOWED
    assert len(FILES) > 40


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(x)",
        "pickle.loads(x)",
        "from pickle import loads",
        "subprocess.run(x, shell=True)",
        "eval(x)",
    ]
    + ["np.load(x)", "np.load(x, allow_pickle=True)", "yaml.load(x, L)", "os.system(x)", "run(x, shell=y)"],
)
def test_the_check_sees_what_runs_code(source):
    assert list(code_running(ast.parse(source)))
    assert not list(
        code_running(ast.parse("np.load(x, allow_pickle=False); subprocess.run([x]); json.loads(x)"))
    )


def load_tampered(folder: Path) -> list[tuple[str, bool]]:
    """Return what loading says of each kind of tampering, and whether the weights are as before."""
    import training

    engine, partitions, ema, checkpoints = training.build(1, folder)
    training.train(engine, ema, 0, 1)
    progress = TrainState(total_steps=9, epochs=3, num_images=24, global_batch=8, seed=0, step=1)
    checkpoints.save(progress)
    path = folder / "step_00000001"
    (file,) = path.glob("*.safetensors")
    whole, manifest = load_file(file), (path / "progress.json").read_text()
    training.train(engine, ema, 1, 2)
    before = training.whole(partitions, partitions.masters())
    told = []
    name = "stem.conv.weight"
    for key, tensor in (
        (f"optimizer/momentum_buffer/{name}", torch.full_like(whole[f"param/{name}"], torch.inf)),
        (f"optimizer/momentum_buffer/{name}", torch.zeros(3)),
        (f"optimizer/surprise/{name}", whole[f"param/{name}"].clone()),
        (f"ema/{name}", whole[f"ema/{name}"].half()),
        ("buffers/ema", torch.zeros(5)),
    ):
        file.unlink()  # mapped by who read it
        save_file({**whole, key: tensor.clone()}, file)
        parts = {key: part for key, part in json.loads(manifest).items() if key != "sha256"}
        parts["files"][file.name] = manifests.sha256_of(file)
        parts["tensors"][key] = file.name
        (path / "progress.json").write_text(json.dumps(parts))
        try:
            checkpoints.load(path)
            told.append(("loaded", False))
        except UserError as error:
            after = training.whole(partitions, partitions.masters())
            told.append((str(error), all(torch.equal(after[key], one) for key, one in before.items())))
    return told


def test_a_checkpoint_is_checked_whole_before_anything_of_it_is_taken(tmp_path):
    (told,) = run_ranks(1, load_tampered, tmp_path)
    said = ("NaN or infinity", "has (3,)", "SGD has no such state", "type F16", "has (5,)")
    for (text, unchanged), expected in zip(told, said, strict=True):
        assert expected in text
        assert unchanged


def test_a_pipe_in_place_of_a_cache_or_port_hangs_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert load_cache(tmp_path / "pipe", "key") is None
    with pytest.raises(OSError, match="a folder, device or pipe"):
        AgreedPort(tmp_path / "pipe").read()
