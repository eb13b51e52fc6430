"""Chinese and accented names in locales of other encodings: train, stop, resume bit-equal, validate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from runs import CONFIG, TRAIN, environment
from safetensors.torch import load_file

from dsyolo.data.synthetic import draw_sample

NAMES = ["猫", "café", "Größe"]
LOCALES = {
    "zh_CN.GBK": ("zh_CN", "GBK"),
    "en_US.ISO-8859-1": ("en_US", "ISO-8859-1"),
    "C": None,
    "C.UTF-8": None,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A data set in a folder with a Chinese name, and one image whose name is no UTF-8."""
    place = tmp_path_factory.mktemp("locales")
    sample = place / "数据 é"
    draw_sample(sample, num_images=8, image_size=(64, 64))
    lines = (sample / "data.yaml").read_text(encoding="utf-8")
    number = lines.count("\n  ")
    head = lines.partition("names:")[0]
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate([*NAMES, "d", "e", "f", "g", "h"][:number]))
    (sample / "data.yaml").write_text(f"{head}names:\n{names}", encoding="utf-8")
    image = min((sample / "images/train").glob("*.jpg"))
    odd = os.fsencode(image).replace(b"00000", b"caf\xe9")
    shutil.copy(image, odd)
    shutil.copy(
        sample / "labels/train" / f"{image.stem}.txt",
        odd.replace(b"images", b"labels").replace(b".jpg", b".txt"),
    )
    (place / "ds.json").write_text(json.dumps({**CONFIG, "train_batch_size": 4}), encoding="utf-8")
    return place


def variables(place: Path, locale: str) -> Mapping[str, str]:
    """Return the environment of a locale, which is made if the system lacks it."""
    made = LOCALES[locale]
    given = {
        k: v
        for k, v in environment(place).items()
        if not k.startswith("LC_") and k not in ("LANG", "PYTHONUTF8")
    }
    if made is None:
        return {**given, "LC_ALL": locale}
    folder = place / "locales"
    if not (folder / locale).exists():
        if not shutil.which("localedef"):
            pytest.skip("no localedef")
        folder.mkdir(exist_ok=True)
        language, charmap = made
        subprocess.run(
            ["localedef", "-i", language, "-f", charmap, str(folder / locale)], capture_output=True
        )
        if not (folder / locale).exists():
            pytest.skip("localedef lacks its sources: install the package locales")
    return {**given, "LC_ALL": locale, "LOCPATH": str(folder)}


def run(place: Path, locale: str, *words: str) -> str:
    command = [os.fsencode(word) for word in (sys.executable, *words)]
    done = subprocess.run(command, env=variables(place, locale), cwd=place, capture_output=True, timeout=240)
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, text
    assert "Traceback" not in text
    return text


def train(place: Path, locale: str, name: str, *words: str) -> str:
    options = [
        "--data",
        "数据 é/data.yaml",
        "--deepspeed_config",
        "ds.json",
        "--imgsz",
        "64",
        "--threads",
        "1",
    ]
    folders = ["--project", f"运行 {locale}", "--name", name]
    shapes = ["--epochs", "2", "--workers", "1", "--memory_profile", "off", "--mosaic", "0.5"]
    return run(place, locale, str(TRAIN), *options, *folders, *shapes, *words)


def trains_and_resumes(place: Path, locale: str) -> None:
    """Train two epochs; go back to the first one's checkpoint and resume; compare bit by bit; validate."""
    text = train(place, locale, "整 é")
    assert "images" in text
    folder = place / f"运行 {locale}" / "整 é"
    weights = load_file(folder / "weights/last.safetensors")
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    assert "locales" in config or "data" in config
    newest = max((folder / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
    assert manifest["progress"]["settings"]["names"][:3] == NAMES
    shutil.rmtree(newest)
    train(place, locale, "整 é", "--resume", "always")
    again = load_file(folder / "weights/last.safetensors")
    assert weights.keys() == again.keys()
    assert all((weights[name] == again[name]).all() for name in weights)
    words = ["--weights", f"{folder}/weights/last.safetensors", "--data", "数据 é/data.yaml"]
    run(place, locale, "-m", "dsyolo.cli", "val", *words)


@pytest.mark.parametrize("locale", ["zh_CN.GBK"])
def test_a_run_with_chinese_names_trains_resumes_and_is_validated(place, locale):
    trains_and_resumes(place, locale)


@pytest.mark.soak
@pytest.mark.parametrize("locale", ["en_US.ISO-8859-1", "C", "C.UTF-8"])
def test_a_run_in_other_locales_too(place, locale):
    trains_and_resumes(place, locale)
