"""A small training for tests: the same batches for an engine on any ranks, and for a loop in torch alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dsyolo.assign import Assigner
from dsyolo.batch import Batch
from dsyolo.ds_config import check
from dsyolo.loss import DetectionLoss
from dsyolo.model.yolov5 import anchors_px, build_yolov5, level_strides
from dsyolo.optim import Schedule, build_optimizer

NUM_CLASSES, SIZE_PX, MICRO, GROUPS = 3, 64, 2, 4  # GROUPS micro-batches in every step
EMA_DECAY, EMA_TAU = 0.99, 5.0
SGD = {"lr": 0.01, "momentum": 0.937, "nesterov": True, "weight_decay": 0.0005}


def schedule(optimizer: str = "SGD") -> Schedule:
    adam = optimizer != "SGD"
    return Schedule(
        total_steps=20,
        warmup_steps=3,
        lr=0.001 if adam else 0.01,
        lrf=0.1,
        shape="linear",
        momentum=0.0 if adam else 0.937,
        weight_decay=0.0005,
        global_batch=MICRO * GROUPS,
        warmup_bias_lr=0.02,
        warmup_momentum=0.8,
        is_adam=adam,
    )


def batch(step: int, group: int) -> Batch:
    """Micro-batch `group` of a step: noise, with a few boxes."""
    rng = np.random.default_rng((step, group))
    images = rng.integers(0, 256, (MICRO, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    count = int(rng.integers(1, 6))
    boxes = np.concatenate((rng.uniform(8, 56, (count, 2)), rng.uniform(6, 50, (count, 2))), 1)
    assign = Assigner(anchors_px("yolov5n").numpy(), level_strides("yolov5n"), 4.0)
    classes = rng.integers(0, NUM_CLASSES, count)
    of_image = np.sort(rng.integers(0, MICRO, count))
    targets = assign(of_image, classes, boxes.astype(np.float32), MICRO, (SIZE_PX, SIZE_PX))
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), targets)


def network(seed: int = 0):
    torch.manual_seed(seed)
    return build_yolov5("yolov5n", NUM_CLASSES)


def loss_of(net) -> DetectionLoss:
    return DetectionLoss(net.anchors, NUM_CLASSES, SIZE_PX)


def plain(
    num_steps: int, optimizer: str = "SGD", *, frozen: bool = False, together: int = 1
) -> dict[str, object]:
    """The training in torch alone, in one process: losses of each step; weights, buffers and EMA at the end.

    `together` groups pass the network as one batch, as their BatchNorm sees them when it is synchronised.
    """
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
        batches = [batch(step, group) for group in range(GROUPS)]
        matches = sum(b.targets.num_matches for b in batches)
        images = sum(b.targets.num_images for b in batches)
        parts = torch.zeros(3)
        for start in range(0, GROUPS, together):
            some = batches[start : start + together]
            joined = torch.cat([one.images for one in some])
            maps = net(joined.contiguous(memory_format=torch.channels_last))
            total = torch.zeros(())
            for one, *own_maps in zip(some, *(level.split(MICRO) for level in maps), strict=True):
                targets = one.targets._replace(num_matches=matches, num_images=images)
                share, own = loss(own_maps, targets)
                total = total + share
                parts += own
            total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optim.step()
        weight = 1 - EMA_DECAY * (1 - np.exp(-(step + 1) / EMA_TAU))
        for name, p in net.named_parameters():
            ema[name].lerp_(p.detach(), weight)
        losses.append(parts.tolist())
    return {"losses": losses, "weights": state(net), "ema": ema, "buffers": dict(net.named_buffers())}


def state(net) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def build(
    stage: int,
    folder: Path,
    *,
    optimizer: str = "SGD",
    seed: int = 0,
    frozen: bool = False,
    synchronised: bool = False,
    accelerator: str = "cpu",
    **json,
):
    """Engine, shards, EMA and checkpoints of this rank, as the entry builds them."""
    from dsyolo.parallel import dist
    from dsyolo.parallel.checkpoint import Checkpoints
    from dsyolo.parallel.ema import Ema
    from dsyolo.parallel.engine import Engine
    from dsyolo.parallel.folder import Folders, move_to_folders
    from dsyolo.parallel.shards import Shards
    from dsyolo.parallel.syncbn import synchronise_batchnorm

    world = dist.world_from_environment()
    if not torch.distributed.is_initialized():
        dist.join()
    params = SGD if optimizer == "SGD" else {"lr": 0.001, "weight_decay": 0.0005}
    ds = check(
        {
            "train_batch_size": MICRO * GROUPS,
            "train_micro_batch_size_per_gpu": MICRO,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": optimizer, "params": params},
            "gradient_clipping": 10.0,
            **json,
        },
        world_size=world.size,
        accelerator=accelerator,
    )
    net = network(seed)
    if synchronised:
        synchronise_batchnorm(net)
    engine = Engine(
        net,
        loss_of(net),
        build_optimizer(net, ds.optimizer, ds.optimizer_params),
        schedule(optimizer),
        deepspeed_json=ds.deepspeed_json(sum(p.numel() for p in net.parameters()), cpu=accelerator == "cpu"),
        world=world,
        accumulation=ds.accumulation,
        freeze_batchnorm=frozen,
    )
    shards = Shards(engine.deepspeed)
    ema = Ema(shards, engine.buffers, EMA_DECAY, EMA_TAU)
    if any(ds.offload_folders):
        move_to_folders(Folders(*ds.offload_folders), engine.deepspeed, shards, ema.tensors, world)
    return engine, shards, ema, Checkpoints(folder, engine, shards, ema, world)


def train(engine, ema, start: int, stop: int) -> list[list[float]]:
    """Steps `start` .. `stop` - 1; the losses of each."""
    losses = []
    for step in range(start, stop):
        groups = range(engine.world.rank, GROUPS, engine.world.size)
        stats, _ = engine.train_step([batch(step, group) for group in groups], step)
        if stats.was_applied:
            ema.update()
        losses.append(stats.losses.tolist())
    return losses


def whole(shards, tensors) -> dict[str, torch.Tensor]:
    """Gathered copies by name."""
    return {name: tensor.clone() for name, tensor in shards.gather(tensors)}
