"""The pipeline on real ranks against the plain single-process loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training
from ranks import run_ranks

STEPS = 3
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
TWO = {"pipeline": {"stages": 2}}
# (ZeRO stage, JSON) by name, for two ranks; the clipping is small enough to bite, over both stages.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0": (0, {**TWO, "gradient_clipping": 0.05}),
    "zero1": (1, {**TWO, "gradient_clipping": 0.05}),
    "cut_where_four_tensors_live": (
        0,
        {"pipeline": {"stages": 2, "partition": [11]}, "gradient_clipping": 0.05},
    ),
    "a_stage_without_batchnorm": (
        1,
        {"pipeline": {"stages": 2, "partition": [24]}, "gradient_clipping": 0.05},
    ),
    "autocast": (1, {**TWO, **AUTOCAST}),
    "bf16": (1, {**TWO, "bf16": {"enabled": True}}),
}
BF16 = 2**-8  # half a unit in the last place of bfloat16, relative


def train_one(folder: str, name: str) -> dict[str, Any]:
    stage, json = CASES[name]
    frozen = name in ("autocast", "bf16")  # live statistics blow the rounding of bf16 up
    engine, partitions, ema, _ = training.build(stage, Path(folder), frozen=frozen, **json)
    losses = training.train(engine, ema, 0, STEPS)
    got = training.result(engine, partitions, ema, losses)
    images = training.batch(99, 0).images
    with ema.swapped():
        got["averaged"], got["measured"] = engine.predict_with_loss(images, training.batch(99, 0).targets)
    got["state"] = ema.state_dict(keep=True)
    got["mine"] = sum(p.numel() for p in engine.network.parameters())
    return got


def train_all(folder: str) -> dict[str, dict[str, Any]]:
    return {name: train_one(folder, name) for name in CASES}


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    return run_ranks(2, train_all, str(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def plain():
    return {clip: training.plain(STEPS, clipping=clip) for clip in (10.0, 0.05)}


@pytest.mark.parametrize(
    "name", ["zero0", "zero1", "cut_where_four_tensors_live", "a_stage_without_batchnorm"]
)
def test_two_stages_train_as_the_plain_loop(two_stages, plain, name):
    """BatchNorm is live: a replica's micro-batches pass through it in the plain loop's order."""
    found = training.differences(two_stages[0][name], plain[0.05])
    assert found["losses"] < 1e-5
    assert max(found.values()) < 1e-4


def test_two_stages_in_autocast_train_as_the_plain_loop_does(two_stages):
    found = training.differences(two_stages[0]["autocast"], training.plain(STEPS, autocast=True, frozen=True))
    assert found["losses"] < 1e-5
    assert max(found.values()) < 1e-4


def test_bf16_weights_change_the_losses_by_their_rounding(two_stages):
    found = training.differences(two_stages[0]["bf16"], training.plain(STEPS, frozen=True))
    assert found["losses"] < BF16


@pytest.mark.parametrize("name", CASES)
def test_every_rank_predicts_with_the_whole_average(two_stages, name):
    first, second = (rank[name] for rank in two_stages)
    assert torch.equal(first["averaged"], second["averaged"])
    net = training.network().eval()
    net.load_state_dict(first["state"])
    images = training.batch(99, 0).images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        maps = net(images)
        expected = net.decode(maps)
        losses = training.loss_of(net).level_sums(maps, training.batch(99, 0).targets)
    bound = 1e-4 if name in ("zero0", "zero1", "cut_where_four_tensors_live") else 0.05
    torch.testing.assert_close(first["averaged"], expected, rtol=bound, atol=bound * 32)
    torch.testing.assert_close(first["measured"], losses, rtol=bound, atol=bound)
    assert torch.equal(first["measured"], second["measured"])


def test_a_stage_holds_its_own_parameters_only(two_stages):
    total = sum(p.numel() for p in training.network().parameters())
    held = [rank["zero0"]["mine"] for rank in two_stages]
    assert sum(held) == total
    assert min(held) > 0


def two_by_two(folder: str) -> dict[str, Any]:
    engine, partitions, ema, _ = training.build(1, Path(folder), frozen=True, gradient_clipping=0.05, **TWO)
    losses = training.train(engine, ema, 0, STEPS)
    return training.result(engine, partitions, ema, losses)


@pytest.mark.soak  # a row of the table of strategies
def test_two_stages_of_two_data_parallel_ranks_train_as_the_plain_loop(tmp_path):
    ranks = run_ranks(4, two_by_two, str(tmp_path))
    found = training.differences(ranks[0], training.plain(STEPS, frozen=True, clipping=0.05))
    assert found["losses"] < 1e-5
    assert max(found.values()) < 1e-4
    for other in ranks[1:]:
        assert other["losses"] == ranks[0]["losses"]
