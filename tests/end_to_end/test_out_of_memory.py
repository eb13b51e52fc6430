"""A rank that runs out of memory: all go on with half the micro-batch, once, and the training is that of half."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from runs import CONFIG, TRAIN, arguments, environment, launch, losses, make_place

from dsyolo.base.batch import EvalBatch
from dsyolo.base.out_of_memory import is_out_of_memory
from dsyolo.cluster import watchdog
from dsyolo.config.run_config import RunConfig
from dsyolo.detection.postprocess import OomSafePredictor
from dsyolo.detection.validation_loss import BatchLoss, Prediction

GIB = 2**30
LITTLE_MEMORY = """
import os
import sys
from dsyolo import train
from dsyolo.engine.engine import Engine

plain = Engine.predict_with_loss


def predict(self, images, targets):
    if len(images) > int(os.environ["MOST"]):
        raise MemoryError
    return plain(self, images, targets)


Engine.predict_with_loss = predict
sys.exit(train.main())
"""
OPTIONS = {"imgsz": 640, "epochs": 1, "workers": 0, "val_every": 9, "memory_profile": "off"}
OPTIONS |= {"val_batch_size": 1}  # else the peak is that of the validation, whatever the micro-batch


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("memory"))


def config(place: Path, micro_batch: int) -> Path:
    path = place / f"micro{micro_batch}.json"
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": micro_batch}
    path.write_text(json.dumps({**CONFIG, **sizes}))
    return path


def run(place: Path, command: Sequence[str], limit: int | None = None) -> tuple[int, str, int]:
    """(status, what it said, most bytes of address space of a process); `limit` of these for each process."""
    log = place / "said.log"
    bounds = [["prlimit", f"--as={limit}"], []][limit is None]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*bounds, *command], env=environment(place), cwd=place, stdout=out, stderr=subprocess.STDOUT
        )
        most = 0
        while process.poll() is None:
            for one in [process.pid, *(child.pid for child in psutil.Process().children(recursive=True))]:
                most = max(most, address_space(one))
            time.sleep(0.1)
    return process.returncode, log.read_text(), most


def address_space(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPeak")), 0)


def on(ranks: int, place: Path, name: str, **options: object) -> list[str]:
    if ranks == 1:
        return [sys.executable, str(TRAIN), *arguments(place, name, **{**OPTIONS, **options})]
    return launch(place, name, **{**OPTIONS, **options})


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit of memory can be set")
@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_go_on_with_half_the_micro_batch(place, ranks):
    half, whole = config(place, 8 // ranks), config(place, 16 // ranks)
    status, said, most = run(place, on(ranks, place, f"half{ranks}", deepspeed_config=half))
    assert status == 0, said
    gap = GIB // (2 * ranks)  # of the GiB that eight images of 640 px more take
    status, said, _ = run(place, on(ranks, place, f"oom{ranks}", deepspeed_config=whole), most + gap)
    assert status == 0, said
    assert 1 <= said.count(f"ran out of memory with micro-batch {16 // ranks}: restarting") <= ranks
    assert f"with micro-batch {8 // ranks} and 2 accumulation steps; global batch 16 unchanged" in said
    assert "All ranks start again." in said
    assert losses(place, f"oom{ranks}") == losses(place, f"half{ranks}")


@pytest.mark.soak
def test_a_second_time_ends_the_run_with_a_remedy(place):
    words = on(1, place, "twice", deepspeed_config=config(place, 16), epochs=1, imgsz=64)
    status, said, most = run(place, words)
    assert status == 0, said
    words = on(1, place, "again", deepspeed_config=config(place, 16))
    status, said, _ = run(place, words, most + GIB // 8)
    assert status == watchdog.STATUS, said
    assert said.count("ran out of memory") == 2
    assert "which was halved once already. Lower train_micro_batch_size_per_gpu" in said


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.soak
def test_validation_goes_on_with_fewer_images_at_a_time(place, stage):
    """On the spot, or after all have started again, where every pass is one of all ranks."""
    script = place / "little_memory.py"
    script.write_text(LITTLE_MEMORY)
    config = place / f"zero{stage}.json"
    config.write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": stage}}))
    options = {"workers": 0, "deepspeed_config": config}
    words = arguments(place, f"validates{stage}", epochs=2, val_batch_size=6, **options)
    status, said, _ = run(place, ["env", "MOST=1", sys.executable, str(script), *words])
    assert status == 0, said
    told = re.findall(r"[Oo]ut of memory while validating (\d) images at a time: (\d) from now on", said)
    assert told == [("6", "3"), ("3", "1")]
    assert said.count("epoch 1/2") == 1
    assert ("All ranks start again." in said) == (stage == 3)
    used = RunConfig.load(place / f"runs/validates{stage}/config.yaml").val_batch_size
    assert used == {1: 6, 3: 1}[stage]
    words = arguments(place, f"nothing{stage}", epochs=1, val_batch_size=2, **options)
    status, said, _ = run(place, ["env", "MOST=0", sys.executable, str(script), *words])
    assert status == watchdog.STATUS, said
    assert "ran out of memory in validation. Use a smaller --val_batch_size" in said
    assert said.count("All ranks start again.") == (stage == 3)


def test_one_image_that_does_not_fit_and_other_errors_are_raised():
    def predict(batch):
        raise MemoryError if batch.images.max() else ValueError("other")

    told: list[str] = []
    in_parts = OomSafePredictor(predict, told.append, lambda: None)
    with pytest.raises(MemoryError):
        in_parts(EvalBatch(torch.ones(5, 1), ()))
    assert [re.findall(r"\d", line)[0] for line in told] == ["5", "2"]
    with pytest.raises(ValueError, match="other"):
        in_parts(EvalBatch(torch.zeros(5, 1), ()))
    seen: list[int] = []

    def echo(part: EvalBatch) -> Prediction:
        seen.append(len(part.images))
        loss = BatchLoss(part.ground_truths[0], (), (), len(part.ground_truths))
        return Prediction(part.images, (loss,))

    whole, batch = OomSafePredictor(echo, told.append, lambda: None), EvalBatch(torch.arange(5), (*range(5),))
    assert torch.equal(whole(batch).decoded, torch.arange(5))
    whole._limit = 2
    decoded, losses = whole(batch)
    assert torch.equal(decoded, torch.arange(5))
    assert [(one.first_image, one.num_images) for one in losses] == [(0, 2), (2, 2), (4, 1)]
    assert seen == [5, 2, 2, 1]


def test_other_errors_are_none_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("out of memory"))
