"""Images that vanish while a training runs are counted, and end it on all ranks above a share of 1 %."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from image_files import NUM_CLASSES, add
from ranks import run_ranks
from runs import make_place, rows, together
from torch.utils.data import DataLoader

from dsyolo.cluster.world import world_from_environment
from dsyolo.data.dataset import DetectionDataset
from dsyolo.data.index_builder import build_index
from dsyolo.data.sampler import StepSampler
from dsyolo.data.workers import worker_options
from dsyolo.engine import process_group
from dsyolo.trainer.hooks.base import StopTraining
from dsyolo.trainer.hooks.lost_images_hook import LOST, LostImagesHook

ANY: Any = None  # a step's result, or a validation, which the hook does not read


def dataset(root: Path, count: int) -> DetectionDataset:
    for number in range(count):
        add(root, f"{number}.png")
    found = build_index([root / "images"], NUM_CLASSES, root / "cache", progress=False)
    return DetectionDataset(found, 64)


def reads(data: DetectionDataset, num_good: int, num_bad: int) -> None:
    for number in range(num_good + num_bad):
        data.counts.add(number % len(data), number < num_good)


def opened(
    root: Path, num_images: int, dp_rank: int = 0, dp_size: int = 1, world: Any = None
) -> LostImagesHook:
    data = dataset(root, 3)
    sampler = StepSampler(num_images, 0, dp_size, 1, dp_rank, dp_size)
    hook = LostImagesHook()
    hook.trainer = SimpleNamespace(  # type: ignore[assignment]
        world=world or SimpleNamespace(size=1, is_main_process=True),
        data=SimpleNamespace(train_set=data, val_set=dataset(root / "val", 3), sampler=sampler),
        state=SimpleNamespace(step=0),
        epoch=0,
    )
    hook.open()
    hook.before_epoch()
    return hook


def test_reads_are_counted_over_worker_processes(tmp_path):
    data = dataset(tmp_path, 6)
    for number in (1, 4, 5):
        (tmp_path / "images" / f"{number}.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loads = DataLoader(Loads(data), batch_size=None, **worker_options(2))
        assert list(loads) == list(range(6))
        data.load(0)
    total = data.counts.total()
    assert (total.num_reads, total.num_failed) == (7, 3)
    assert total.a_failed == 5


class Loads:
    def __init__(self, data: DetectionDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        if index >= len(self.data):
            raise IndexError
        self.data.load(index)
        return index


def test_each_process_names_the_first_few(tmp_path):
    data = dataset(tmp_path, 6)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index in (0, 0, 1, 2, 3, 4, 5):
            data.load(index)
    assert len(caught) == 3
    assert "further ones are only counted" in str(caught[-1].message)
    assert data.counts.total().num_failed == 7


@pytest.mark.parametrize(
    ("num_images", "num_good", "num_bad", "ends"),
    [
        (24, 3, 0, False),
        (24, 3, 1, True),  # 1 of at least 24
        (400, 3, 4, False),  # 4 of at least 400: not above 1 %
        (400, 3, 5, True),
        (400, 792, 8, False),  # mosaics read more than an epoch has: 8 of 800
        (400, 791, 9, True),
    ],
)
def test_the_share_is_of_the_reads_and_at_least_of_the_epoch(tmp_path, num_images, num_good, num_bad, ends):
    hook = opened(tmp_path, num_images)
    reads(hook.trainer.data.train_set, num_good, num_bad)
    hook.after_step(ANY)
    if not ends:
        hook.after_step(ANY)
        hook.after_epoch()
        return
    with pytest.raises(
        StopTraining, match=rf"{num_bad} of {num_good + num_bad} reads of images failed"
    ) as caught:
        hook.after_step(ANY)
    assert caught.value.end.status == LOST == 66
    assert "images" in caught.value.end.message
    assert "--resume auto" in caught.value.end.message


def test_each_epoch_counts_anew_and_reports_what_is_below(tmp_path, caplog):
    hook = opened(tmp_path, 400)
    for _ in range(3):  # 4 of 400 in each
        hook.before_epoch()
        reads(hook.trainer.data.train_set, 396, 4)
        hook.after_step(ANY)
        hook.after_epoch()
    assert [record.message for record in caplog.records] == [
        "Epoch 1: 4 of 400 reads of images failed; grey images took their place."
    ] * 3


def test_what_workers_read_ahead_between_epochs_counts_in_the_next(tmp_path):
    hook = opened(tmp_path, 400)
    hook.after_step(ANY)
    hook.after_epoch()
    reads(hook.trainer.data.train_set, 0, 5)  # while it validates
    hook.before_epoch()
    hook.after_step(ANY)
    with pytest.raises(StopTraining):
        hook.after_epoch()


def test_a_validation_of_grey_images_ends_the_run(tmp_path):
    hook = opened(tmp_path, 400)
    reads(hook.trainer.data.val_set, 200, 2)
    hook.after_validation(ANY)
    reads(hook.trainer.data.val_set, 195, 5)
    with pytest.raises(StopTraining, match="5 of 200 reads"):
        hook.after_validation(ANY)


def on_a_rank(root: str, num_images: int, failures: tuple[int, int]) -> tuple[int, str]:
    """Steps until the hook ends the run: 100 reads a step, of which some fail on this rank. Its step and message."""
    world = world_from_environment()
    process_group.init_process_group()
    hook = opened(Path(root, str(world.rank)), num_images, world.rank, world.size, world)
    for step in range(1, 8):
        hook.trainer.state.step = step
        reads(hook.trainer.data.train_set, 100 - failures[world.rank], failures[world.rank])
        try:
            hook.after_step(ANY)
        except StopTraining as stop:
            hook.finish()
            return step, stop.end.message.split(" reads")[0]
    hook.finish()
    return 0, ""


@pytest.mark.parametrize(
    ("num_images", "failures", "expected"),
    [
        (100, (0, 3), (2, "The training stops at step 2: 3 of 200")),  # of all reads
        (100, (0, 1), (0, "")),  # 0.5 % of all reads, and 7 failures are no proof against one rank
        # 0.9 % of all: rank 1 alone is above, once it has ten failures and they are 1 % of its own 500 samples
        (1000, (0, 4), (4, "The training stops at step 4: 12 of 600")),
    ],
)
def test_both_ranks_end_after_the_same_step(tmp_path, num_images, failures, expected):
    assert run_ranks(2, on_a_rank, str(tmp_path), num_images, failures) == [expected] * 2


HOOK = """
from dsyolo.engine import process_group
from dsyolo.trainer.hooks.base import Hook

class Vanish(Hook):
    def between_epochs(self):
        if self.trainer.epoch == 0 and self.trainer.world.is_main_process:
            for path in (self.trainer.spec.data.path.parent / "images/train").iterdir():
                path.unlink()
"""


def test_a_run_whose_images_vanish_ends_with_its_own_status(tmp_path):
    place = make_place(tmp_path)
    (place / "vanish.py").write_text(HOOK, encoding="utf-8")
    done = together(place, "lost", hook=f"{place / 'vanish.py'}:Vanish", epochs=30)
    output = done.stdout + done.stderr
    assert done.returncode == LOST, output
    assert output.count("reads of images failed") == 1, output
    assert "Traceback" not in output
    assert 3 <= rows(place, "lost", "step")[-1]["step"] < 12
    assert (place / "runs/lost/checkpoints/step_00000003").is_dir()
