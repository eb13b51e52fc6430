"""Checks the gradients of the installed DeepSpeed against plain autograd, in about two seconds on one CPU process.

`python -m dsyolo.engine.self_test --stage 2` prints one JSON line; its exit status is 1 where gradients are wrong.

Users report wrong gradients at ZeRO 2 since DeepSpeed 0.17.6 (its issue 7718). So two micro-batches are accumulated in
buckets with borders between the parameters, and a second step shows whether anything is left of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import nn

from dsyolo.base.environment import export_to_torch, read_environment
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.gloo import send_only_shares
from dsyolo.engine.process_group import quiet_deepspeed

STAGES = (0, 1, 2, 3)
STEPS, ACCUMULATION, IMAGES, SIZE_PX = 2, 2, 2, 8
BUCKET_ELEMENTS = 640  # of 1,100: the largest weight has 576, so a border lies before and behind it
TOLERANCE = 1e-4  # of a tensor's largest update; rounding makes 1e-6, a lost micro-batch 0.1 and more


class SelfTestResult(NamedTuple):
    """What was found; `error` is the largest difference, relative to the largest update of its tensor."""

    stage: int
    deepspeed: str  # version
    error: float
    worst: str  # parameter
    ok: bool
    seconds: float


def run_self_test(stage: int) -> SelfTestResult:
    """Train three convolutions under DeepSpeed at a ZeRO stage and in plain torch, and compare the weights' updates.

    Call it in a process of its own: it starts a process group of one rank.
    """
    _start()
    import deepspeed

    begin = time.perf_counter()
    expected, found = _updates_of_torch(), _updates_of_deepspeed(stage)
    errors = {
        name: ((found[name] - update).abs().max() / update.abs().max()).item()
        for name, update in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    error = errors[worst]
    seconds = time.perf_counter() - begin
    return SelfTestResult(stage, deepspeed.__version__, error, worst, error <= TOLERANCE, round(seconds, 2))


def _start() -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # nobody connects: the store is in memory
    export_to_torch(read_environment(variables), instead=True)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    quiet_deepspeed()
    if not torch_dist.is_initialized():
        torch_dist.init_process_group("gloo", store=torch_dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)
    send_only_shares()


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 4, 3, padding=1),
    )


def _images(step: int) -> list[torch.Tensor]:
    """Return the micro-batches of a step, each (IMAGES, 3, SIZE_PX, SIZE_PX) and of a different brightness."""
    generator = torch.Generator().manual_seed(step)
    return [
        (1 + i) * torch.randn(IMAGES, 3, SIZE_PX, SIZE_PX, generator=generator) for i in range(ACCUMULATION)
    ]


def _loss(maps: torch.Tensor) -> torch.Tensor:
    return maps.square().sum() / IMAGES


def _updates_of_torch() -> dict[str, torch.Tensor]:
    network = _network()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = _copies(network)
    for step in range(STEPS):
        optimizer.zero_grad()
        for images in _images(step):
            (_loss(network(images)) / ACCUMULATION).backward()
        optimizer.step()
    return {name: value - before[name] for name, value in _copies(network).items()}


def _updates_of_deepspeed(stage: int) -> dict[str, torch.Tensor]:
    import deepspeed

    network = _network()
    before = _copies(network)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": IMAGES,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    if stage:
        config["zero_optimization"] |= {"reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": False}
    if stage == 3:
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=network, optimizer=optimizer, config=config)[0]
    internals.accumulate_in_partition(engine)  # as every run at ZeRO 2 does
    for step in range(STEPS):
        for images in _images(step):
            engine.backward(_loss(engine(images)))
            engine.step()
    with deepspeed.zero.GatheredParameters(list(network.parameters()), enabled=stage == 3):
        after = _copies(network)
    engine.destroy()
    return {name: value - before[name] for name, value in after.items()}


def _copies(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def main() -> int:
    """Print the result as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m dsyolo.engine.self_test", description=__doc__)
    parser.add_argument("--stage", type=int, choices=STAGES, default=2, help="the run's ZeRO stage")
    stage = parser.parse_args().stage
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # what DeepSpeed prints
        result = run_self_test(stage)
    print(json.dumps(result._asdict()))
    torch_dist.destroy_process_group()
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
