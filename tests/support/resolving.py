"""A run that is resolved and not trained, over a data set of two black images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsyolo.config.resolve import RunSpec, resolve


def resolved_in(place: Path, words: Sequence[str]) -> RunSpec:
    for split in ("train", "val"):
        (place / "images" / split).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"images/{split}/a.jpg"), np.zeros((64, 64, 3), np.uint8))
    data, ds = place / "data.yaml", place / "ds.json"
    data.write_text("train: images/train\nval: images/val\nnames: [cat]\n", encoding="utf-8")
    ds.write_text('{"train_batch_size": 4}', encoding="utf-8")
    return resolve(
        ["--data", str(data), "--deepspeed_config", str(ds), *words],
        "train.py",
        world_size=1,
        accelerator="cpu",
        plan=lambda *_: pytest.fail("nothing is left open"),
        saved_state=lambda _: None,
        check_folder=lambda *_: None,
    )
