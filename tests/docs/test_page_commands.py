"""Run each command of README and docs that needs one machine alone, made short, in a folder with a reader's files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from ranks import free_port
from runs import ROOT, environment
from test_docs import PAGES, commands, fences
from yolov5_files import save_checkpoint

from dsyolo.base.environment import RESTARTED
from dsyolo.models.yolov5 import build_yolov5

SHORT = ["--epochs", "1", "--imgsz", "64", "--workers", "0"]
ELSEWHERE = {
    "measured.md"
}  # its data set is not in a checkout; `make parity` and benchmarks are its commands
LOCAL = {"convert", "sample", "val", "detect", "plan", "simulate"}
VOC = """<annotation><size><width>100</width><height>80</height><depth>3</depth></size><object><name>cat</name>
<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>50</xmax><ymax>50</ymax></bndbox></object></annotation>"""
COCO = """{"images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}], "categories": [{"id": 3, "name": "cat"}],
"annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 45, 45], "area": 2025, "iscrowd": 0}]}"""


def is_local(words: list[str]) -> bool:
    """Whether a command needs one machine alone."""
    if words[0] == "dsyolo":
        return words[1] in LOCAL
    return "dsyolo/train.py" in words and "--hostfile" not in words and "--help" not in words


def all_commands() -> list[list[str]]:
    """Return each command once, but for those that test_docs.py runs."""
    blocks = [
        block
        for page in PAGES
        if page.name not in ELSEWHERE
        for info, block in fences(page)
        if info == "bash"
    ]
    found = {tuple(words): None for block in blocks for words in commands(block) if is_local(words)}
    return [list(words) for words in found]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8))


def files_of_a_reader(place: Path) -> None:
    """Write data sets in the formats that the pages convert, and pictures."""
    voc = place / "VOCdevkit/VOC2012"
    for folder in (voc / "Annotations", voc / "ImageSets/Main", place / "coco_download/annotations"):
        folder.mkdir(parents=True)
    for split in ("train", "val"):
        picture(voc / f"JPEGImages/{split}.jpg")
        (voc / f"Annotations/{split}.xml").write_text(VOC, encoding="utf-8")
        (voc / f"ImageSets/Main/{split}.txt").write_text(f"{split}\n", encoding="utf-8")
        picture(place / f"coco_download/{split}2017/a.jpg")
        (place / f"coco_download/annotations/instances_{split}2017.json").write_text(COCO, encoding="utf-8")
    for name in ("image.jpg", "folder/a.jpg", "my_boxes/images/a.png", "my_boxes/images/b.png"):
        picture(place / name)
    rows = "train,a.png,cat,1,1,50,50\nval,b.png,cat,1,1,50,50\n"
    (place / "my_boxes/boxes.csv").write_text("split,image,class,x1,y1,x2,y2\n" + rows, encoding="utf-8")


@pytest.mark.soak
def test_every_command_for_one_machine_runs(tmp_path: Path):
    for name in ("dsyolo", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    env = {**environment(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    programs = {"python": [sys.executable], "deepspeed": [str(Path(sys.executable).with_name("deepspeed"))]}
    programs["dsyolo"] = [sys.executable, "-m", "dsyolo.cli"]
    faults = []

    def run(words: list[str]) -> None:
        command = [*programs[words[0]], *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        if done.returncode:
            faults.append(f"{' '.join(words)}: {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}")

    files_of_a_reader(tmp_path)
    run(["dsyolo", "sample", "made", "--images", "40"])
    for path in (tmp_path / "made").iterdir():
        path.rename(tmp_path / path.name)
    # the run that the pages resume, and whose weights they use
    train = ["python", "dsyolo/train.py", "--data", "data.yaml", "--model", "yolov5s", *SHORT]
    run([*train, "--deepspeed_config", "ds_configs/zero3.json"])
    save_checkpoint(tmp_path / "yolov5s.pt", build_yolov5("yolov5s", 80), [f"name{i}" for i in range(80)])
    run([*train[:4], "--model", "examples/my_net.py:build", *SHORT, "--name", "own"])
    assert not faults, "\n".join(faults)
    for number, words in enumerate(all_commands()):
        if "dsyolo/train.py" in words or words[:2] == ["dsyolo", "train"]:
            words = [*words, RESTARTED, *SHORT] + (
                [] if "--resume" in words else ["--name", f"command{number}"]
            )
        if words[0] == "deepspeed":
            given = [] if "--num_gpus" in words else ["--num_gpus", "2"]
            words = ["deepspeed", "--master_port", str(free_port()), *given, *words[1:]]
        if "--model" in words and words[1] == "val":
            words = [word.replace("runs/train", "runs/own") for word in words]
        run([word.replace("ds_configs/my.json", f"my{number}.json") for word in words])
    assert not faults, "\n".join(faults)


def test_the_commands_of_the_pages_are_found():
    found = [" ".join(words[:2]) for words in all_commands()]
    assert len(found) > 15
    assert {"dsyolo convert", "dsyolo val", "dsyolo plan", "deepspeed dsyolo/train.py"} <= set(found)
