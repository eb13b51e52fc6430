"""Offload to a folder: the same training as with offload to the host, from memory that is a file's."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training
from ranks import asked, long_but, run_ranks

from dsyolo.base.errors import UserError

STEPS = 3
CASES = [(1, "SGD", False), (2, "AdamW", False), (3, "SGD", True), (3, "AdamW", True), (3, "SGD", None)]
QUICK = [(3, "SGD", True)]


def zero_block(stage: int, parameters: bool | None, device: dict) -> dict:
    """`parameters`: offloaded too; None: only they are."""
    block: dict = {"stage": stage}
    if parameters is not None:
        block["offload_optimizer"] = device
    if parameters is not False:
        block["offload_param"] = device
    return block


def addresses_in_files(folder: str) -> list[range]:
    """The memory of this process that belongs to files in `folder`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if f"{folder}/dsyolo-rank" in line]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def lies_in(tensor: torch.Tensor, spans: list[range]) -> bool:
    return any(tensor.data_ptr() in span for span in spans)


def train_on(folder: str, device: dict, files: str, cases: list[tuple]) -> dict[object, dict[str, object]]:
    results = {}
    for case in cases:
        stage, optimizer, parameters = case
        place = Path(folder, f"{stage}-{optimizer}-{parameters}")
        engine, partitions, ema, checkpoints = training.build(
            stage,
            place,
            optimizer=optimizer,
            frozen=True,
            zero_optimization=zero_block(stage, parameters, device),
        )
        losses = training.train(engine, ema, 0, STEPS - 1)
        checkpoints.save(progress(STEPS - 1))
        losses += training.train(engine, ema, STEPS - 1, STEPS)
        spans = addresses_in_files(files)
        wrapper = engine.ds_engine.optimizer
        states = partitions.state()
        results[case] = {
            "losses": losses,
            "weights": training.whole(partitions, partitions.masters()),
            "ema": training.whole(ema.partitions, ema.tensors),
            "states": {name: training.whole(partitions, tensors) for name, tensors in states.items()},
            "files_left": os.listdir(files),
            "masters": [lies_in(partition.key, spans) for partition in partitions.flat],
            "holdings": [lies_in(master, spans) for master in partitions.masters()],
            "state": [lies_in(t, spans) for tensors in states.values() for t in tensors],
            "average": [lies_in(t, spans) for t in ema.tensors],
            "partitions": [
                lies_in(p.ds_tensor, spans) for p in engine.network.parameters() if hasattr(p, "ds_tensor")
            ],
        }
        engine.ds_engine.destroy()
        del engine, partitions, ema, checkpoints, wrapper, states
    return results


def progress(step: int):
    from dsyolo.checkpoint.train_state import TrainState

    return TrainState(total_steps=20, epochs=1, num_images=160, global_batch=8, seed=0, step=step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def on_host(request, folder):
    return run_ranks(
        2, train_on, str(folder / "host"), {"device": "cpu"}, str(folder), asked(request, "case")
    )


@pytest.fixture(scope="module")
def in_files(request, folder):
    files = folder / "nvme"
    files.mkdir()
    return run_ranks(
        2,
        train_on,
        str(folder / "files"),
        {"device": "nvme", "nvme_path": str(files)},
        str(files),
        asked(request, "case"),
    )


@pytest.mark.parametrize("case", long_but(QUICK, CASES), ids=str)
def test_bit_for_bit_the_training_of_offload_to_the_host(on_host, in_files, case):
    expected, got = on_host[0][case], in_files[0][case]
    assert got["losses"] == expected["losses"]
    for kind in ("weights", "ema"):
        assert all(torch.equal(got[kind][name], value) for name, value in expected[kind].items()), kind
    assert got["states"].keys() == expected["states"].keys()
    for key, tensors in expected["states"].items():
        assert all(torch.equal(got["states"][key][name], value) for name, value in tensors.items()), key


@pytest.mark.parametrize("case", long_but(QUICK, CASES), ids=str)
@pytest.mark.parametrize("rank", range(2))
def test_the_memory_is_that_of_files_without_a_name(on_host, in_files, case, rank):
    got, host = in_files[rank][case], on_host[rank][case]
    assert got["files_left"] == []  # nothing stays, however the run ends
    _, _, parameters = case
    if parameters is not None:
        for kind in ("masters", "holdings", "state", "average"):
            assert got[kind], kind
            assert all(got[kind]), kind
            assert not any(host[kind]), kind
    if parameters is not False:
        assert got["partitions"]
        assert all(got["partitions"])
        assert not any(host["partitions"])


def resume(folder: str, device: dict, files: str, cases: list[tuple]) -> dict[object, object]:
    from dsyolo.checkpoint.manifest import all_checkpoints

    results = {}
    for case in cases:
        stage, optimizer, parameters = case
        place = Path(folder, f"{stage}-{optimizer}-{parameters}")
        engine, partitions, ema, checkpoints = training.build(
            stage,
            place,
            optimizer=optimizer,
            frozen=True,
            seed=5,
            zero_optimization=zero_block(stage, parameters, device),
        )
        checkpoints.load(all_checkpoints(place)[-1])
        losses = training.train(engine, ema, STEPS - 1, STEPS)
        spans = addresses_in_files(files)
        in_file = [lies_in(t, spans) for tensors in partitions.state().values() for t in tensors]
        results[case] = losses, training.whole(partitions, partitions.masters()), in_file
    return results


def test_a_run_resumes_into_files_from_a_checkpoint_of_another_offload(on_host, in_files, folder):
    files = folder / "again"
    files.mkdir()
    device = {"device": "nvme", "nvme_path": str(files)}
    cases = [case for case in on_host[0] if case[2] is not None]
    found = run_ranks(2, resume, str(folder / "host"), device, str(files), cases)[0]
    assert list(found) == cases
    for case, (losses, weights, in_file) in found.items():
        assert losses == on_host[0][case]["losses"][-1:]
        assert all(torch.equal(weights[name], value) for name, value in on_host[0][case]["weights"].items())
        assert in_file
        assert all(in_file)


def full_disk(folder: str) -> str:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        if os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = refuse
    zero = zero_block(2, False, {"device": "nvme", "nvme_path": folder})
    try:
        training.build(2, Path(folder), zero_optimization=zero)
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_of_one_rank_is_reported_on_all_before_the_first_step(tmp_path):
    first, second = run_ranks(2, full_disk, str(tmp_path))
    assert first == second
    assert "No space left on device (rank 1 needs " in first
    assert "Make room, or name another nvme_path." in first
    assert os.listdir(tmp_path) == []


def test_what_is_written_to_the_memory_is_written_to_the_file(tmp_path, monkeypatch):
    from dsyolo.engine import offload as module

    monkeypatch.setattr(module.os, "unlink", lambda path: None)
    tensors = [torch.arange(5.0), torch.arange(3).to(torch.bfloat16)]
    same = tensors[0].view(5)
    problems: list[str] = []
    module._move([*tensors, same], str(tmp_path), SimpleNamespace(rank=0), problems)
    assert problems == []
    same[0] = 7
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    assert len(content) == 2 * module.ALIGNMENT
    assert torch.frombuffer(content, dtype=torch.float32, count=5).tolist() == [7, 1, 2, 3, 4]
    assert torch.frombuffer(content, dtype=torch.bfloat16, count=3, offset=64).tolist() == [0, 1, 2]
