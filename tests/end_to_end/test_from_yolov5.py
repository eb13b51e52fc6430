"""Trainings by the command lines of YOLOv5 and Ultralytics, from a folder that is no checkout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from runs import alone, begin, launcher, make_place, rows

YOLOV5 = """
--img 64 --batch-size 8 --epochs 2 --data sample/data.yaml --cfg yolov5n.yaml --weights= --cos-lr --sync-bn --cache
--nosave --noval --noautoanchor --hyp hyp.scratch-med.yaml --device cpu --patience 5 --seed 3 --save-period -1
--label-smoothing 0.1 --multi-scale=false --workers 1 --exist-ok --freeze 0 --project runs --name a --threads 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("yolov5"))


@pytest.fixture(scope="module")
def first(place: Path) -> str:
    """The output of two ranks of the installed command, with all aliases of YOLOv5's train.py that have one."""
    command = [
        *launcher(),
        "--no_python",
        str(Path(sys.executable).with_name("dsyolo")),
        "train",
        *YOLOV5.split(),
    ]
    process = begin(place, command)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def test_every_alias_of_yolov5_trains_with_its_value(place: Path, first: str) -> None:
    config = yaml.safe_load((place / "runs/a/config.yaml").read_text(encoding="utf-8"))
    expected = {
        **{
            "imgsz": 64,
            "batch": 4,
            "epochs": 2,
            "model": "yolov5n",
            "weights": None,
            "seed": 3,
            "patience": 5,
        },
        **{"sync_batchnorm": True, "cache": "ram", "hyp": "med", "workers": 1, "deepspeed_config": "auto"},
    }
    assert {key: config[key] for key in expected} == expected
    assert not {"exist_ok", "device", "resume"} & config.keys()  # they belong to a start
    recipe = config["recipe"]
    assert (recipe["schedule"], recipe["cls"], recipe["label_smoothing"]) == ("cosine", 0.3, 0.1)
    ran = json.loads((place / "runs/a/deepspeed.json").read_text(encoding="utf-8"))
    assert (ran["train_batch_size"], ran["train_micro_batch_size_per_gpu"]) == (64, 4)
    assert [row["epoch"] for row in rows(place, "a", "epoch") if row.get("map50") is not None] == [
        1
    ]  # --noval
    for line in (
        "--batch-size 8: of all GPUs, as in YOLOv5: --batch 4 on each of 2",
        "--noval: validated after",
    ):
        assert line in first


def test_ultralytics_form_starts_afresh_in_the_same_folder(place: Path, first: str) -> None:
    words = "imgsz=64 batch=4 epochs=1 model=yolov5n.yaml exist_ok=True device=cpu cos_lr=False cache=ram amp=False"
    keys = {"data": place / "sample/data.yaml", "name": "a", "project": place / "runs"}
    done = alone(
        place,
        "a",
        *words.split(),
        *(f"{key}={value}" for key, value in keys.items()),
        epochs=1,
        deepspeed_config=None,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--exist_ok: the checkpoints of the run before were moved to" in done.stdout + done.stderr
    config = yaml.safe_load((place / "runs/a/config.yaml").read_text(encoding="utf-8"))
    assert (config["batch"], config["deepspeed_config"]) == (4, "fp32")
    assert len(list((place / "runs/a").glob("checkpoints*"))) == 2
    assert len(rows(place, "a", "epoch")) == 1
