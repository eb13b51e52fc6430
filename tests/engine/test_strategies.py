"""The engine on real ranks against the plain single-process loop, under every ZeRO stage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import training
from ranks import run_ranks

from dsyolo.base.errors import UserError

STEPS = 4


def every_stage(folder: str) -> dict[int, dict[str, object]]:
    results = {}
    for stage in range(4):
        # another seed on each rank: the engine must start from the weights of rank 0
        seed = int(os.environ["RANK"])
        # With so few pixels BatchNorm's statistics blow rounding up; they are live in the last test.
        engine, partitions, ema, _ = training.build(stage, Path(folder, str(stage)), seed=seed, frozen=True)
        losses = training.train(engine, ema, 0, STEPS)
        live = engine.buffers.flat.clone()
        images = training.batch(99, 0).images
        before = engine.predict(images)
        with ema.swapped():
            averaged = engine.predict(images)
            measured = engine.predict_with_loss(images, training.batch(99, 0).targets)
        after = engine.predict(images)
        results[stage] = {
            "losses": losses,
            "weights": training.whole(partitions, partitions.masters()),
            "ema": training.whole(ema.partitions, ema.tensors),
            "ema_state": ema.state_dict(keep=True),
            "swap_restores": torch.equal(before, after) and torch.equal(live, engine.buffers.flat),
            "averaged": averaged,
            "measured": measured,
            "ema_elements": sum(t.numel() for t in ema.tensors),
        }
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, every_stage, str(tmp_path_factory.mktemp("stages")))


@pytest.fixture(scope="module")
def plain():
    return training.plain(STEPS, frozen=True)


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_train_as_the_plain_loop(two_ranks, plain, stage):
    got = two_ranks[0][stage]
    assert torch.tensor(got["losses"]) == pytest.approx(torch.tensor(plain["losses"]), rel=1e-5, abs=1e-6)
    assert training.relative(got["weights"], plain["weights"]) < 1e-4
    assert training.relative(got["ema"], plain["ema"]) < 1e-4


@pytest.mark.parametrize("stage", range(4))
def test_ranks_agree_to_the_last_bit(two_ranks, stage):
    first, second = two_ranks[0][stage], two_ranks[1][stage]
    assert first["losses"] == second["losses"]
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name


@pytest.mark.parametrize("stage", range(4))
def test_swapping_in_the_average_computes_with_it_and_gives_the_weights_back(two_ranks, stage):
    got = two_ranks[0][stage]
    assert got["swap_restores"]
    net = training.network().eval()
    net.load_state_dict(got["ema_state"])
    images = training.batch(99, 0).images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = net.decode(net(images))
    torch.testing.assert_close(got["averaged"], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stage", range(4))
def test_the_loss_of_a_validation_is_that_of_the_average_in_one_pass(two_ranks, stage):
    net, batch = training.network(), training.batch(99, 0)
    for got in (ranks[stage] for ranks in two_ranks):
        net.load_state_dict(got["ema_state"])
        with torch.no_grad():
            expected = training.loss_of(net).level_sums(net.eval()(batch.images), batch.targets)
        decoded, sums = got["measured"]
        assert torch.equal(decoded, got["averaged"])
        assert (sums[:, 1] > 0).all()  # objectness at every level; some levels may have no object
        assert (sums.sum(0) > 0).all()
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_the_average_is_sharded(two_ranks, stage):
    total = sum(p.numel() for p in training.network().parameters())
    for rank in range(2):
        assert two_ranks[rank][stage]["ema_elements"] < 0.51 * total


def live_batchnorm(folder: str, stage: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    engine, _, ema, _ = training.build(stage, Path(folder))
    before = engine.buffers.flat.clone()
    training.train(engine, ema, 0, 2)
    return before, {name: b.clone() for name, b in engine.buffers.named(engine.buffers.flat).items()}


@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), pytest.param(4, 0, marks=pytest.mark.soak)])
def test_statistics_of_batchnorm_move_as_on_one_rank(tmp_path, ranks, stage):
    """Each rank sees a part of the micro-batches, and all come to what one comes to that sees them in turn."""
    found = run_ranks(ranks, live_batchnorm, str(tmp_path), stage)
    plain = training.plain(2)["buffers"]
    for before, buffers in found:
        assert torch.equal(before, found[0][0])
        assert all(torch.equal(buffers[name], tensor) for name, tensor in found[0][1].items())
        assert torch.equal(buffers["detect.anchors"], plain["detect.anchors"])
        assert training.relative({name: buffers[name] for name in plain}, plain) < 1e-5
    moved = training.network().stem.bn.running_mean
    assert not torch.allclose(plain["stem.bn.running_mean"], moved, atol=1e-3)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}'])
def test_a_damaged_progress_json_is_reported_in_words(tmp_path, text):
    from dsyolo.checkpoint.manifest import read_manifest

    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    remedy = "Remove this folder to use the checkpoint before it."
    assert caught.value.problems == (f"progress.json cannot be read (it is damaged). {remedy}",)
