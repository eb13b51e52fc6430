"""The sampler and the training loader: which image comes when, on which rank, whoever makes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dsyolo.base.batch import Batch
from dsyolo.config.recipe import preset
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.index_builder import build_index
from dsyolo.data.loader import EvalLoader, TrainLoader, stack_images
from dsyolo.data.sampler import StepSampler
from dsyolo.data.synthetic import draw_sample
from dsyolo.detection.assigner import Assigner
from dsyolo.models.yolov5 import anchors_px, level_strides

SIZE_PX, STRIDE = 64, 32
RECIPE = preset("low").model_copy(update={"mosaic": 0.7, "mixup": 0.3})
PLAIN = dict.fromkeys(("hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr", "mosaic", "mixup"), 0.0)
ASSIGN = Assigner(anchors_px("yolov5n").numpy(), level_strides("yolov5n"), 4.0)

# N images, global batch G, micro-batch: N over, under, and a multiple of G
RUNS = [(23, 8, 2), (5, 16, 4), (16, 8, 2), (1, 4, 1), (10, 3, 3)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DetectionDataset:
    folder = tmp_path_factory.mktemp("sample")
    draw_sample(folder / "data", num_images=16, val_share=0.25, image_size=(120, 100))
    found = build_index([folder / "data" / "images" / "train"], 5, folder / "cache", progress=False)
    assert len(found) == 12
    return DetectionDataset(found, SIZE_PX)


# ---- the sampler


def groups(sampler: StepSampler, first: int, stop: int) -> list[list[tuple[int, int]]]:
    return [group for step in range(first, stop) for group in sampler.micro_batches(step)]


@pytest.mark.parametrize(("num_images", "global_batch", "micro"), RUNS)
def test_every_image_comes_once_an_epoch(num_images, global_batch, micro):
    sampler = StepSampler(num_images, 3, global_batch, micro, 0, 1)
    epochs = 6
    stop = sampler.epoch_start_step(epochs)
    seen = [sample for group in groups(sampler, 0, stop) for sample in group]
    counts = Counter(seen)
    assert set(counts.values()) == {1}
    assert {s for s in counts if s[0] < epochs} == {(e, i) for e in range(epochs) for i in range(num_images)}
    assert len(seen) == stop * global_batch  # every batch is full
    assert len(seen) < epochs * num_images + global_batch  # and no step too many
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)


@pytest.mark.parametrize(("num_images", "global_batch", "micro"), RUNS)
def test_the_steps_of_epochs_follow_each_other_without_gap(num_images, global_batch, micro):
    sampler = StepSampler(num_images, 3, global_batch, micro, 0, 1)
    assert sampler.epoch_start_step(0) == 0
    for epoch in range(1, 8):
        first = sampler.epoch_start_step(epoch)
        assert first >= sampler.epoch_start_step(epoch - 1)
        assert sampler.at(first * global_batch)[0] >= epoch  # nothing older is left
        assert sampler.at((first - 1) * global_batch)[0] < epoch


@pytest.mark.parametrize(("num_images", "global_batch", "micro"), [(23, 8, 2), (5, 16, 4), (3, 8, 1)])
def test_ranks_share_the_same_groups(num_images, global_batch, micro):
    whole = groups(StepSampler(num_images, 3, global_batch, micro, 0, 1), 0, 5)
    for world_size in (1, 2, 4):
        ranks = [
            StepSampler(num_images, 3, global_batch, micro, rank, world_size) for rank in range(world_size)
        ]
        for step in range(5):
            parts = [list(sampler.micro_batches(step)) for sampler in ranks]
            assert {len(part) for part in parts} == {global_batch // micro // world_size}
            dealt = [group for turn in zip(*parts, strict=True) for group in turn]
            per_step = global_batch // micro
            assert dealt == whole[step * per_step : (step + 1) * per_step]


def test_the_order_is_of_the_seed_and_the_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = StepSampler(40, seed, 4, 4, 0, 1)
        return [sampler.at(epoch * 40 + place)[1] for place in range(40)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert order(0, 0) != sorted(order(0, 0))


# ---- training batches


def make_loader(
    dataset: DetectionDataset,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    micro: int = 2,
    recipe: dict[str, Any] | None = None,
    size_px: int = SIZE_PX,
    num_epochs: int | None = None,
) -> TrainLoader:
    return TrainLoader(
        dataset,
        StepSampler(len(dataset), seed, 4, micro, rank, world_size),
        RECIPE.model_copy(update=recipe),
        ASSIGN,
        image_size_px=size_px,
        stride=STRIDE,
        num_workers=num_workers,
        pin_memory=False,
        num_epochs=num_epochs,
    )


def run(loader: TrainLoader, epochs: range, start: int | None = None) -> list[list[Batch]]:
    """The micro-batches of each step, as the loop of the entry asks for them."""
    steps: list[list[Batch]] = []
    first = loader.sampler.epoch_start_step(epochs[0]) if start is None else start
    for epoch in epochs:
        steps += loader.steps(epoch, first)
        first = max(first, loader.sampler.epoch_start_step(epoch + 1))
    loader.close()
    return steps


def assert_same(a: list[list[Batch]], b: list[list[Batch]]) -> None:
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert len(one) == len(other) > 0
        for left, right in zip(one, other, strict=True):
            assert left.images.equal(right.images)
            assert all(x.equal(y) for x, y in zip(left.targets, right.targets, strict=True))


def test_the_last_epochs_have_no_mosaic_and_those_before_stay_as_they_were(dataset):
    recipe = {"mosaic": 1.0, "mixup": 0.5}
    whole, plain = (
        run(make_loader(dataset, recipe=one, num_epochs=4), range(4))
        for one in (recipe, {**recipe, "mosaic": 0.0})
    )
    closed = run(make_loader(dataset, recipe={**recipe, "close_mosaic": 2}, num_epochs=4), range(4))
    first_plain = StepSampler(len(dataset), 0, 4, 2, 0, 1).epoch_start_step(2)
    assert_same(closed[: first_plain - 1], whole[: first_plain - 1])
    assert_same(closed[first_plain:], plain[first_plain:])
    assert not closed[-1][0].images.equal(whole[-1][0].images)
    never = run(make_loader(dataset, recipe={**recipe, "close_mosaic": 9}, num_epochs=4), range(4))
    assert_same(never, plain)


def test_batches_do_not_depend_on_the_number_of_workers(dataset):
    alone = run(make_loader(dataset), range(2))
    assert len(alone) == 6  # 12 images, 4 a step, 2 epochs
    assert len({batch.images.sum().item() for step in alone for batch in step}) == 12  # none comes twice
    for num_workers in (1, 2):
        assert_same(alone, run(make_loader(dataset, num_workers=num_workers), range(2)))


def test_a_restart_at_any_step_goes_on_with_the_same_batches(dataset):
    whole = run(make_loader(dataset), range(3))
    for start in range(1, len(whole)):
        assert_same(whole[start:], run(make_loader(dataset), range(start // 3, 3), start))


def test_one_loader_can_be_asked_for_any_step(dataset):
    loader = make_loader(dataset)
    whole = run(loader, range(2))
    assert_same(whole[1:3], list(loader.steps(0, 1)))
    assert_same(whole[0:3], list(loader.steps(0, 0)))
    assert_same(whole[4:6], list(loader.steps(1, 4)))
    half = list(islice(loader.steps(1, 3), 1))  # left in the middle of an epoch
    assert_same(whole[3:4], half)
    assert_same(whole[4:6], list(loader.steps(1, 4)))


def test_workers_go_on_over_steps_and_epochs(dataset, monkeypatch):
    opened, really_open = [], TrainLoader._open

    def spy(self, step):
        opened.append(step)
        return really_open(self, step)

    monkeypatch.setattr(TrainLoader, "_open", spy)
    loader = make_loader(dataset)
    assert len(run(loader, range(3))) == 9
    assert opened == [0]
    list(loader.steps(1, 4))  # after `close`, and in the middle
    assert opened == [0, 4]


def test_ranks_together_make_the_batches_of_one(dataset):
    whole = run(make_loader(dataset), range(2))
    ranks = [run(make_loader(dataset, rank=rank, world_size=2), range(2)) for rank in range(2)]
    dealt = [[one[0], other[0]] for one, other in zip(*ranks, strict=True)]
    assert_same(whole, dealt)


def test_another_seed_makes_other_batches(dataset):
    one, other = (run(make_loader(dataset, seed=seed), range(1)) for seed in (0, 1))
    assert not one[0][0].images.equal(other[0][0].images)


def test_an_image_is_another_sample_in_every_epoch(dataset):
    """At batch size 1 without mosaics, the sample of one image is compared over epochs."""
    loader = make_loader(dataset, micro=1)
    sampler = loader.sampler
    seen: dict[int, list[torch.Tensor]] = {}
    for step, batches in enumerate(run(loader, range(2))):
        for (_, index), batch in zip(
            [sample for group in sampler.micro_batches(step) for sample in group], batches, strict=True
        ):
            seen.setdefault(index, []).append(batch.images)
    assert len(seen) == 12
    assert all(len(pair) == 2 and not pair[0].equal(pair[1]) for pair in seen.values())


def test_a_batch_holds_the_images_and_targets_of_its_samples(dataset):
    """Without augmentation the batch can be made by hand."""
    loader = make_loader(dataset, recipe=PLAIN)
    sampler = loader.sampler
    for step, batches in enumerate(run(loader, range(1))):
        for group, batch in zip(sampler.micro_batches(step), batches, strict=True):
            assert batch.images.shape == (2, 3, SIZE_PX, SIZE_PX)
            assert batch.images.dtype == torch.uint8
            rows = []
            for position, (_, index) in enumerate(group):
                sample = dataset.load(index)
                high, wide = sample.image.shape[:2]
                top, left = (SIZE_PX - high) // 2, (SIZE_PX - wide) // 2
                own = batch.images[position].permute(1, 2, 0).numpy()
                assert (own[top : top + high, left : left + wide] == sample.image).all()
                for box, kind in zip(sample.boxes_xyxy, sample.classes, strict=True):
                    x, y = (box[:2] + box[2:]) / 2 + (left, top)
                    rows.append((position, kind, x, y, *(box[2:] - box[:2])))
            labels = np.array(rows, np.float32)
            images, classes = labels[:, 0].astype(np.int64), labels[:, 1].astype(np.int64)
            expected = ASSIGN(images, classes, labels[:, 2:], 2, (SIZE_PX, SIZE_PX))
            assert batch.targets.num_matches.equal(expected.num_matches)
            assert batch.targets.num_images == 2
            assert batch.targets.cells.equal(expected.cells)
            assert batch.targets.classes.equal(expected.classes)
            torch.testing.assert_close(batch.targets.boxes, expected.boxes, rtol=1e-4, atol=1e-4)


def test_images_lie_channels_last_in_memory_without_a_copy(dataset):
    for batch, _ in run(make_loader(dataset), range(1)):
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        same = batch.images.contiguous(memory_format=torch.channels_last)
        assert same.data_ptr() == batch.images.data_ptr()
    image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    batch = stack_images([image])
    assert batch.shape == (1, 3, 4, 5)
    assert batch[0, 2, 3, 1] == image[3, 1, 2]
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_waiting_is_measured_and_taken_once(dataset):
    loader = make_loader(dataset)
    run(loader, range(1))
    assert loader.take_wait_s() > 0
    assert loader.take_wait_s() == 0


# ---- multi-scale


def test_sizes_are_pure_multiples_of_the_stride_over_the_whole_range(dataset):
    loader = make_loader(dataset, recipe={"multi_scale": True}, size_px=256)
    sizes = [loader.size_px(step) for step in range(300)]
    assert sizes == [
        make_loader(dataset, recipe={"multi_scale": True}, size_px=256).size_px(step) for step in range(300)
    ]
    assert set(sizes) == {STRIDE * k for k in range(4, 13)}  # 0.5 to 1.5 of 256
    assert min(Counter(sizes).values()) > 10
    other = make_loader(dataset, recipe={"multi_scale": True}, size_px=256, seed=1)
    assert sizes != [other.size_px(step) for step in range(300)]
    assert {make_loader(dataset, size_px=256).size_px(step) for step in range(9)} == {256}


def test_a_step_has_one_size_on_all_ranks_and_micro_batches(dataset):
    for rank in range(2):
        loader = make_loader(dataset, recipe={"multi_scale": True}, rank=rank, world_size=2, micro=1)
        sides = []
        for step, batches in enumerate(run(loader, range(3))):
            shapes = {tuple(batch.images.shape) for batch in batches}
            assert shapes == {(1, 3, loader.size_px(step), loader.size_px(step))}
            sides.append(loader.size_px(step))
        assert len(set(sides)) > 1


# ---- validation batches: more in test_eval_loader.py


def test_validation_reads_a_real_data_set(dataset):
    loader = EvalLoader(
        dataset,
        image_size_px=64,
        stride=32,
        batch_size=5,
        rank=0,
        world_size=1,
        num_workers=0,
        pin_memory=False,
    )
    ground_truths = [ground_truth for batch in loader for ground_truth in batch.ground_truths]
    assert sorted(ground_truth.image_id for ground_truth in ground_truths) == list(range(12))
    for ground_truth in ground_truths:
        size_hw, boxes, classes = dataset.ground_truth(ground_truth.image_id)
        assert ground_truth.size_hw == size_hw
        assert (ground_truth.boxes_xyxy == boxes).all()
        assert (ground_truth.classes == classes).all()


FORKS_THAT_HANG = """
import os, sys, time
from pathlib import Path
from typing import Any
from torch.utils.data import DataLoader
from dsyolo.data import workers

workers.ALIVE_S = 1
hung = Path(sys.argv[1])

def hang_the_first():
    if len(list(hung.iterdir())) < int(sys.argv[2]):
        (hung / str(os.getpid())).touch()
        time.sleep(60)

os.register_at_fork(after_in_child=hang_the_first)
print(sum(int(batch) for batch in DataLoader(range(10), batch_size=None, **workers.worker_options(2))))
"""


@pytest.mark.parametrize(("num_hung", "message"), [(0, "45"), (2, "45"), (3, "3 loader workers in a row")])
def test_a_worker_that_hangs_in_its_fork_is_forked_again(tmp_path, num_hung, message):
    command = [sys.executable, "-c", FORKS_THAT_HANG, str(tmp_path), str(num_hung)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert message in done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) == num_hung
    for name in tmp_path.iterdir():
        assert not Path("/proc", name.name).exists()


OPENCV_THREADS = """
import cv2, numpy as np
from torch.utils.data import DataLoader
from dsyolo.data import workers

class Resized:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return cv2.resize(np.full((2000, 2000, 3), index, np.uint8), (1500, 1500), interpolation=cv2.INTER_CUBIC)[0, 0, 0]

options = workers.worker_options(2)
cv2.setNumThreads(4)
assert Resized()[3] == 3  # starts OpenCV's threads, which a fork lacks
print(sum(int(batch) for batch in DataLoader(Resized(), batch_size=None, **options)))
"""


def test_workers_do_not_wait_for_the_opencv_threads_of_their_parent():
    done = subprocess.run([sys.executable, "-c", OPENCV_THREADS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "6\n", done.stderr


KILLED = """
import os, signal, sys, time
from pathlib import Path
from torch.utils.data import DataLoader
from dsyolo.data import workers

settle = workers._settle

def settle_slowly(worker):
    Path(sys.argv[1]).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(1.5)
    settle(worker)

workers._settle = settle_slowly
batches = iter(DataLoader(range(100), **workers.worker_options(1)))
while not Path(sys.argv[1]).exists() or not Path(sys.argv[1]).read_text(encoding="utf-8"):
    time.sleep(0.01)
if sys.argv[2] == "settled":
    next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel ends workers on Linux only")
@pytest.mark.parametrize("worker", ["starting", "settled"])
def test_a_worker_ends_with_its_rank_even_if_it_is_killed_while_the_worker_starts(tmp_path, worker):
    """Torch asks a worker's parent for its id once the worker is ready: too late for one that is an orphan by then."""
    pid_file = tmp_path / "pid"
    done = subprocess.run([sys.executable, "-c", KILLED, str(pid_file), worker], timeout=60)
    assert done.returncode == -signal.SIGKILL
    pid, end = int(pid_file.read_text(encoding="utf-8")), time.monotonic() + 12  # torch's own check takes 5 s
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.1)
    is_left = runs(pid)
    if is_left:
        os.kill(pid, signal.SIGKILL)
    assert not is_left


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
