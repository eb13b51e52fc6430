"""Plans what a run leaves to the machine: all of it (`--deepspeed_config auto`), or a JSON's values that are "auto"."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.config.batch_options import PLANNED, contradiction, images_in_step
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS, divisors, halved, open_batch
from dsyolo.config.deepspeed.config import DeepSpeedConfig, cannot_be_used, check
from dsyolo.config.deepspeed.json_reader import JsonSource
from dsyolo.config.deepspeed.scheduler_table import open_text
from dsyolo.config.deepspeed.schema import FLOAT16_NAMES
from dsyolo.config.resolve import PlannedConfig, largest_image_px
from dsyolo.config.run_config import AUTO, RunConfig, read_recompute
from dsyolo.config.spec import PRECISIONS, BatchPlan, Precision
from dsyolo.planner.hardware import GIB, Hardware
from dsyolo.planner.model_profile import ModelProfile
from dsyolo.planner.predict import Planner, StrategyEstimate
from dsyolo.planner.ranking_report import terms
from dsyolo.planner.search import HEADROOM, Ranking, search
from dsyolo.planner.strategy import RECOMPUTES, StrategySettings

PRECISION_BLOCKS = ("bf16", "fp16", "torch_autocast")
# Keys of zero_optimization that cost memory, whose values in the JSON a plan takes.
COUNTED = (
    "reduce_bucket_size",
    "overlap_comm",
    "contiguous_gradients",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
)
AGAIN = 0.6  # after memory ran out: the share of the first plan's peak that the next one is made for
NAME = f"--deepspeed_config {AUTO}"  # names a configuration without a file


def plan_config(
    run: RunConfig,
    source: JsonSource | None,
    hardware: Hardware,
    num_classes: int,
    saved_batch: int | None = None,
) -> PlannedConfig:
    """Return the configuration of a run on this hardware. Ranks that describe it alike plan alike.

    Args:
        source: the JSON, some of whose values are "auto"; None: all is planned.
        saved_batch: the global batch of the run that is resumed.

    Raises:
        UserError: nothing fits, or the JSON cannot be used.
    """
    profile = ModelProfile(run.model, num_classes, largest_image_px(run, num_classes))
    if source is None:
        return _plan_all(run, hardware, profile, saved_batch)
    return _fill_values(run, source, hardware, profile, saved_batch)


# ---- all of it


def _plan_all(
    run: RunConfig, hardware: Hardware, profile: ModelProfile, saved_batch: int | None
) -> PlannedConfig:
    if problem := contradiction(run, hardware.ranks, saved_batch):
        raise UserError("No plan for this machine", [problem])
    batch = images_in_step(run, hardware.ranks, saved_batch)
    if batch % hardware.ranks:  # refused there, with the ranks that divide it
        check(
            {BATCH_KEYS[0]: batch},
            world_size=hardware.ranks,
            accelerator=hardware.accelerator,
            saved_batch=saved_batch,
            name=NAME,
        )
    best, room = _best(run, hardware, profile, batch)
    one = best.settings
    line = (
        f"planned for {hardware.ranks} x {hardware.memory_bytes / GIB:.1f} GiB ({hardware.device.name}){room}: "
        f"{one.describe()} in {one.precision.name}, {one.micro_batch} images x {one.accumulation} x {one.dp_size}"
    )
    lines = [line, terms(best)]
    val_images = max(1, best.val_images)
    if val_images < run.val_batch_size:
        lines.append(f"val_batch_size: {val_images}, as {run.val_batch_size} images would not fit")
    return PlannedConfig(replace(best.ds, path=NAME), tuple(lines), val_images, is_planned=True)


def _best(
    run: RunConfig, hardware: Hardware, profile: ModelProfile, batch: int
) -> tuple[StrategyEstimate, str]:
    """Return the best strategy and, if memory ran out before, the memory that it is planned for, or raise UserError."""
    chosen = read_recompute(run.recompute)
    recomputes = RECOMPUTES if chosen is None else (chosen,)
    precisions = _precisions(hardware)

    # The run's own --batch, unless memory ran out with it or the batch of a resumed run has no room for it.
    micro = None if run.batch == PLANNED or run.halve_micro_batch else run.batch
    if micro and batch % (micro * hardware.ranks):
        micro = None

    def ranked(hardware: Hardware) -> Ranking:
        return search(Planner(profile, hardware, ema=run.ema), batch, "SGD", precisions, recomputes, micro)

    best, text = ranked(hardware).best, ""
    reserved = hardware.memory_bytes - hardware.usable_bytes
    rule = (
        f"no strategy fits into {hardware.memory_bytes / GIB:.2f} GiB per rank ({reserved / GIB:.1f} GiB of it reserved for "
        f"the process) at {batch} images a step{f' and --batch {micro}' if micro else ''}"
    )
    if best and run.halve_micro_batch:
        room = int(AGAIN * best.peak_bytes / (1 - HEADROOM)) + reserved
        text = f", for {room / GIB:.1f} GiB of each, as memory ran out"
        rule = f"memory ran out, and no plan needs less than the {best.peak_bytes / GIB:.2f} GiB that it ran out with"
        again = ranked(hardware._replace(memory_bytes=room))
        smaller = [one for one in again.others[:1] if one.peak_bytes < best.peak_bytes]
        best = again.best or next(iter(smaller), None)
    if best is None:
        less = "a smaller --batch, --imgsz or --model" if micro else "a smaller --imgsz or --model"
        remedy = f"Use {less}, or fewer ranks per machine; `dsyolo plan` shows what fits"
        problem = f"--deepspeed_config: auto given, but {rule}. {remedy}."
        raise UserError("No plan for this machine", [problem])
    return best, text


def _precisions(hardware: Hardware) -> list[Precision]:
    if hardware.accelerator == "cpu":
        names = ["autocast_bf16" if hardware.device.has_bf16 else "fp32"]
    else:
        names = ["autocast_bf16", "bf16"] if hardware.device.has_bf16 else ["autocast_fp16", "fp16"]
    return [PRECISIONS[name] for name in names]


# ---- values that are "auto"


def _fill_values(
    run: RunConfig,
    source: JsonSource,
    hardware: Hardware,
    profile: ModelProfile,
    saved_batch: int | None,
) -> PlannedConfig:
    """Plan batch sizes, take the precision from the device, and fill all else with dsyolo's defaults."""
    content, paths = copy.deepcopy(dict(source.content or {})), source.left_open
    notes = _fill_precision(hardware, content, paths)
    train, micro, steps = (content.get(key) for key in BATCH_KEYS)
    # With the accumulation alone given, the batch of a step shrinks with the micro-batch.
    shrinks = (
        train is saved_batch is None and steps is not None and any((key,) in paths for key in BATCH_KEYS)
    )
    is_open = micro is None and (steps is None or shrinks)
    if batch := open_batch(content, hardware.ranks, paths):
        content[BATCH_KEYS[0]] = saved_batch or batch
    ds = check(
        replace(source, content=content),
        world_size=hardware.ranks,
        accelerator=hardware.accelerator,
        layers=profile.layers,
        recompute=run.recompute,
        halve=run.halve_micro_batch and not is_open,
        saved_batch=saved_batch,
    )
    content = copy.deepcopy(dict(ds.source))  # without what is set aside
    if ds.scheduler is None:
        content.pop("scheduler", None)
    if is_open:
        problems: list[str] = []
        planner = Planner(profile, hardware, ema=run.ema)
        planned, found = _planned_batch(ds, planner, shrinks=shrinks)
        notes += _memory_lines(found, planner)
        if (fitting := halved(planned, problems) if run.halve_micro_batch else planned) is None:
            raise cannot_be_used(source.name, hardware.ranks, problems)
        ds = replace(ds, batch=fitting)
        content |= {BATCH_KEYS[0]: ds.global_batch, BATCH_KEYS[1]: ds.micro_batch}
        if steps is not None:
            content[BATCH_KEYS[2]] = ds.accumulation
    used = ds.deepspeed_json(profile.num_parameters, cpu=hardware.accelerator == "cpu")
    used |= {"optimizer": ds.optimizer_json()}
    lines = [f"{'.'.join(path)}: auto, so {_fill(content, path, used)}" for path in paths] + notes
    return PlannedConfig(replace(ds, source=content), tuple(lines), is_planned=True)


def _fill(content: dict[str, Any], path: Sequence[str], used: Mapping[str, Any]) -> str:
    """Copy the value at a path of `used` into the JSON; return it as text."""
    *blocks, key = path
    if path[0] == "scheduler" and path[0] not in content:
        return "left out, and the recipe's schedule holds"
    if path[:2] == ("scheduler", "params"):
        _block_at(content, blocks)[key] = AUTO  # the steps of a run are known when its images are
        return open_text(key)
    value: Any = used
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        return "left out, and its default holds"
    _block_at(content, blocks)[key] = value
    return json.dumps(value)


def _block_at(content: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    block = content
    for name in path:
        block = block.setdefault(name, {})
    return block


def _fill_precision(
    hardware: Hardware, content: dict[str, Any], paths: Sequence[tuple[str, ...]]
) -> list[str]:
    """Decide by device and ZeRO stage: half-precision weights need ZeRO 1 at least, autocast to fp16 needs ZeRO 0.

    Where no block that is "auto" can be on, autocast takes its place. Return a line about that.
    """
    has_bf16, on_gpu = hardware.device.has_bf16, hardware.accelerator != "cpu"
    zero = content.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    pipeline = content.get("pipeline")
    stages = pipeline.get("stages", 1) if isinstance(pipeline, dict) else 1
    can_fp16 = on_gpu and stage == 0 and stages == 1
    best = "float16" if can_fp16 and not has_bf16 else "bfloat16"  # autocast's type
    asked = [name for name in PRECISION_BLOCKS if (name,) in paths or (name, "enabled") in paths]
    for name in asked:
        block = content.get(name, {})
        if any(_is_on(content, other) for other in PRECISION_BLOCKS if other != name):
            is_on = False
        elif name == "torch_autocast":
            is_on = can_fp16 if block.get("dtype", best) in FLOAT16_NAMES else has_bf16
        else:
            is_on = stage != 0 and has_bf16 == (name == "bf16") and (on_gpu or name == "bf16")
        content[name] = {**block, "enabled": is_on}
    autocast = content.get("torch_autocast")
    if isinstance(autocast, dict) and ("torch_autocast" in asked or ("torch_autocast", "dtype") in paths):
        autocast.setdefault("dtype", best)
    if not asked or any(_is_on(content, name) for name in PRECISION_BLOCKS):
        return []
    if best == "bfloat16" and not has_bf16:
        return [f"precision: fp32, as this device has no bf16 and ZeRO {stage} no other half precision here"]
    if autocast is not None:
        return ["precision: fp32, as the JSON's torch_autocast cannot be on here"]
    content["torch_autocast"] = {"enabled": True, "dtype": best}
    line = f"precision: {best} autocast, which this device has, in the place of {' and '.join(asked)}"
    if best == "bfloat16" and "bf16" in content and "bf16" not in asked:
        line += ": bf16.enabled false, as the JSON has it, is about weights alone"
    return [line, *_without_types(content, stage)]


def _without_types(content: dict[str, Any], stage: Any) -> list[str]:
    """Take out the types of gradients that autocast cannot have at this ZeRO stage; return a line about each."""
    lines = []
    types = content.get("data_types")
    if stage == 0 and isinstance(types, dict) and types.get("grad_accum_dtype", "fp32") in ("bf16", "fp16"):
        del types["grad_accum_dtype"]
        lines.append("data_types.grad_accum_dtype: left out, as under autocast gradients are summed in fp32")
    if stage != 0 and content.get("communication_data_type", "fp32") in ("bf16", "fp16"):
        del content["communication_data_type"]
        lines.append("communication_data_type: left out, as under autocast ZeRO sends gradients in fp32")
    return lines


def _is_on(content: Mapping[str, Any], name: str) -> bool:
    block = content.get(name)
    return isinstance(block, dict) and bool(block.get("enabled"))


def _planned_batch(
    ds: DeepSpeedConfig, planner: Planner, *, shrinks: bool
) -> tuple[BatchPlan, StrategyEstimate]:
    """Return the batch with the largest micro-batch that fits with headroom, 1 if none does, and its estimate.

    Micro-batches are divisors of a rank's share of the global batch. A pipeline gets two micro-batches a stage, if the
    share has so many images: with fewer its stages wait.

    Args:
        shrinks: the accumulation stays, and the global batch follows from the micro-batch.
    """
    room = (1 - HEADROOM) * planner.hardware.usable_bytes
    share, batch = ds.batch.share, ds.batch
    most = max(1, share // (2 * ds.stages)) if ds.stages > 1 else share
    for micro in reversed(divisors(batch.micro) if shrinks else divisors(share, most)):
        batch = replace(ds.batch, micro=micro) if shrinks else ds.batch.with_micro(micro)
        fitting = replace(ds, batch=batch)
        found = planner.predict(_settings_of(fitting), fitting)
        if found.fits and found.peak_bytes <= room:
            break
    return batch, found


def _memory_lines(found: StrategyEstimate, planner: Planner) -> list[str]:
    """Return what a planned micro-batch is expected to need, and which keys of the JSON were counted."""
    given = found.ds.source.get("zero_optimization", {})
    counted = [f"{key} {json.dumps(given[key])}" for key in COUNTED if key in given]
    sent = found.ds.sent_type
    counted += [f"communication_data_type {sent}"] if sent else []
    lines = [f"planned with {', '.join(counted)}"] if counted else []
    room = planner.hardware.usable_bytes
    if not found.fits:
        lines.append(f"no micro-batch fits into {room / GIB:.2f} GiB, not even 1 image: {found.why_not}")
    return [*lines, terms(found)]


def _settings_of(ds: DeepSpeedConfig) -> StrategySettings:
    # NVMe is planned as host memory.
    optimizer, params = ("cpu" if device else None for device in ds.parallelism.offload.devices)
    sharding = ds.zero_stage, optimizer, params
    sizes = ds.micro_batch, ds.accumulation, ds.stages, ds.dp_size
    return StrategySettings(*sharding, ds.parallelism.recompute, ds.precision, *sizes, ds.optimizer.type)
