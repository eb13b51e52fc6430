"""Broken files by the hundred for every reader: an error for the user or a right answer, never a traceback or a hang."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dsyolo.base.environment import read_environment
from dsyolo.base.errors import UserError
from dsyolo.checkpoint.manifest import Manifest, read_manifest
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.config.deepspeed.config import check
from dsyolo.config.run_config import RunConfig
from dsyolo.data.formats.format_registry import convert
from dsyolo.data.formats.yolo import list_images, read_data_yaml
from dsyolo.data.images import check_image, read_rgb
from dsyolo.data.index import ImageRecord, assemble_index
from dsyolo.data.index_cache import load_cache, save_cache
from dsyolo.data.labels import Labels, Problem, read_labels
from dsyolo.data.synthetic import draw_sample
from dsyolo.doctor.ask import MAX_LINE, NOT_VALID, Reply, _read, probe_query
from dsyolo.doctor.hosts import LOCAL, _read_env_file, read_hostfile
from dsyolo.models.registry import build_model
from dsyolo.models.weights import describe, read_weights, save_weights
from dsyolo.tracking.writers import JsonlWriter

SEED, FEW, MANY = 20261127, 40, 2000  # files for each of the readers
ODD = [
    b"!!timestamp maybe", b"!!int ''", b"!!binary x", b"9" * 5000, b"0x" + b"f" * 5000, b"\xff\xfe", b"\x00", b"\x1b[2J",
    b"1e999", b"NaN", b"-1", b"null", b"{}", b"[]", b"\"\"", b"x" * 300, b"\xc3\x28", b"\n", b"'", b"\"", b"&a", b"*a",
    b"/../../", b"!!map", b"\xed\xa0\x80", b"\\ud800", b"true", b"0", b"\t", b": ", b"- ", b"<object>", b"&lt;",
]  # fmt: skip
TOO_LONG_S = 20


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return data with one to three changes: a bit, a cut, a part twice, or something odd in a place of it."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + rng.randint(1, 40)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randint(1, 60)]
        elif kind == 3:
            out[at:at] = rng.choice(ODD)
        else:
            out[at : at + rng.randint(1, 12)] = rng.choice(ODD)
    return bytes(out)


@contextmanager
def in_time() -> Iterator[None]:
    """Fail what hangs."""

    def stop(*_: object) -> None:
        raise AssertionError(f"no answer in {TOO_LONG_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TOO_LONG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def torture(file: Path, read: Callable[[], object], number: int, salt: str) -> None:
    """Change a file again and again, and read it: only a UserError may come out."""
    whole = file.read_bytes()
    rng = random.Random(f"{SEED} {salt}")
    for turn in range(number):
        data = mutated(whole, rng)
        file.write_bytes(data)
        try:
            with in_time(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
        except UserError:
            pass
        except BaseException as error:
            raise AssertionError(f"{salt}, number {turn}: {error!r} for {data[:2000]!r}") from error
    file.write_bytes(whole)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    draw_sample(folder / "sample", num_images=3, image_size=(64, 64))
    return folder / "sample"


def image_of(sample: Path) -> Path:
    return next(iter(sorted((sample / "images").rglob("*.jpg"))))


def size_of(image: Path) -> tuple[int, int]:
    size_hw = check_image(image)[0]
    assert size_hw is not None
    return size_hw


def data_yaml(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = sample / "changed.yaml"
    file.write_text(
        "path: .\ntrain: images/train\nval: [images/val]\nnc: 2\nnames:\n  0: cat\n  1: dog\n", "utf-8"
    )

    def read() -> None:
        found = read_data_yaml(file)
        assert all(name.strip() and name.isprintable() for name in found.names)

    return file, read


def recipe(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "config.yaml"
    file.write_text(
        "data: x.yaml\nepochs: 3\nimgsz: 64\nrecipe:\n  mosaic: 0.5\n  schedule: linear\n", "utf-8"
    )
    return file, lambda: RunConfig.load(file)


def label_file(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "a.txt"
    file.write_text("0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.3 0.1 0.2 0.4\n", "utf-8")
    return file, lambda: read_labels(file, 2)


def image_list(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "list.txt"
    file.write_text(f"./a.jpg\n{image_of(sample)}\nmäh.jpg\n", "utf-8")
    return file, lambda: list_images([file])


def hostfile(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "hostfile"
    file.write_text("node1 slots=8\n# comment\nnode2 slots=4\n", "utf-8")
    return file, lambda: read_hostfile(file)


def coco(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    image = image_of(sample)
    height, width = size_of(image)
    content = {
        "images": [{"id": 1, "file_name": image.name, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "iscrowd": 0},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 9, 9],
                "segmentation": [[1, 1, 9, 1, 9, 9]],
            },
        ],
    }
    for split in ("train", "val"):
        (tmp_path / "coco" / split).mkdir(parents=True)
        (tmp_path / "coco" / split / image.name).write_bytes(image.read_bytes())
    (tmp_path / "coco/annotations").mkdir()
    files = [tmp_path / f"coco/annotations/instances_{split}.json" for split in ("train", "val")]
    for file in files:
        file.write_text(json.dumps(content), "utf-8")
    return files[0], converter("coco", tmp_path)


def voc(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    root, image = tmp_path / "voc", image_of(sample)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "JPEGImages/a.jpg").write_bytes(image.read_bytes())
    height, width = size_of(image)
    for split in ("train", "val"):
        (root / f"ImageSets/Main/{split}.txt").write_text("a\n", "utf-8")
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>12</ymax></bndbox>"
    file = root / "Annotations/a.xml"
    file.write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        f"<object><name>cat</name><difficult>0</difficult>{box}</object></annotation>",
        "utf-8",
    )
    return file, converter("voc", tmp_path)


def converter(kind: str, tmp_path: Path) -> Callable[[], object]:
    """Return a conversion whose every label the training's own reader accepts."""
    turns = iter(range(1 << 30))

    def read() -> None:
        dst = tmp_path / f"dst{next(turns)}"
        result = convert(kind, tmp_path / kind, dst)
        for file in dst.rglob("labels/**/*.txt"):
            _, problems = read_labels(file, len(result.names))
            assert not problems, problems

    return read


def weights(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    network, file = build_model("yolov5n", 2), tmp_path / "w.safetensors"
    few = {
        name: one for name, one in network.state_dict().items() if name.startswith(("stem", "detect.anchors"))
    }
    save_weights(file, few, describe(network, ["cat", "dog"], 64))
    return file, lambda: read_weights(file)


def manifest(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "progress.json"
    file.write_bytes(example_manifest().to_bytes())
    return file, lambda: read_manifest(tmp_path, verify=False)


def example_manifest() -> Manifest:
    progress = TrainState(
        total_steps=9, epochs=3, num_images=24, global_batch=8, seed=0, step=1, images_seen=8
    )
    progress.settings = {"names": ["猫", "dog"], "gradient_clipping": 10.0, "optimizer.params.lr": 0.01}
    progress.tracking = {"loss_sum": [0.1, 0.25, 3.0], "num_summed": 1}
    name = "tensors-00000-of-00001.safetensors"
    return Manifest(
        format=1, progress=progress, optimizer_scalars={"step": 1.0}, ema_updates=1, loss_scale={},
        files={name: "0" * 64}, tensors={"param/stem.conv.weight": name, "optimizer/momentum_buffer/stem": name},
    )  # fmt: skip


def metrics(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"kind": "step", "step": 1, "epoch": 0, "box": 0.1}\n' * 3, "utf-8")
    return file, lambda: JsonlWriter(file, step=5, epoch=1).close()


def deepspeed_json(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "ds.json"
    content = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 10.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.99], "weight_decay": 0.05}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.001, "warmup_num_steps": 9}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "reduce_bucket_size": 500000,
        },
        "wall_clock_breakdown": False,
    }
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return file, lambda: check(file, world_size=2, accelerator="cuda")


def deepspeed_env(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / ".deepspeed_env"
    file.write_text("NCCL_DEBUG=INFO\nOMP_NUM_THREADS=1\nNAME='a b'\n", encoding="utf-8")
    return file, lambda: _read_env_file(file, {})


def jpeg(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "a.jpg"
    file.write_bytes(image_of(sample).read_bytes())
    return file, pixels_of(file)


def png(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    file = tmp_path / "a.png"
    Image.open(image_of(sample)).resize((40, 30)).save(file)
    return file, pixels_of(file)


def pixels_of(file: Path) -> Callable[[], object]:
    """Return a reading as a training's: the index finds the size, and the loader the pixels."""

    def read() -> None:
        size_hw, reason, _ = check_image(file)
        assert size_hw or reason
        image = read_rgb(file, size_hw or (64, 64), 32)
        assert image is None or (max(image.shape[:2]), image.shape[2], image.dtype) == (32, 3, np.uint8)

    return read


def voc_list(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    _, read = voc(sample, tmp_path)
    return tmp_path / "voc/ImageSets/Main/train.txt", read


def index_cache(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    """The arrays behind the checksum, which is right again after each change."""
    file, whole = tmp_path / "arrays.npz", tmp_path / "cache.npz"
    save_cache(whole, "k", example_index())
    file.write_bytes(whole.read_bytes()[32:])

    def read() -> None:
        payload = file.read_bytes()
        whole.write_bytes(hashlib.sha256(payload).digest() + payload)
        load_cache(whole, "k")

    return file, read


def doctor_answer(sample: Path, tmp_path: Path) -> tuple[Path, Callable[[], object]]:
    """The output of a host: the probe's own answer, among the lines of a login shell."""
    file, query = tmp_path / "answer.txt", probe_query(LOCAL, {"sections": ["packages", "network"]})
    printed = subprocess.run(
        [sys.executable, *query.arguments], input=query.source, capture_output=True, timeout=60, check=True
    )
    file.write_bytes(b"Welcome!\n" + printed.stdout)

    async def answer() -> Reply:
        stdout = asyncio.StreamReader(MAX_LINE)
        stdout.feed_data(file.read_bytes())
        stdout.feed_eof()
        reply, process = Reply(), SimpleNamespace(stdout=stdout)
        await _read(reply, process, query.sections, time.time(), 20)  # type: ignore[arg-type]
        return reply

    def read() -> None:
        with contextlib.suppress(*NOT_VALID):  # as _ask has it
            asyncio.run(answer())

    assert len(asyncio.run(answer()).sections) == 3
    return file, read


READERS = (
    data_yaml, recipe, label_file, image_list, hostfile, coco, voc, weights, manifest, metrics,
    deepspeed_json, deepspeed_env, jpeg, png, voc_list, index_cache, doctor_answer,
)  # fmt: skip


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_no_changed_file_is_a_traceback_or_a_hang(make, sample, tmp_path):
    file, read = make(sample, tmp_path)
    read()  # whole
    torture(file, read, FEW, make.__name__)


@pytest.mark.soak
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_thousands_of_changed_files(make, sample, tmp_path):
    file, read = make(sample, tmp_path)
    torture(file, read, MANY, f"many {make.__name__}")


def test_every_bit_of_progress_json_is_noticed(tmp_path):
    file, whole = tmp_path / "progress.json", example_manifest().to_bytes()
    file.write_bytes(whole)
    assert read_manifest(tmp_path, verify=False).progress.settings["names"] == ["猫", "dog"]
    unnoticed = []
    for at in range(8 * len(whole)):
        data = bytearray(whole)
        data[at // 8] ^= 1 << at % 8
        file.write_bytes(data)
        try:
            read_manifest(tmp_path, verify=False)
            unnoticed.append((at // 8, at % 8, bytes(data[max(0, at // 8 - 20) : at // 8 + 20])))
        except UserError:
            pass
    assert not unnoticed, unnoticed[:5]


def test_a_manifest_of_an_older_run_is_read(tmp_path):
    (tmp_path / "progress.json").write_text(example_manifest().model_dump_json(exclude={"sha256"}), "utf-8")
    assert read_manifest(tmp_path, verify=False).sha256 is None


@pytest.mark.parametrize(
    ("key", "number"), [("format", 5000), ("ema_updates", 400), ("loss", 400), ("epoch", 4000)]
)
def test_numbers_of_thousands_of_digits_in_progress_json(key, number, tmp_path):
    text = example_manifest().model_dump_json(exclude={"sha256"})
    digits = "9" * number
    old = {
        "format": '"format":1',
        "ema_updates": '"ema_updates":1',
        "loss": "[0.1,0.25,3.0]",
        "epoch": '"epoch":0',
    }
    new = {"loss": f"[0.1,0.25,{digits}]"}.get(key, f'"{key}":{digits}')
    assert old[key] in text
    (tmp_path / "progress.json").write_text(text.replace(old[key], new), "utf-8")
    with pytest.raises(UserError, match=r"progress.json|format"):
        read_manifest(tmp_path, verify=False)


# ---- the index's cache


def example_index():
    labels = Labels(np.array([0, 1]), np.array([[0, 0, 0.5, 0.5], [0.1, 0.1, 0.2, 0.3]], np.float32))
    return assemble_index([ImageRecord("/a.jpg", (32, 32), labels, (Problem("/a.jpg", 1, "odd", "x"),))], 2)


def spoiled() -> Iterator[tuple[str, Callable[[dict[str, np.ndarray]], None]]]:
    """Changes of the arrays that keep the checksum right: of a stranger, or of another version."""

    def change(name: str, to: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
        return lambda arrays: arrays.__setitem__(name, to(arrays[name]))

    for name in ("path_bytes", "path_offsets", "sizes_hw", "offsets", "boxes", "classes", "point_offsets"):
        yield f"{name} longer", change(name, lambda one: np.concatenate([one, one]))
        yield f"{name} text", change(name, lambda one: one.astype(str))
        yield f"{name} flat", change(name, lambda one: one.reshape(1, -1, 1))
        yield f"{name} gone", lambda arrays, name=name: arrays.pop(name)
        yield f"{name} scalar", change(name, lambda one: np.array(3))
    yield "classes beyond", change("classes", lambda one: one + 7)
    yield "boxes NaN", change("boxes", lambda one: one * np.nan)
    yield "offsets falling", change("offsets", lambda one: one[::-1].copy())
    for header in (b"[]", b"{", b'{"key": "k"}', b'{"key": "k", "num_classes": "2", "problems": []}',
                   b'{"key": "k", "num_classes": 2, "problems": [[1, 2]]}', b'{"key": "k", "num_classes": 2, "problems": 5}',
                   b'{"key": "k", "num_classes": 2, "problems": [{"file": 1}]}', b"\xff"):  # fmt: skip
        yield (
            f"header {header!r}",
            change("header", lambda one, header=header: np.frombuffer(header, np.uint8)),
        )


@pytest.mark.parametrize(
    ("kind", "spoil"), list(spoiled()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_a_cache_of_another_shape_is_read_again_with_one_line(kind, spoil, tmp_path):
    file = tmp_path / "cache.npz"
    save_cache(file, "k", example_index())
    assert load_cache(file, "k") is not None
    with np.load(io.BytesIO(file.read_bytes()[32:])) as stored:
        arrays = {name: stored[name] for name in stored.files}
    spoil(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    file.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    with pytest.warns(UserWarning, match="is not used, and all files are read again") as noted:
        assert load_cache(file, "k") is None
    assert len(noted) == 1
    assert "\n" not in str(noted[0].message)


# ---- weights and the environment


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        ({"detect.anchors": lambda t: t * 1.1}, "its metadata has other anchors than detect.anchors"),
        ({"detect.anchors": lambda t: t[:2].clone()}, "its metadata has 3 levels of 3 anchors"),
        (
            {"stem.bn.running_var": lambda t: t - 2},
            "stem.bn.running_var has a value below 0, and a variance has none",
        ),
        ({"detect.anchors": lambda t: -t}, "detect.anchors has a value that is not above 0"),
        ({"detect.anchors": None}, "its metadata has anchors, and no tensor detect.anchors is there"),
        (
            {"detect.m.1.bias": lambda t: t[:18].clone()},
            "its metadata names 2 classes, which are 21 outputs, and detect.m.1.bias has 18",
        ),
    ],
)
def test_weights_that_contradict_themselves_are_refused(spoil, rule, tmp_path):
    network = build_model("yolov5n", 2)
    state = dict(network.state_dict())
    assert {"detect.anchors", "stem.bn.running_var"} <= state.keys()
    info = describe(network, ["cat", "dog"], 64)
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        halved = {name: one.to(kind) if one.is_floating_point() else one for name, one in state.items()}
        save_weights(tmp_path / "w.safetensors", halved, info)
        read_weights(tmp_path / "w.safetensors")
    spoiled = {**state, **{name: change and change(state[name]) for name, change in spoil.items()}}
    spoiled = {name: tensor for name, tensor in spoiled.items() if tensor is not None}
    save_weights(tmp_path / "w.safetensors", spoiled, info)
    with pytest.raises(UserError, match=rule):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "changes",
    [
        {"anchors_px": (((1.0, 2.0),), ((1.0, 2.0), (3.0, 4.0)))}, {"anchors_px": ()}, {"anchors_px": ((), ())},
        {"names": ("cat", "a\x1b[2J")}, {"names": ("cat", "")}, {"names": ("cat", "cat")}, {"anchors_px": (((0.0, 1.0),),)},
    ],
)  # fmt: skip
def test_ragged_metadata_and_impossible_names_are_refused(changes, tmp_path):
    network = build_model("yolov5n", 2)
    info = describe(network, ["cat", "dog"], 64).model_copy(update=changes)
    save_weights(tmp_path / "w.safetensors", network.state_dict(), info)
    with pytest.raises(UserError, match="its metadata is damaged"):
        read_weights(tmp_path / "w.safetensors")


def test_no_environment_is_a_traceback():
    rng = random.Random(SEED)
    names = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
    names += [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_TASKS_PER_NODE",
    ]
    values = [
        "0",
        "1",
        "8",
        "-1",
        "9" * 5000,
        "",
        "x",
        "1e3",
        "٣",
        "70000",
        "8(x2)",
        "1(x99999999999)",
        "²",
        "\udcff",
    ]
    for _ in range(500):
        given = {name: rng.choice(values) for name in names if rng.random() < 0.6}
        try:
            found = read_environment(given)
        except UserError:
            continue
        assert 0 <= found.rank < found.size
        assert 0 <= found.local_rank < found.local_size <= found.size
        assert found.master_port is None or 0 <= found.master_port <= 65535
