"""`dsyolo val` and `dsyolo detect`: what they refuse, and that they lose nothing of the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from dsyolo.cli import main
from dsyolo.commands import detect
from dsyolo.config.recipe import Recipe
from dsyolo.config.run_config import RunConfig
from dsyolo.data import loader
from dsyolo.data.synthetic import draw_sample
from dsyolo.detection import postprocess
from dsyolo.models import weights
from dsyolo.models.weights import describe, save_weights
from dsyolo.models.yolov5 import build_yolov5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a data set of 6 + 2 images and weights that know nothing."""
    folder = tmp_path_factory.mktemp("cli")
    data = yaml.safe_load(draw_sample(folder / "sample", num_images=8, image_size=(96, 96)).read_text())
    torch.manual_seed(0)
    network = build_yolov5("yolov5n", len(data["names"]))
    info = describe(network, list(data["names"].values()), 64)
    save_weights(folder / "w.safetensors", network.state_dict(), info)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(place: Path, command: str, *words: object) -> int:
    return main([command, "--weights", str(place / "w.safetensors"), *map(str, words)])


def val_images(place: Path) -> list[Path]:
    return sorted((place / "sample/images/val").iterdir())


# ---- detect


def test_images_and_folders_are_taken_as_the_readme_says(place, tmp_path, capsys):
    one = sorted((place / "sample/images/train").iterdir())[0]
    assert run(place, "detect", "--out", tmp_path / "out", one, place / "sample/images/val") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([one.name, *(path.name for path in val_images(place))])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_detect_writes_what_is_asked_for_by_yolov5_s_flags_too(place, tmp_path, capsys):
    words = (
        "--save-txt",
        "--save-conf",
        "save_json=True",
        "--save-csv",
        "--save-crop",
        "--conf",
        0.0001,
        "--max-det",
        3,
    )
    assert run(place, "detect", "--out", tmp_path / "out", *words, val_images(place)[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"written: {tmp_path}/out/") for line in lines[1:]] == [
        *("predictions.json", "predictions.csv", "labels", "crops")
    ]
    found = json.loads((tmp_path / "out/predictions.json").read_text(encoding="utf-8"))
    (label,) = (tmp_path / "out/labels").iterdir()
    assert len(found) == len(label.read_text(encoding="utf-8").splitlines()) == 3
    assert run(place, "detect", "--out", tmp_path / "out", *words, val_images(place)[0]) == 2
    assert "--save_txt: 1 label files exist there" in capsys.readouterr().err
    assert run(place, "detect", "--out", tmp_path / "out", "--save_conf", val_images(place)[0]) == 2
    assert "Give --save_txt too" in capsys.readouterr().err


def test_detect_without_a_single_readable_image_is_a_mistake(place, tmp_path, capsys):
    (tmp_path / "garbage.jpg").write_bytes(b"no image")
    assert run(place, "detect", "--out", tmp_path / "out", tmp_path / "garbage.jpg") == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err


def test_an_image_without_a_detail_is_named_with_its_reason_alone(place, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    (tmp_path / "a\nb.png").touch()
    assert run(place, "detect", "--out", tmp_path / "out", tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/empty.png: empty image file (left out)" in lines
    assert f"{tmp_path}/a\\nb.png: empty image file (left out)" in lines


def test_many_images_are_reported_in_one_line(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(detect, "MANY_IMAGES", 2)
    args = ("--score_threshold", 0, "--out", tmp_path, place / "sample/images/val")
    assert run(place, "detect", *args) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("2 images: ")
    assert "circle" in line


@pytest.mark.parametrize("link", [False, True])
def test_pictures_never_take_the_place_of_the_images(place, tmp_path, capsys, link):
    source = tmp_path / "own"
    shutil.copytree(place / "sample/images/val", source)
    before = {path: path.read_bytes() for path in source.iterdir()}
    out = source
    if link:
        out = tmp_path / "linked"
        out.symlink_to(source)
    assert run(place, "detect", "--out", out, source) == 2
    assert "it is one of the images given" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    for number in range(8):
        shutil.copy(val_images(place)[0], source / f"more{number}.jpg")
    assert run(place, "detect", "--out", out, source) == 2
    assert "and 5 more." in capsys.readouterr().err


def test_two_images_of_one_name_do_not_share_a_picture(place, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(val_images(place)[0], tmp_path / name / "i.jpg")
    sources = (tmp_path / "a", tmp_path / "b")
    assert run(place, "detect", "--out", tmp_path / "out", *sources) == 2
    told = capsys.readouterr().err
    assert f"both {tmp_path}/a/i.jpg and {tmp_path}/b/i.jpg would be written there" in told
    assert not (tmp_path / "out").exists()
    # one image named twice is one image
    assert run(place, "detect", "--out", tmp_path / "out", tmp_path / "a", tmp_path / "a/i.jpg") == 0


# ---- what is refused before anything is computed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["detect", "--out", "{file}", "{image}"], "is a file, and a folder is needed there"),
        (["val", "--json", "{folder}", "--data", "{data}"], "it is a folder or device. Name a file."),
        (
            ["val", "--json", "{file}", "--data", "{data}"],
            "it holds something else than such a report. Name another file.",
        ),
        (["val", "--json", "{file}/x.json", "--data", "{data}"], "is a file, and a folder is needed there"),
    ],
)
def test_places_that_cannot_be_written(place, tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.setattr(weights, "rebuild", lambda *_: pytest.fail("the weights were read first"))
    (tmp_path / "file").write_text("mine")
    places = {"file": tmp_path / "file", "folder": tmp_path, "image": val_images(place)[0]}
    command, *words = (word.format(data=place / "sample/data.yaml", **places) for word in words)
    assert run(place, command, *words) == 2
    assert told in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--iou_threshold", "7", "a number, above 0 and at most 1"),
        ("--iou_threshold", "nan", "a number, above 0 and at most 1"),
        ("--score_threshold", "-1", "a number, at least 0 and below 1"),
        ("--score_threshold", "2", "a number, at least 0 and below 1"),
        ("--max_detections", "0", "a whole number, at least 1"),
        ("--batch_size", "x", "a whole number, at least 1"),
        ("--workers", "-1", "a whole number, at least 0 and at most 1024"),
        ("--workers", "999999", "a whole number, at least 0 and at most 1024"),
    ],
)
def test_numbers_are_judged_as_in_training(place, capsys, option, value, rule):
    for command in ("val",) if option in ("--batch_size", "--workers") else ("val", "detect"):
        words = ["--data", place / "sample/data.yaml"] if command == "val" else [val_images(place)[0]]
        assert run(place, command, *words, option, value) == 2
        assert f"{option}: {value} given, but it must be {rule}" in capsys.readouterr().err


# ---- val


def test_val_takes_the_settings_of_a_training(place, monkeypatch):
    seen = []
    plain_loader, plain_post = loader.EvalLoader, postprocess.PostProcessor
    monkeypatch.setattr(
        loader, "EvalLoader", lambda *a, **k: seen.append(k["rectangular"]) or plain_loader(*a, **k)
    )
    monkeypatch.setattr(postprocess, "PostProcessor", lambda *a, **k: seen.append(a) or plain_post(*a, **k))
    words = ("--data", place / "sample/data.yaml", "--workers", 0)
    assert run(place, "val", *words) == 0
    assert run(place, "val", *words, "--no-rect_val", "--max_detections", 7, "--iou_threshold", 0.5) == 0
    assert seen == [(0.001, 0.6, 300), True, (0.001, 0.5, 7), False]


def test_val_says_at_which_confidence_p_and_r_hold_and_the_losses(place, tmp_path, capsys):
    words = ("--data", place / "sample/data.yaml", "--workers", 0)
    assert run(place, "val", *words, "--json", tmp_path / "plain.json") == 0
    shown = capsys.readouterr().out.splitlines()
    plain = json.loads((tmp_path / "plain.json").read_text(encoding="utf-8"))
    assert shown[-3].startswith("P and R: ")
    values = [plain[name] for name in ("val_box", "val_obj", "val_cls")]
    assert shown[-2] == "loss of the split: box {:.4f}, obj {:.4f}, cls {:.4f}".format(*values)
    assert shown[-1].startswith("gains of the loss: those of preset low")
    assert min(values) > 0
    # In a run's folder they are those of its own recipe.
    (tmp_path / "run/weights").mkdir(parents=True)
    shutil.copy(place / "w.safetensors", tmp_path / "run/weights/best.safetensors")
    config = RunConfig(data="d.yaml", recipe=Recipe(box=0.1, cls=0.25)).dump()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    weights = [
        "--weights",
        str(tmp_path / "run/weights/best.safetensors"),
        "--json",
        str(tmp_path / "own.json"),
    ]
    assert main(["val", *map(str, words), *weights]) == 0
    own = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    factors = [
        own[name] / value for name, value in zip(("val_box", "val_obj", "val_cls"), values, strict=True)
    ]
    assert factors == pytest.approx([2, 1, 0.5])
    assert f"gains of the loss: {tmp_path}/run/config.yaml" in capsys.readouterr().out


def test_val_draws_the_confusion_matrix_and_the_curves(place, tmp_path, capsys):
    out = tmp_path / "new/pictures"
    assert run(place, "val", "--data", place / "sample/data.yaml", "--workers", 0, "--pictures", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"pictures: {out}"
    names = {"confusion_matrix.png", "P_curve.png", "R_curve.png", "F1_curve.png", "PR_curve.png"}
    assert {path.name for path in out.iterdir()} == names
    assert all(min(cv2.imread(str(path)).shape[:2]) > 300 for path in out.iterdir())
    (tmp_path / "file").touch()
    assert run(place, "val", "--data", place / "sample/data.yaml", "--pictures", tmp_path / "file") == 2
    assert "--pictures" in capsys.readouterr().err


def test_val_matches_classes_of_another_order_by_name_and_refuses_others(place, tmp_path, capsys):
    words = ("--workers", 0, "--json")
    assert run(place, "val", "--data", place / "sample/data.yaml", *words, tmp_path / "same.json") == 0
    shutil.copytree(place / "sample", tmp_path / "other")
    data = yaml.safe_load((tmp_path / "other/data.yaml").read_text(encoding="utf-8"))
    names = list(data["names"].values())
    turned = names[::-1]
    (tmp_path / "other/data.yaml").write_text(yaml.safe_dump({**data, "names": turned}), encoding="utf-8")
    for label in (tmp_path / "other/labels").rglob("*.txt"):
        rows = [line.split() for line in label.read_text(encoding="utf-8").splitlines()]
        lines = [" ".join([str(turned.index(names[int(klass)])), *box]) for klass, *box in rows]
        label.write_text("\n".join(lines), encoding="utf-8")
    assert run(place, "val", "--data", tmp_path / "other/data.yaml", *words, tmp_path / "turned.json") == 0
    assert "in another order: matched by name" in capsys.readouterr().err
    first, second = (
        json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("same.json", "turned.json")
    )
    assert first == second
    (tmp_path / "other/data.yaml").write_text(
        yaml.safe_dump({**data, "names": [*turned[:-1], "cube"]}), encoding="utf-8"
    )
    assert run(place, "val", "--data", tmp_path / "other/data.yaml", "--workers", 0) == 2
    told = capsys.readouterr().err
    assert (
        f"names: {', '.join(names)} in the weights, {', '.join([*turned[:-1], 'cube'])} in the data" in told
    )


def test_val_refuses_classes_that_data_yaml_does_not_name_as_training_does(place, tmp_path, capsys):
    shutil.copytree(place / "sample", tmp_path / "more")
    label = sorted((tmp_path / "more/labels/val").iterdir())[0]
    with label.open("a") as file:
        file.write("9 0.5 0.5 0.2 0.2\n-1 0.5 0.5 0.2 0.2\n")
    row = len(label.read_text().splitlines()) - 1
    assert run(place, "val", "--data", tmp_path / "more/data.yaml", "--workers", 0) == 2
    told = capsys.readouterr().err
    assert f"val: class 9, but data.yaml names 5 (0 to 4): 1 rows ({label}:{row})." in told
    assert "Add these classes to names (circle, square, triangle, star, ring), or remove the rows." in told
    assert "class -1" not in told  # which no data.yaml could name: left out, as every row that means nothing
