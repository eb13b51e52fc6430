"""The rules of the DeepSpeed JSON, one function each. A broken rule adds a line to `problems`.

They get the part of the JSON that `json_reader.valid_part` let through, and so meet only legal keys and types. The
rules of the batch are in batch_sizes.py.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsyolo.config.deepspeed.json_reader import shown
from dsyolo.config.deepspeed.optimizer_table import (
    TORCH_ADAMW_WEIGHT_DECAY,
    optimizer_name,
    optimizer_spec,
)
from dsyolo.config.deepspeed.schema import FLOAT16_NAMES
from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.run_config import AUTO, read_recompute
from dsyolo.config.spec import PRECISIONS, OffloadSpec, OptimizerSpec, Precision

# What may be offloaded, and the ZeRO stages that can: as numbers and as text.
OFFLOADED = {"offload_optimizer": ((1, 2, 3), "1, 2 or 3"), "offload_param": ((3,), "3")}
AUTOCAST_BF16 = '"torch_autocast": {"enabled": true, "dtype": "bfloat16"}'


def pipeline(
    valid: Mapping[str, Any],
    zero_stage: int,
    world_size: int,
    layers: Sequence[bool] | None,
    problems: list[str],
) -> tuple[int, str | tuple[int, ...]]:
    """Return (stages, partition). An impossible number of stages is refused and counted as 1."""
    block = valid.get("pipeline", {})
    stages = int(block.get("stages", 1))
    given = block.get("partition", "balanced")
    partition = given if isinstance(given, str) else tuple(int(cut) for cut in given)
    before = len(problems)
    if stages > 1 and zero_stage >= 2:
        rule = f"DeepSpeed pipelines need ZeRO 0 or 1, and zero_optimization.stage is {zero_stage}"
        problems.append(f"pipeline.stages: {stages} given, but {rule}. Set it to 1, or remove pipeline.")
    if world_size % stages:
        fitting = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        rule = f"the number of ranks, {world_size}, is not a multiple of it"
        remedy = f"Set it to one of {', '.join(fitting)}"
        problems.append(f"pipeline.stages: {stages} given, but {rule}. {remedy}.")
    if isinstance(partition, tuple) and len(partition) != stages - 1:
        rule = f"{stages} stage{'s need' if stages > 1 else ' needs'} {stages - 1} cuts"
        remedy = f'Give {stages - 1} cuts, or write "balanced"'
        problems.append(f"pipeline.partition: {len(partition)} cuts given, but {rule}. {remedy}.")
    elif layers and isinstance(partition, tuple):
        _cuts(partition, layers, problems)
    if layers and stages > sum(layers):
        rule = f"the network has {sum(layers)} layers with parameters, and each stage needs one"
        problems.append(f"pipeline.stages: {stages} given, but {rule}. Set it to {sum(layers)} or less.")
    return (1, "balanced") if len(problems) > before else (stages, partition)


def _cuts(partition: tuple[int, ...], layers: Sequence[bool], problems: list[str]) -> None:
    """Check that every stage has something to train."""
    bounds = [0, *partition, len(layers)]
    if partition and partition[-1] >= len(layers):
        rule = f"the network has {len(layers)} layers, 0 to {len(layers) - 1}"
        problems.append(f"pipeline.partition: {partition[-1]} given, but {rule}. Choose a smaller cut.")
        return
    for start, stop in pairwise(bounds):
        if not any(layers[start:stop]):
            rule = f"the stage of layers {start} to {stop - 1} would have no parameters"
            problems.append(f"pipeline.partition: {list(partition)} given, but {rule}. Move a cut.")


def activations(
    valid: Mapping[str, Any], stages: int, command_line: str, problems: list[str]
) -> tuple[str | int, bool]:
    """Return the recompute choice ("none", "blocks" or a byte budget) and whether block inputs go to host memory."""
    block = valid.get("activation_checkpointing", {})
    in_json = block.get("recompute", AUTO)
    given = command_line if in_json == AUTO else in_json
    path = "--recompute" if in_json == AUTO else "activation_checkpointing.recompute"
    if AUTO not in (in_json, command_line):
        problems.append(f"{path}: {shown(given)} given, and so is --recompute. Leave one out.")
    choice = "none" if given == AUTO else read_recompute(given)
    assert choice is not None, given
    offloads = bool(block.get("cpu_checkpointing", False))
    if offloads and choice == "none":
        rule = 'it offloads the inputs of recomputed blocks, and no block is recomputed. Set recompute to "blocks"'
        problems.append(f"activation_checkpointing.cpu_checkpointing: true given, but {rule}.")
    if isinstance(choice, int) and stages > 1:
        rule = "a stage of a pipeline keeps the activations of several micro-batches"
        problems.append(f'{path}: {shown(given)} given, but {rule}. Set it to "blocks" or "none".')
    return choice, offloads


def optimizer(valid: Mapping[str, Any], problems: list[str]) -> OptimizerSpec:
    """Return the optimizer that runs; the recipe's SGD where none is given.

    As in DeepSpeed, `Adam` decouples the weight decay, and so is AdamW, unless `adam_w_mode` is false.
    """
    block = valid.get("optimizer", {})
    given = optimizer_name(block.get("type", "SGD"))
    if given is None:
        return optimizer_spec("SGD", {})
    params = dict(block.get("params", {}))
    decoupled = params.pop("adam_w_mode", True)
    if given == "AdamW" and not decoupled:
        rule = "AdamW is the decoupled one"
        problems.append(f'optimizer.params.adam_w_mode: false given, but {rule}. Set type to "Adam".')
    name = "AdamW" if given == "Adam" and decoupled else given
    if params.pop("torch_adam", False) and name == "AdamW":
        params.setdefault("weight_decay", TORCH_ADAMW_WEIGHT_DECAY)
    spec = optimizer_spec(name, params)
    if spec.params.get("nesterov") and not spec.momentum:
        rule = "Nesterov needs momentum"
        problems.append(f"optimizer.params.momentum: 0 given, but {rule}. Set nesterov to false.")
    return spec


def precision(valid: Mapping[str, Any], accelerator: str, zero_stage: int, problems: list[str]) -> Precision:
    """Return the types that the JSON asks for, without `data_types`."""
    on = [key for key in ("torch_autocast", "bf16", "fp16") if valid.get(key, {}).get("enabled")]
    if len(on) > 1:
        rule = f"and so is {' and '.join(f'{key}.enabled' for key in on[1:])}"
        problems.append(f"{on[0]}.enabled: true given, {rule}. One of them can be on.")
    if accelerator == "cpu" and "fp16" in on:
        remedy = f"Write {AUTOCAST_BF16} in the place of fp16."
        problems.append(f"fp16.enabled: true given, but DeepSpeed has no fp16 on a CPU. {remedy}")
    elif zero_stage == 0 and len(on) == 1:  # else the other problem comes first
        for key in {"bf16", "fp16"} & set(on):
            rule = "DeepSpeed then keeps its fp32 weights outside of what dsyolo can checkpoint"
            remedy = f"Set zero_optimization.stage to {_checkpointed_stage(valid, key)}"
            problems.append(f"{key}.enabled: true with zero_optimization.stage 0, but {rule}. {remedy}.")
    if "torch_autocast" in on:
        dtype = valid["torch_autocast"].get("dtype")
        if dtype is None:
            rule = "missing, and DeepSpeed has no default"
            other = ' or "float16"' if accelerator != "cpu" and zero_stage == 0 else ""
            problems.append(f'torch_autocast.dtype: {rule}. Write "bfloat16"{other}.')
        if accelerator == "cpu" and dtype in FLOAT16_NAMES:
            problems.append(
                f'torch_autocast.dtype: {shown(dtype)} given, but a CPU has no fp16. Write "bfloat16".'
            )
        elif zero_stage > 0 and dtype in FLOAT16_NAMES:
            # DeepSpeed checks the norm of the scaled gradients and skips a non-finite step before the scaler sees it.
            rule = f"with zero_optimization.stage {zero_stage} DeepSpeed never lowers its loss scale"
            remedy = 'Use "bfloat16", or fp16.enabled, or stage 0'
            problems.append(f"torch_autocast.dtype: {shown(dtype)} given, but {rule}. {remedy}.")
        return Precision("fp16" if dtype in FLOAT16_NAMES else "bf16")
    return PRECISIONS[on[0] if on else "fp32"]


def data_types(valid: Mapping[str, Any], given: Precision, zero_stage: int, problems: list[str]) -> Precision:
    """Return the precision with the gradients' type of `data_types`.

    `data_types` may not contradict the precision, nor take BatchNorm's buffers out of fp32.
    """
    block, model = valid.get("data_types", {}), given.params
    for key, dtype, rule in (
        ("param_dtype", model, f"weights are {model} here"),
        ("buffer_dtype", "fp32", "the statistics of BatchNorm stay fp32"),
    ):
        if (asked := block.get(key, dtype)) != dtype:
            problems.append(f"data_types.{key}: {shown(asked)} given, but {rule}. Leave it out.")
    gradients = block.get("grad_accum_dtype", model)
    if zero_stage == 0 and gradients != model:
        rule = f"at ZeRO 0 gradients are summed in the weights' type, {model}"
        remedy = f"Leave it out, or set zero_optimization.stage to {_checkpointed_stage(valid, model)}"
        problems.append(f"data_types.grad_accum_dtype: {shown(gradients)} given, but {rule}. {remedy}.")
    sent = valid.get("communication_data_type", model)
    if given.is_autocast and zero_stage and sent != model:
        rule = f"under torch_autocast ZeRO {zero_stage} sends gradients in the weights' type, {model}"
        remedy = (
            'Leave it out; "lower_precision_safe_modules": ["torch.nn.Conv2d"] in torch_autocast sends less'
        )
        problems.append(f"communication_data_type: {shown(sent)} given, but {rule}. {remedy}.")
    is_offloaded = valid.get("zero_optimization", {}).get("offload_optimizer")
    if (zero_stage, model, gradients) == (1, "bf16", "fp32") and not is_offloaded:
        rule = "at ZeRO 1 DeepSpeed then keeps its fp32 weights outside of what dsyolo can checkpoint"
        is_pipeline = valid.get("pipeline", {}).get("stages", 1) > 1  # which excludes stage 2
        remedy = f"Leave it out{'' if is_pipeline else ', or set zero_optimization.stage to 2'}"
        problems.append(f"data_types.grad_accum_dtype: {shown(gradients)} given, but {rule}. {remedy}.")
    return replace(given, grads=gradients)


def _checkpointed_stage(valid: Mapping[str, Any], model: str) -> int:
    """Return the lowest ZeRO stage above 0 whose fp32 weights dsyolo can checkpoint."""
    gradients = valid.get("data_types", {}).get("grad_accum_dtype", model)
    is_pipeline = valid.get("pipeline", {}).get("stages", 1) > 1
    return 2 if (model, gradients) == ("bf16", "fp32") and not is_pipeline else 1


def offload(valid: Mapping[str, Any], zero_stage: int, problems: list[str]) -> OffloadSpec:
    """Return where the optimizer's states and the parameters lie."""
    devices: list[str | None] = []
    folders: list[str | None] = []
    for key, (stages, listed) in OFFLOADED.items():
        path, block = f"zero_optimization.{key}", valid.get("zero_optimization", {}).get(key, {})
        device = block.get("device", "none")
        if block and "device" not in block:
            problems.append(f'{path}.device: missing. Write "cpu" or "nvme", or leave the block out.')
        if device != "none" and zero_stage not in stages:
            remedy = f"Set zero_optimization.stage to {min(stages)}, or leave it out"
            rule = f"it needs stage {listed}, and stage {zero_stage} is given. {remedy}"
            problems.append(f"{path}: device {shown(device)} given, but {rule}.")
        is_refused = any(line.startswith(f"{path}.nvme_path:") for line in problems)  # as of another type
        if not is_refused and (fault := _folder_fault(block.get("nvme_path"), device)):
            problems.append(f"{path}.nvme_path: {fault}")
        devices.append(None if device == "none" else device)
        folders.append(block.get("nvme_path") if device == "nvme" else None)
    return OffloadSpec(devices[0], devices[1], folders[0], folders[1])


def _folder_fault(path: str | None, device: str) -> str | None:
    """Return what is wrong with the folder of an offload."""
    if device != "nvme":
        rule = 'it is used only with device "nvme". Leave it out, or set device to "nvme"'
        return f"{shown(path)} given, but {rule}." if path else None
    if path is None:
        return "missing. Give a folder on a fast local disk, for one file per rank."
    if not os.path.exists(path):
        return f"{shown(path)} given, but there is no such folder. Make it, or name another."
    fault = cannot_hold_files(Path(path))
    return f"{shown(path)} given, but {fault}" if fault else None


def monitors(valid: Mapping[str, Any], stages: int, problems: list[str]) -> None:
    """Check what DeepSpeed's own monitors need: TensorBoard a package, files a folder, its timers no pipeline."""
    timed = {
        "wall_clock_breakdown": bool(valid.get("wall_clock_breakdown")),
        "flops_profiler.enabled": bool(valid.get("flops_profiler", {}).get("enabled")),
    }
    for path in [path for path, is_on in timed.items() if is_on and stages > 1]:
        rule = "in a pipeline DeepSpeed starts its timers twice, and fails"
        problems.append(f"{path}: true given with pipeline.stages {stages}, but {rule}. Leave it out.")
    outputs = {"csv_monitor": "output_path", "tensorboard": "output_path", "flops_profiler": "output_file"}
    for block, key in outputs.items():
        path = valid.get(block, {}).get(key)
        if path and valid[block].get("enabled"):
            folder = Path(path).parent if key == "output_file" else Path(path)
            if fault := cannot_hold_files(folder):
                problems.append(f"{block}.{key}: {shown(path)} given, but {fault}")
    if valid.get("tensorboard", {}).get("enabled") and importlib.util.find_spec("tensorboard") is None:
        rule = "the package tensorboard is not installed"
        problems.append(f"tensorboard.enabled: true given, but {rule}. Install it, or leave the block out.")
