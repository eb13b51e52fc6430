"""What a DeepSpeed JSON leaves to the machine: all of it (`--deepspeed_config auto`), or values that are "auto"."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.config import DsConfig, check
from dsyolo.config.deepspeed.json_reader import read_json, without_auto
from dsyolo.config.deepspeed.rules import BATCH_KEYS, open_batch
from dsyolo.config.run_config import AUTO, RunConfig, read_recompute
from dsyolo.data.loader import largest_size_px
from dsyolo.models.registry import max_stride
from dsyolo.planner.hardware import GIB, Hardware
from dsyolo.planner.model_profile import ModelProfile
from dsyolo.planner.predict import Planner
from dsyolo.planner.ranking_report import terms
from dsyolo.planner.search import HEADROOM, Ranking, search
from dsyolo.planner.strategy import OPTIMIZERS, RECOMPUTES, StrategySettings

PRECISION_BLOCKS = ("bf16", "fp16", "torch_autocast")
AGAIN = 0.6  # of the memory that the first plan needed: what is planned for after memory ran out


class PlannedConfig(NamedTuple):
    """A configuration without any "auto".

    Attributes:
        config: a path that needed nothing, or the JSON's content.
        lines: what was filled in, for the start of the run.
        is_halved: planned for less memory, after it ran out.
        val_images: the most that can be validated at a time, where it was planned.
    """

    config: str | Mapping[str, Any]
    lines: tuple[str, ...] = ()
    is_halved: bool = False
    val_images: int | None = None


def plan_config(
    run: RunConfig, find: Callable[[], Hardware], num_classes: int, saved_batch: int | None = None
) -> PlannedConfig:
    """The configuration of a run on this hardware. The same on all ranks whose hardware is told alike.

    Args:
        find: tells the hardware, where that matters.
        saved_batch: global batch of the run that goes on.

    Raises:
        UserError: nothing fits.
    """
    if run.deepspeed_config == AUTO:
        return _plan_all(run, find(), num_classes, saved_batch)
    problems: list[str] = []
    source = read_json(run.deepspeed_config, problems)
    if source is None or problems:
        return PlannedConfig(run.deepspeed_config)  # mistakes are told when it is checked
    content, paths = without_auto(source)
    if not paths:
        return PlannedConfig(run.deepspeed_config)
    return _fill_values(run, find(), num_classes, content, paths, saved_batch)


def _plan_all(run: RunConfig, hardware: Hardware, num_classes: int, saved_batch: int | None) -> PlannedConfig:
    batch = saved_batch or open_batch({}, hardware.ranks)
    if batch % hardware.ranks:
        return PlannedConfig({BATCH_KEYS[0]: batch})  # which is refused, with the ranks that would do
    work = ModelProfile(run.model, num_classes, _size_px(run))
    chosen = read_recompute(run.recompute)
    recomputes = RECOMPUTES if chosen is None else (chosen,)

    def ranked(machine: Hardware) -> Ranking:
        planner = Planner(work, machine, ema=run.ema)
        return search(planner, batch, "SGD", _precisions(machine), recomputes)

    best, what = ranked(hardware).best, ""
    reserved = hardware.memory_bytes - hardware.usable_bytes
    rule = (
        f"nothing fits {hardware.memory_bytes / GIB:.2f} GiB a rank, of which the process itself takes "
        f"{reserved / GIB:.1f}, for {batch} images a step"
    )
    if best and run.halve_micro_batch:
        room = int(AGAIN * best.peak_bytes / (1 - HEADROOM)) + reserved
        what = f", for {room / GIB:.1f} GiB of each, as memory ran out"
        rule = f"memory ran out, and no plan needs less than the {best.peak_bytes / GIB:.2f} GiB that it ran out with"
        again = ranked(hardware._replace(memory_bytes=room))
        smaller = [one for one in again.others[:1] if one.peak_bytes < best.peak_bytes]
        best = again.best or next(iter(smaller), None)
    if best is None:
        remedy = "Take a smaller --imgsz or --model, fewer ranks on a machine, or look at dsyolo plan"
        raise UserError(
            "No plan for this machine", [f"--deepspeed_config: auto given, but {rule}. {remedy}."]
        )
    val_images = max(1, best.val_images)
    one, content = best.settings, best.settings.deepspeed_json()
    line = (
        f"planned for {hardware.ranks} x {hardware.memory_bytes / GIB:.1f} GiB ({hardware.device.name}){what}: "
        f"{one.in_words()} in {one.precision}, {one.micro_batch} images x {one.accumulation} x {one.dp_size}"
    )
    lines = [line, terms(best)]
    if val_images < run.val_batch_size:
        lines.append(f"val_batch_size: {val_images}, as {run.val_batch_size} images would not fit")
    return PlannedConfig(content, tuple(lines), run.halve_micro_batch, val_images)


def _fill_values(
    run: RunConfig,
    hardware: Hardware,
    num_classes: int,
    content: dict[str, Any],
    paths: Sequence[tuple[str, ...]],
    saved_batch: int | None,
) -> PlannedConfig:
    """Values of the batch are planned, precision follows from the device, and every other one gets dsyolo's own value."""
    _fill_precision(hardware, content, paths)
    if {("optimizer", "params"), ("optimizer", "params", "weight_decay")} & set(paths):
        content["optimizer"].setdefault("params", {})["weight_decay"] = OPTIMIZERS["SGD"]["weight_decay"]
    is_halved = _fill_batch(run, hardware, num_classes, content, saved_batch)
    work = ModelProfile(run.model, num_classes, _size_px(run))
    try:
        ds = check(
            content,
            world_size=hardware.ranks,
            accelerator=hardware.accelerator,
            layers=work.layers,
            recompute=run.recompute,
            saved_batch=saved_batch,
        )
    except UserError:  # is told when it is checked
        return PlannedConfig(content, is_halved=is_halved)
    used = ds.deepspeed_json(work.num_parameters, cpu=hardware.accelerator == "cpu")
    used |= {"optimizer": {"type": ds.optimizer, "params": dict(ds.optimizer_params)}}
    lines = []
    for path in paths:
        *blocks, key = path
        value, block = used, content
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        for name in blocks:
            block = block[name]
        if value is not None:
            block[key] = value
        said = json.dumps(value) if value is not None else "left out, and its default holds"
        lines.append(f"{'.'.join(path)}: auto, so {said}")
    return PlannedConfig(content, tuple(lines), is_halved)


def _fill_precision(hardware: Hardware, content: dict[str, Any], paths: Sequence[tuple[str, ...]]) -> None:
    """By what the device has, and the ZeRO stage: weights in half precision need 1 at least, autocast to fp16 needs 0."""
    has_bf16, on_gpu = hardware.device.has_bf16, hardware.accelerator != "cpu"
    zero = content.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    best = "float16" if on_gpu and not has_bf16 and stage == 0 else "bfloat16"  # of autocast
    asked = [name for name in PRECISION_BLOCKS if (name,) in paths or (name, "enabled") in paths]
    for name in asked:
        is_on = not any(_is_on(content, other) for other in PRECISION_BLOCKS if other != name)
        if name == "torch_autocast":
            is_on = (
                is_on and content.get(name, {}).get("dtype", best) == best and (has_bf16 or best == "float16")
            )
        else:
            is_on = is_on and stage != 0 and has_bf16 == (name == "bf16") and (on_gpu or name == "bf16")
        content[name] = {**content.get(name, {}), "enabled": is_on}
    autocast = content.get("torch_autocast")
    if isinstance(autocast, dict) and ("torch_autocast" in asked or ("torch_autocast", "dtype") in paths):
        autocast.setdefault("dtype", best)


def _is_on(content: Mapping[str, Any], name: str) -> bool:
    block = content.get(name)
    return isinstance(block, dict) and bool(block.get("enabled"))


def _fill_batch(
    run: RunConfig, hardware: Hardware, num_classes: int, content: dict[str, Any], saved_batch: int | None
) -> bool:
    """Plans the sizes that are missing; returns whether for less memory than there is, since it ran out."""
    _, micro, steps = (content.get(key) for key in BATCH_KEYS)
    if batch := open_batch(content, hardware.ranks):
        content[BATCH_KEYS[0]] = saved_batch or batch
    if micro is not None or steps is not None:
        return False
    try:
        found = _largest_micro_batch(run, hardware, num_classes, content)
    except UserError:  # is told when it is checked
        return False
    is_halved = run.halve_micro_batch and found % 2 == 0
    content[BATCH_KEYS[1]] = found // 2 if is_halved else found
    return is_halved


def _largest_micro_batch(
    run: RunConfig, hardware: Hardware, num_classes: int, content: Mapping[str, Any]
) -> int:
    """That fits with headroom, of those that divide a rank's share; 1 where none does.

    In a pipeline there are two micro-batches for each stage where the share has so many: else its stages wait.
    """
    work = ModelProfile(run.model, num_classes, _size_px(run))
    options = {"world_size": hardware.ranks, "accelerator": hardware.accelerator, "layers": work.layers}
    whole = check({**content, BATCH_KEYS[2]: 1}, **options, recompute=run.recompute)
    planner, share = Planner(work, hardware, ema=run.ema), whole.global_batch // whole.data_parallel_size
    room = (1 - HEADROOM) * hardware.usable_bytes
    most = max(1, share // (2 * whole.stages)) if whole.stages > 1 else share
    for micro_batch in (n for n in range(most, 0, -1) if share % n == 0):
        found = planner.predict(_settings_of(whole, micro_batch, share // micro_batch))
        if found.fits and found.peak_bytes <= room:
            return micro_batch
    return 1


def _settings_of(ds: DsConfig, micro_batch: int, accumulation: int) -> StrategySettings:
    on_host = {None: None, "cpu": "cpu", "nvme": "cpu"}
    return StrategySettings(
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
    return largest_size_px(run.imgsz, max_stride(run.model))


def _precisions(hardware: Hardware) -> tuple[str, ...]:
    if hardware.accelerator == "cpu":
        return ("autocast_bf16",) if hardware.device.has_bf16 else ("fp32",)
    return ("autocast_bf16", "bf16") if hardware.device.has_bf16 else ("autocast_fp16", "fp16")
