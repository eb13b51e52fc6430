"""A run that goes on with other numbers of ranks trains every image of an epoch exactly once."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from runs import CONFIG, ROOT, arguments, forked, losses

from dsyolo.cluster import preemption as stop
from dsyolo.data.sampler import StepSampler

NUM_IMAGES, BATCH, SIZE_PX = 48, 4, 64  # 12 steps
GREYS = [5 * number + 4 for number in range(NUM_IMAGES)]
NOTHING_DRAWN = ("mosaic", "hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr")
# What follows on what: ranks, and the rank and step at which SIGTERM comes, or None for the end of the epoch.
QUICK = ((2, "1:1"), (1, None))
WHOLE = ((2, "1:1"), (1, "0:5"), (4, "2:7"), (2, None))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of one grey each, with a box somewhere."""
    folder = tmp_path_factory.mktemp("elastic")
    rng = np.random.default_rng(0)
    for split, greys in (("train", GREYS), ("val", GREYS[:4])):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for grey in greys:
            image = np.full((SIZE_PX, SIZE_PX, 3), grey, np.uint8)
            cv2.imwrite(str(folder / f"images/{split}/{grey}.png"), image)
            box = [*rng.uniform(0.4, 0.6, 2), *rng.uniform(0.2, 0.7, 2)]
            text = " ".join(["0", *(f"{value:.3f}" for value in box)])
            (folder / f"labels/{split}/{grey}.txt").write_text(text)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [thing]\n")
    batches = {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": 1}
    (folder / "ds.json").write_text(json.dumps({**CONFIG, **batches}))
    return folder


def run(place: Path, name: str, num_ranks: int, stop_at: str | None) -> subprocess.CompletedProcess:
    """The same command line on any ranks."""
    notes = place / f"notes_{name}"
    notes.mkdir(exist_ok=True)
    settings = {"data": place / "data.yaml", "epochs": 1, "imgsz": SIZE_PX, **dict.fromkeys(NOTHING_DRAWN, 0)}
    words = arguments(place, name, **settings)
    words += ["--freeze_batchnorm", "--resume", "auto"]  # else rounding grows tenfold every other step
    noting = {"NOTES": str(notes), "STOP_AT": stop_at or ""}
    return forked(place, [str(ROOT / "tests/support/noting.py"), *words], num_ranks, noting)


def noted(place: Path, name: str) -> list[dict]:
    lines = [line for file in (place / f"notes_{name}").iterdir() for line in file.read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda note: note["step"])


@pytest.mark.parametrize("parts", [QUICK, WHOLE], ids=["2 1 ranks", "2 1 4 2 ranks"])
@pytest.mark.soak
def test_other_and_other_ranks_see_every_image_once(place, parts):
    whole, changing = f"whole{len(parts)}", f"parts{len(parts)}"
    done = run(place, whole, 2, None)
    assert done.returncode == 0, done.stdout + done.stderr
    for num_ranks, stop_at in parts:
        done = run(place, changing, num_ranks, stop_at)
        assert done.returncode == (stop.STATUS if stop_at else 0), done.stdout + done.stderr
    for name in (whole, changing):
        seen = Counter(grey for note in noted(place, name) for grey in note["greys"])
        assert seen == Counter(GREYS), name
        per_step = Counter(note["step"] for note in noted(place, name) for _ in note["greys"])
        assert per_step == dict.fromkeys(range(NUM_IMAGES // BATCH), BATCH), name
    ranks_of = {note["step"]: note["ranks"] for note in noted(place, changing)}
    changes = [size for step, size in ranks_of.items() if size != ranks_of.get(step - 1)]
    assert changes == [num_ranks for num_ranks, _ in parts]
    got, expected = losses(place, changing), losses(place, whole)
    assert len(got) == NUM_IMAGES // BATCH
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.soak
def test_a_number_of_ranks_that_does_not_divide_the_batch_is_reported_with_those_that_do(place):
    done = run(place, "three", 1, "0:2")
    assert done.returncode == stop.STATUS, done.stdout + done.stderr
    done = run(place, "three", 3, None)
    assert done.returncode != 0
    assert "4 when it was saved, and 3 ranks do not divide it. Use 1, 2 or 4 ranks." in done.stderr


@pytest.mark.parametrize("num_images", [1000, 96, 31])
def test_eight_then_six_then_eight_ranks_go_through_one_stream(num_images):
    """All positions of the stream, with a global batch of 48, in micro-batches that fit the ranks."""
    batch, num_steps = 48, 63
    seen: list[tuple[int, int]] = []
    for first, last, ranks, micro in ((0, 20, 8, 6), (20, 41, 6, 4), (41, num_steps, 8, 3)):
        streams = [StepSampler(num_images, 0, batch, micro, rank, ranks) for rank in range(ranks)]
        for step in range(first, last):
            of_step = [one for stream in streams for group in stream.micro_batches(step) for one in group]
            assert len(of_step) == batch
            seen += of_step
    counts = Counter(seen)
    assert set(counts.values()) == {1}
    whole_epochs = batch * num_steps // num_images
    assert {(epoch, index) for epoch in range(whole_epochs) for index in range(num_images)} <= counts.keys()
