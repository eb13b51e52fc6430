"""A small training for tests: the same batches for an engine on any ranks, and for a loop in torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsyolo.base.batch import Batch
from dsyolo.config.deepspeed.config import check
from dsyolo.detection.assigner import Assigner
from dsyolo.detection.loss import DetectionLoss
from dsyolo.engine.optimizer import Schedule, build_optimizer
from dsyolo.models.blocks import freeze_batchnorm
from dsyolo.models.yolov5 import anchors_px, build_yolov5, level_strides

NUM_CLASSES, SIZE_PX, MICRO, GROUPS = 3, 64, 2, 4  # GROUPS micro-batches in every step
EMA_DECAY, EMA_TAU = 0.99, 5.0
RATES = 1.0  # factor of all learning rates
SGD = {"lr": 0.01, "momentum": 0.937, "nesterov": True, "weight_decay": 0.0005}


def schedule(optimizer: str = "SGD") -> Schedule:
    adam = optimizer != "SGD"
    return Schedule(
        total_steps=20,
        warmup_steps=3,
        lr=RATES * (0.001 if adam else 0.01),
        lrf=0.1,
        shape="linear",
        momentum=0.0 if adam else 0.937,
        weight_decay=0.0005 * MICRO * GROUPS / 64,
        warmup_bias_lr=RATES * 0.02,
        warmup_momentum=0.8,
        is_adam=adam,
    )


def batch(step: int, *groups: int) -> Batch:
    """Micro-batch of the images of these groups of a step: noise, with a few boxes."""
    parts = [_group(step, group) for group in groups]
    of_image = np.concatenate([part[1] + i * MICRO for i, part in enumerate(parts)])
    images, _, classes, boxes = (np.concatenate([part[k] for part in parts]) for k in range(4))
    targets = assigner()(of_image, classes, boxes.astype(np.float32), len(images), (SIZE_PX, SIZE_PX))
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), targets)


def assigner() -> Assigner:
    return Assigner(anchors_px("yolov5n").numpy(), level_strides("yolov5n"), 4.0)


def _group(step: int, group: int) -> tuple[np.ndarray, ...]:
    """(images, image of each box, classes, boxes cxcywh)."""
    rng = np.random.default_rng((step, group))
    images = rng.integers(0, 256, (MICRO, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    count = int(rng.integers(1, 6))
    boxes = np.concatenate((rng.uniform(8, 56, (count, 2)), rng.uniform(6, 50, (count, 2))), 1)
    classes = rng.integers(0, NUM_CLASSES, count)
    return images, np.sort(rng.integers(0, MICRO, count)), classes, boxes


def network(seed: int = 0):
    torch.manual_seed(seed)
    return build_yolov5("yolov5n", NUM_CLASSES)


def loss_of(net) -> DetectionLoss:
    return DetectionLoss(net.anchors, NUM_CLASSES, SIZE_PX)


def plain(
    num_steps: int,
    optimizer: str = "SGD",
    *,
    frozen: bool = False,
    at_once: int = 1,
    clipping: float = 10.0,
    autocast: bool = False,
) -> dict[str, object]:
    """The training in torch alone, in one process of one thread, `at_once` groups in a forward pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank: with live BatchNorm the order of a sum shows in the fourth digit
    try:
        return _plain(num_steps, optimizer, frozen, at_once, clipping, autocast)
    finally:
        torch.set_num_threads(threads)


def _plain(
    num_steps: int, optimizer: str, frozen: bool, at_once: int, clipping: float, autocast: bool
) -> dict[str, object]:
    net = network()
    loss, plan = loss_of(net), schedule(optimizer)
    params = SGD if optimizer == "SGD" else {"betas": (0.9, 0.999)}
    optim = build_optimizer(net, optimizer, params)
    ema = {name: p.detach().clone() for name, p in net.named_parameters()}
    losses = []
    for step in range(num_steps):
        net.train()
        if frozen:
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        plan.apply(optim, step)
        optim.zero_grad()
        batches = [batch(step, *range(first, first + at_once)) for first in range(0, GROUPS, at_once)]
        matches = sum(b.targets.num_matches for b in batches)
        images = sum(b.targets.num_images for b in batches)
        parts = torch.zeros(3)
        for one in batches:
            targets = one.targets._replace(num_matches=matches, num_images=images)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                maps = net(one.images.contiguous(memory_format=torch.channels_last))
            total, own = loss(maps, targets)
            total.backward()
            parts += own
        torch.nn.utils.clip_grad_norm_(net.parameters(), clipping)
        optim.step()
        weight = 1 - EMA_DECAY * (1 - np.exp(-(step + 1) / EMA_TAU))
        for name, p in net.named_parameters():
            ema[name].lerp_(p.detach(), weight)
        losses.append(parts.tolist())
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers() if b.is_floating_point()}
    return {"losses": losses, "weights": weights, "ema": ema, "buffers": buffers}


def build(
    stage: int,
    folder: Path,
    *,
    optimizer: str = "SGD",
    seed: int = 0,
    frozen: bool = False,
    synchronised: bool = False,
    at_once: int = 1,
    accelerator: str = "cpu",
    **json,
):
    """Engine, shards, EMA and checkpoints of this rank, as the entry builds them."""
    from dsyolo.checkpoint.checkpointer import Checkpointer
    from dsyolo.cluster.world import world_from_environment
    from dsyolo.engine import process_group
    from dsyolo.engine.batchnorm import synchronise_batchnorm
    from dsyolo.engine.ema import Ema
    from dsyolo.engine.offload import move_to_folders
    from dsyolo.engine.parallelize import parallelize

    world = world_from_environment()
    if not torch.distributed.is_initialized():
        process_group.init_process_group()
    from deepspeed.utils import groups

    groups.mpu = None  # a pipeline built before in this process would go on to define every engine's ranks
    params = SGD if optimizer == "SGD" else {"lr": 0.001, "weight_decay": 0.0005}
    ds = check(
        {
            "train_batch_size": MICRO * GROUPS,
            "train_micro_batch_size_per_gpu": MICRO * at_once,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": optimizer, "params": params},
            "gradient_clipping": 10.0,
            **json,
        },
        world_size=world.size,
        accelerator=accelerator,
    )
    net = network(seed)
    if frozen:
        freeze_batchnorm(net)
    moves = not (frozen or synchronised)
    engine, partitions, *_ = parallelize(
        net, loss_of(net), schedule(optimizer), ds, world, image_size_px=SIZE_PX, statistics_move=moves
    )
    if synchronised:
        synchronise_batchnorm(engine.network, engine.dp_group)
    ema = Ema(partitions, engine.buffers, EMA_DECAY, EMA_TAU)
    if any(ds.parallelism.offload.folders):
        move_to_folders(ds.parallelism.offload.folders, engine.ds_engine, partitions, ema.tensors, world)
    return engine, partitions, ema, Checkpointer(folder, engine, partitions, ema, world)


def train(engine, ema, start: int, stop: int, at_once: int = 1) -> list[list[float]]:
    """Steps `start` .. `stop` - 1, `at_once` groups in a micro-batch; the losses of each."""
    losses = []
    for step in range(start, stop):
        turns = range(engine.world.rank % engine.dp_size, GROUPS // at_once, engine.dp_size)
        batches = [batch(step, *range(turn * at_once, (turn + 1) * at_once)) for turn in turns]
        stats, _ = engine.train_step(batches, step)
        ema.update()
        losses.append(stats.losses.tolist())
    return losses


def whole(partitions, tensors) -> dict[str, torch.Tensor]:
    """Gathered copies by name."""
    return {name: tensor.clone() for name, tensor in partitions.gather(tensors)}


def result(engine, partitions, ema, losses) -> dict[str, object]:
    """Return what `plain` returns, for a run on ranks. All ranks must call it."""
    buffers = engine.buffers.named(engine.buffers.gathered(engine.buffers.flat))
    return {
        "losses": losses,
        "weights": whole(partitions, partitions.masters()),
        "ema": whole(ema.partitions, ema.tensors),
        "buffers": {name: b.clone() for name, b in buffers.items() if b.is_floating_point()},
    }


def relative(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of an element, relative to the largest one of its tensor."""
    assert got.keys() == expected.keys()
    return max(
        ((got[name] - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for name, b in expected.items()
    )


def differences(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of each kind: of a loss, and of a tensor's element to its largest one."""
    found = {
        "losses": max(
            abs(a - b) / max(abs(b), 1e-6)
            for x, y in zip(got["losses"], expected["losses"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
    }
    for kind in ("weights", "ema", "buffers"):
        found[kind] = relative(got[kind], expected[kind])
    return found
