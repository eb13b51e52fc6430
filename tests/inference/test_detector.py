"""`dsyolo.load`: the same objects whatever an image comes as, alone, in a list and in threads."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from runs import ROOT

import dsyolo
from dsyolo.base.errors import UserError
from dsyolo.detection.boxes import letterbox
from dsyolo.models.weights import describe, save_weights
from dsyolo.models.yolov5 import build_yolov5

NAMES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights that see objects everywhere, and three images of two shapes."""
    place = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    network = build_yolov5("yolov5n", len(NAMES)).eval()
    with torch.no_grad():
        for conv in network.get_submodule("detect").m:
            conv.weight.normal_(0, 5)
            conv.bias.zero_().view(3, -1)[:, 4] = 2
    save_weights(place / "w.safetensors", network.state_dict(), describe(network, NAMES, 128))
    draw = np.random.default_rng(0)
    for name, (height, width) in {"a": (90, 120), "b": (100, 50), "c": (90, 120)}.items():
        cv2.imwrite(str(place / f"{name}.png"), draw.integers(0, 256, (height, width, 3), np.uint8))
    return place


@pytest.fixture(scope="module")
def detector(folder):
    return dsyolo.load(folder / "w.safetensors", score=0.3)


def same(one, other, atol: float = 0.0) -> bool:
    assert len(one) == len(other) > 3
    return all(
        np.allclose(getattr(one, key), getattr(other, key), rtol=0, atol=atol)
        for key in ("boxes_xyxy", "scores", "classes")
    )


def test_an_image_is_the_same_as_a_file_an_array_and_a_pil_image(folder, detector):
    file = folder / "a.png"
    found = detector(str(file))
    array = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
    for given in (file, array, Image.open(file), array[::-1][::-1]):
        assert same(detector(given), found)
    grey = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE)
    assert same(detector(grey), detector(np.dstack([grey] * 3)))
    assert found.image_rgb.shape == (90, 120, 3)
    assert found.names == detector.names == NAMES


def test_boxes_are_in_pixels_of_the_image_and_best_first(folder, detector):
    found = detector(folder / "b.png")
    assert found.boxes_xyxy.min() >= 0
    assert found.boxes_xyxy[:, [0, 2]].max() <= 50
    assert found.boxes_xyxy[:, [1, 3]].max() <= 100
    assert (np.diff(found.scores) <= 0).all()
    # By hand: the image of 128 px, letterboxed, through the network, and back.
    network = build_yolov5("yolov5n", len(NAMES)).eval()
    from dsyolo.models.weights import load_into

    load_into(network, folder / "w.safetensors")
    padded, scale, pad_xy = letterbox(found.image_rgb, (128, 64))
    with torch.inference_mode():
        decoded = network.decode(network(torch.from_numpy(padded).permute(2, 0, 1)[None].contiguous()))[0]
    best = int((decoded[:, 4:5] * decoded[:, 5:]).max(1).values.argmax())
    centre = (decoded[best, :2].numpy() - pad_xy) / scale
    box = found.boxes_xyxy[0]
    inside = (decoded[best, :4] > 0).all()
    assert inside
    assert found.scores[0] == pytest.approx(float(decoded[best, 4] * decoded[best, 5:].max()), abs=1e-5)
    assert box[0] - 1 <= centre[0] <= box[2] + 1
    assert box[1] - 1 <= centre[1] <= box[3] + 1


def test_a_list_of_other_shapes_gives_what_each_gives_alone(folder, detector):
    files = [folder / f"{name}.png" for name in "abcab"]
    together = detector(files)
    assert len(together) == 5
    for found, file in zip(together, files, strict=True):
        assert same(found, detector(file), atol=1e-3)
    assert detector([]) == []


def test_threads_share_a_detector(folder, detector):
    files = [folder / f"{name}.png" for name in "abc"] * 4
    expected = [detector(file) for file in files[:3]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(detector, files))
    assert all(same(one, expected[i % 3]) for i, one in enumerate(found))


def test_pictures_and_plain_values(folder, detector, tmp_path):
    found = detector(folder / "a.png")
    picture = found.plot()
    assert picture.shape == found.image_rgb.shape
    assert (picture != found.image_rgb).any()
    found.save(tmp_path / "out.png")
    assert (cv2.cvtColor(cv2.imread(str(tmp_path / "out.png")), cv2.COLOR_BGR2RGB) == picture).all()
    rows = found.to_json()
    assert [row["class"] for row in rows] == found.classes.tolist()
    assert all(row["name"] == NAMES[row["class"]] and 0.3 < row["score"] <= 1 for row in rows)
    with pytest.raises(UserError, match=r"pictures are \.jpg or \.png"):
        found.save(tmp_path / "out.tiff")


def test_supervision_gets_the_same_figures_or_is_named(folder, detector, monkeypatch):
    found = detector(folder / "a.png")
    if "supervision" not in sys.modules:
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(UserError, match="pip install supervision"):
            found.to_supervision()

    class Stub:
        class Detections:
            def __init__(self, **given: object) -> None:
                self.__dict__ |= given

    monkeypatch.setitem(sys.modules, "supervision", Stub)
    made = found.to_supervision()
    assert (made.xyxy == found.boxes_xyxy).all()
    assert (made.confidence == found.scores).all()
    assert made.data["class_name"].tolist() == [row["name"] for row in found.to_json()]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("nowhere.jpg", "image file cannot be read"),
        (3, "it is a int. Give a file, an array or a PIL image."),
        (np.zeros((4, 4, 3), np.float32), "type float32, but it must be"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
    ],
)
def test_what_is_no_image_is_named(detector, given, told):
    with pytest.raises(UserError, match=told):
        detector(given)
    with pytest.raises(UserError, match=told):
        detector([np.zeros((40, 40, 3), np.uint8), given])


def test_arguments_out_of_range_are_named_together(folder):
    with pytest.raises(UserError) as caught:
        dsyolo.load(folder / "w.safetensors", score=2, iou=-1, max_detections=0, device="cuda:1")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "score",
        "iou",
        "device",
        "max_detections",
    ]


def test_the_page_s_program_runs(folder, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "w.safetensors", "best.safetensors")
    cv2.imwrite("image.jpg", cv2.imread(str(folder / "a.png")))
    exec(block, {})
    assert capsys.readouterr().out.split()[0] in NAMES
    assert cv2.imread("annotated.jpg").shape == (90, 120, 3)


def test_importing_dsyolo_does_not_import_torch():
    code = "import dsyolo, sys; assert 'torch' not in sys.modules; dsyolo.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dsyolo.nothing
