"""What a DeepSpeed JSON leaves to the machine: all of it (`--deepspeed_config auto`), or values that are "auto"."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dsyolo.config import AUTO, RunConfig
from dsyolo.data.loader import largest_size_px
from dsyolo.ds_checks import BATCH_KEYS
from dsyolo.ds_config import DsConfig, check
from dsyolo.ds_read import read_json
from dsyolo.errors import UserError
from dsyolo.model.yolov5 import level_strides
from dsyolo.optim import NOMINAL_BATCH
from dsyolo.plan.hardware import GIB, Hardware
from dsyolo.plan.predict import Planner
from dsyolo.plan.report import terms
from dsyolo.plan.search import HEADROOM, search
from dsyolo.plan.strategy import Settings
from dsyolo.plan.work import Work

AGAIN = 0.6  # of the memory that the first plan needed: what is planned for after memory ran out


class Filled(NamedTuple):
    """A configuration without any "auto".

    Attributes:
        config: a path that needed nothing, or the JSON's content.
        lines: what was filled in, for the start of the run.
    """

    config: str | Mapping[str, Any]
    lines: tuple[str, ...] = ()


def fill(
    run: RunConfig, find: Callable[[], Hardware], num_classes: int, saved_batch: int | None = None
) -> Filled:
    """The configuration of a run on this hardware. The same on all ranks whose hardware is told alike.

    Args:
        find: tells the hardware, where that matters.
        saved_batch: global batch of the run that goes on.

    Raises:
        UserError: nothing fits.
    """
    if run.deepspeed_config == AUTO:
        return _plan_all(run, find(), num_classes, saved_batch)
    source = read_json(run.deepspeed_config, [])
    if source is None or not _autos(source):
        return Filled(run.deepspeed_config)  # mistakes are told when it is checked
    return _fill_values(run, find(), num_classes, source, saved_batch)


def nominal_batch(ranks: int) -> int:
    """The recipe's 64 images a step, or the next multiple of the ranks."""
    return -(-NOMINAL_BATCH // ranks) * ranks


def _plan_all(run: RunConfig, hardware: Hardware, num_classes: int, saved_batch: int | None) -> Filled:
    batch = saved_batch or nominal_batch(hardware.ranks)
    work = Work(run.model, num_classes, _size_px(run))
    best = search(Planner(work, hardware, ema=run.ema), batch, "SGD", _precisions(hardware)).best
    if best and run.halve_micro_batch:
        room = int(AGAIN * best.peak_bytes / (1 - HEADROOM)) + hardware.memory_bytes - hardware.usable_bytes
        smaller = hardware._replace(memory_bytes=room)
        best = search(Planner(work, smaller, ema=run.ema), batch, "SGD", _precisions(hardware)).best
    if best is None:
        rule = f"nothing fits {hardware.memory_bytes / GIB:.1f} GiB a rank for {batch} images a step"
        remedy = "Take a smaller --imgsz or --model, or look at dsyolo plan"
        raise UserError(
            "No plan for this machine", [f"--deepspeed_config: auto given, but {rule}. {remedy}."]
        )
    one = best.settings
    line = (
        f"planned for {hardware.ranks} x {hardware.memory_bytes / GIB:.1f} GiB ({hardware.device.name}): "
        f"{one.in_words()} in {one.precision}, {one.micro_batch} images x {one.accumulation} x {one.replicas}"
    )
    return Filled(one.deepspeed_json(), (line, terms(best)))


def _fill_values(
    run: RunConfig,
    hardware: Hardware,
    num_classes: int,
    source: Mapping[str, Any],
    saved_batch: int | None,
) -> Filled:
    """Values of the batch are planned; every other one is left out, and so gets dsyolo's own."""
    content, lines = copy.deepcopy(dict(source)), []
    for path in _autos(source):
        *blocks, key = path
        block = content
        for name in blocks:
            block = block[name]
        del block[key]
        if blocks and blocks[-1] in ("bf16", "fp16", "torch_autocast") and key == "enabled":
            if blocks[-1] == "torch_autocast" and hardware.device.has_bf16:
                block[key] = True
                block.setdefault("dtype", "bfloat16")
            else:
                block[key] = blocks[-1] == "bf16" and hardware.device.has_bf16
            lines.append(f"{'.'.join(path)}: auto, so {str(block[key]).lower()}")
        elif path[0] not in BATCH_KEYS:
            lines.append(f"{'.'.join(path)}: auto, so left to dsyolo")
    train, micro, steps = (content.get(key) for key in BATCH_KEYS)
    if train is None and (micro is None or steps is None):
        stages = (
            content.get("pipeline", {}).get("stages", 1)
            if isinstance(content.get("pipeline", {}), dict)
            else 1
        )
        replicas = (
            max(1, hardware.ranks // stages) if isinstance(stages, int) and stages > 0 else hardware.ranks
        )
        unit = replicas * next((n for n in (micro, steps) if isinstance(n, int) and n > 0), 1)
        content[BATCH_KEYS[0]] = saved_batch or -(-NOMINAL_BATCH // unit) * unit
    if micro is None and steps is None:
        content[BATCH_KEYS[1]] = _largest_micro_batch(run, hardware, num_classes, content)
    given = {key: content[key] for key in BATCH_KEYS if key in content}
    lines.append("batch: auto, so " + ", ".join(f"{key} {value}" for key, value in given.items()))
    return Filled(content, tuple(lines))


def _largest_micro_batch(
    run: RunConfig, hardware: Hardware, num_classes: int, content: Mapping[str, Any]
) -> int:
    """That fits with headroom, of those that divide a rank's share; 1 where none does."""
    work = Work(run.model, num_classes, _size_px(run))
    options = {"world_size": hardware.ranks, "accelerator": hardware.accelerator, "layers": work.layers}
    whole = check({**content, BATCH_KEYS[2]: 1}, **options, recompute=run.recompute)
    planner, share = Planner(work, hardware, ema=run.ema), whole.global_batch // whole.data_parallel_size
    room = (1 - HEADROOM) * hardware.usable_bytes
    for micro_batch in (n for n in range(share, 0, -1) if share % n == 0):
        if planner.predict(_settings_of(whole, micro_batch, share // micro_batch)).peak_bytes <= room:
            return micro_batch
    return 1


def _settings_of(ds: DsConfig, micro_batch: int, accumulation: int) -> Settings:
    on_host = {None: None, "cpu": "cpu", "nvme": "cpu"}
    return Settings(
        ds.zero_stage,
        on_host[ds.offload_optimizer],
        on_host[ds.offload_param],
        ds.recompute,
        ds.precision,
        micro_batch,
        accumulation,
        ds.stages,
        ds.data_parallel_size,
        ds.optimizer,
    )


def _size_px(run: RunConfig) -> int:
    """The largest side of its images."""
    if not run.recipe.multi_scale:
        return run.imgsz
    return largest_size_px(run.imgsz, level_strides(run.model)[-1])


def _precisions(hardware: Hardware) -> tuple[str, ...]:
    if hardware.accelerator == "cpu":
        return ("autocast_bf16",) if hardware.device.has_bf16 else ("fp32",)
    return ("autocast_bf16", "bf16") if hardware.device.has_bf16 else ("autocast_fp16", "fp16")


def _autos(source: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all values that are "auto"."""
    found = []
    for key, value in source.items():
        if value == AUTO and (*above, key) != ("activation_checkpointing", "recompute"):
            found.append((*above, key))
        elif isinstance(value, Mapping):
            found += _autos(value, (*above, key))
    return found
