"""Checks the gradients of the installed DeepSpeed against plain autograd, in about two seconds on one CPU process.

Users report wrong gradients at ZeRO 2 since DeepSpeed 0.17.6 (its issue 7718). So two micro-batches are accumulated in
buckets with borders between the parameters, and a second step shows whether anything is left of the first.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import nn

from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.process_group import join_store

STAGES = (0, 1, 2, 3)
STEPS, ACCUMULATION, IMAGES, SIZE_PX = 2, 2, 2, 8
BUCKET_ELEMENTS = 640  # the network has 1,100, its largest weight 576: a border lies before and behind that
TOLERANCE = 1e-4  # share of a tensor's largest update; rounding makes 1e-6, a lost micro-batch 0.1 and more


class SelfTestResult(NamedTuple):
    """The result; `error` is the largest difference, relative to the largest update of its tensor."""

    stage: int
    deepspeed: str  # version
    error: float
    worst: str  # parameter
    ok: bool
    seconds: float


def run_self_test(stage: int) -> SelfTestResult:
    """Compare the weights' updates under DeepSpeed at a ZeRO stage and in plain torch, in a process of its own."""
    join_store("gloo", torch_dist.HashStore())
    import deepspeed

    begin = time.perf_counter()
    expected, found = _updates_of_torch(), _updates_of_deepspeed(stage)
    errors = {
        name: ((found[name] - update).abs().max() / update.abs().max()).nan_to_num(float("inf")).item()
        for name, update in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    error = errors[worst]
    seconds = time.perf_counter() - begin
    return SelfTestResult(stage, deepspeed.__version__, error, worst, error <= TOLERANCE, round(seconds, 2))


def _network() -> nn.Module:
    torch.manual_seed(0)
    first, second, third = (nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 8), (8, 8), (8, 4)))
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)


def _images(step: int) -> list[torch.Tensor]:
    """Return the micro-batches of a step, each (IMAGES, 3, SIZE_PX, SIZE_PX) and of a different brightness."""
    generator, shape = torch.Generator().manual_seed(step), (IMAGES, 3, SIZE_PX, SIZE_PX)
    return [(1 + i) * torch.randn(shape, generator=generator) for i in range(ACCUMULATION)]


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
    zero: dict[str, Any] = {"stage": stage}
    if stage:
        zero |= {"reduce_bucket_size": BUCKET_ELEMENTS, "overlap_comm": False}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": IMAGES,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
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
    """Print the result as one JSON line. Return 1 where gradients are wrong."""
    parser = argparse.ArgumentParser(prog="python -m dsyolo.engine.self_test", description=__doc__)
    parser.add_argument("--stage", type=int, choices=STAGES, default=2, help="the run's ZeRO stage")
    stage = parser.parse_args().stage
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # what DeepSpeed prints
        result = run_self_test(stage)
    sys.stdout.write(json.dumps(result._asdict()) + "\n")
    torch_dist.destroy_process_group()
    return 0 if result.ok else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at the interpreter's end threads of DeepSpeed sometimes abort it
