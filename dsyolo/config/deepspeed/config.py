"""Reads, checks and explains the DeepSpeed JSON: how a run runs. Nothing of torch or DeepSpeed is needed for it.

DeepSpeed ignores unknown keys and finds wrong arithmetic after every rank has built its model. Here all
problems are told at once, within a second. What dsyolo owns itself is taken out before DeepSpeed sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed.json_reader import read_json, sane_part
from dsyolo.config.deepspeed.rules import (
    activations,
    batch_triple,
    data_types,
    halve,
    monitors,
    offload,
    optimizer_and_params,
    pipeline,
    precision,
)

GRADIENT_CLIPPING = 10.0  # the recipe's; DeepSpeed's own default, 1.0, would be silently another training
OWN_BLOCKS = (
    "optimizer",
    "pipeline",
    "activation_checkpointing",
)  # read by dsyolo; DeepSpeed gets objects instead

# A bucket is allocated whole. A sixth of the elements holds the largest weight of every variant (yolov5n's and
# yolov5s's are a sixth), so that no gradient needs a copy of its own, and what is full can travel during backward.
BUCKETS = 6
MAX_BUCKET_ELEMENTS = 2**24  # 67 MB
MIN_BUCKET_ELEMENTS = 2**20  # 4 MB: smaller messages cost more time than their bytes
# DeepSpeed's default sums a bucket that several ranks own parts of on all of them, and sends half as much again as ZeRO
# needs. One reduction for each owner sends what is needed, in more messages: for shares of 1 MB and more.
MIN_SHARE_ELEMENTS = 2**18
NO_PRINT = 10**9  # steps between DeepSpeed's own lines; dsyolo's tracker prints


@dataclass(frozen=True)
class DsConfig:
    """A checked DeepSpeed JSON on a given number of ranks, with everything resolved that DeepSpeed derives."""

    path: str | None
    world_size: int
    global_batch: int  # images per optimizer step: micro_batch * accumulation * data_parallel_size
    micro_batch: int  # images per rank and forward pass
    accumulation: int  # micro-batches per optimizer step
    zero_stage: int
    precision: str  # fp32, autocast_bf16, autocast_fp16, bf16 or fp16
    optimizer: str  # SGD, Adam or AdamW: what runs, not always what the JSON calls it
    optimizer_params: Mapping[str, Any]  # as torch.optim takes them; lr is the peak of the schedule
    gradient_clipping: float  # 0: none
    offload_optimizer: str | None  # device
    offload_param: str | None  # device
    stages: int  # of the pipeline, 1: none
    partition: str | tuple[int, ...]  # "balanced", or the layer index at which each further stage begins
    recompute: str | int  # "none", "blocks", or bytes: the fewest blocks that fit these per micro-batch
    offload_activations: bool  # the inputs of recomputed blocks wait in host memory
    source: Mapping[str, Any]  # the JSON as given

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.stages

    @property
    def offload_folders(self) -> tuple[str | None, str | None]:
        """Folders that optimizer states and parameters are offloaded to, None where they are not."""
        zero = self.source.get("zero_optimization", {})
        return (
            zero["offload_optimizer"]["nvme_path"] if self.offload_optimizer == "nvme" else None,
            zero["offload_param"]["nvme_path"] if self.offload_param == "nvme" else None,
        )

    def deepspeed_json(self, num_parameters: int, *, cpu: bool) -> dict[str, Any]:
        """What `deepspeed.initialize` gets beside the optimizer that we build, as a new dict.

        What the JSON gives stays. Where it is silent: the batch triple, clipping, gradients of autocast in fp32 as
        everywhere in torch, DeepSpeed's lines off, no device synchronisation for its throughput timer, and ZeRO's buffers sized to a model of
        `num_parameters` elements (DeepSpeed's defaults are for 10^9 and more).
        """
        out = {key: copy.deepcopy(value) for key, value in self.source.items() if key not in OWN_BLOCKS}
        out["train_batch_size"] = self.global_batch
        out["train_micro_batch_size_per_gpu"] = self.micro_batch
        out["gradient_accumulation_steps"] = self.accumulation
        out["gradient_clipping"] = self.gradient_clipping
        out["zero_allow_untested_optimizer"] = True  # SGD is untested, says DeepSpeed
        out["zero_force_ds_cpu_optimizer"] = False  # its CPU Adam is a compiled op
        speaks = [
            out.get(key) for key in ("steps_per_print", "dump_state", "memory_breakdown", "comms_logger")
        ]
        out.setdefault("log_level", "info" if any(speaks) else "warning")  # of DeepSpeed's own lines
        out.setdefault("steps_per_print", NO_PRINT)
        out.setdefault("timers", {"throughput": {"enabled": False}})
        if self.precision.startswith("autocast"):
            # DeepSpeed's default sums the gradients of convolutions in bf16, over micro-batches and ranks.
            out["torch_autocast"].setdefault("lower_precision_safe_modules", [])
        out["zero_optimization"] = self._zero_block(num_parameters, cpu)
        return out

    def _zero_block(self, num_parameters: int, cpu: bool) -> dict[str, Any]:
        zero = {**copy.deepcopy(self.source.get("zero_optimization", {})), "stage": self.zero_stage}
        if self.zero_stage == 0:
            return zero
        for key in ("offload_optimizer", "offload_param"):
            if (zero.get(key) or {}).get("device") == "nvme":
                # Its swapper is a compiled op: dsyolo moves the host's memory into a file (engine/offload.py).
                kept = {k: v for k, v in zero[key].items() if k not in ("device", "nvme_path", "pin_memory")}
                zero[key] = {**kept, "device": "cpu", "pin_memory": False}
        if cpu:
            zero.setdefault("overlap_comm", False)  # no streams to overlap on, but a second bucket
            for key in ("offload_optimizer", "offload_param"):
                if zero.get(key):
                    zero[key].setdefault("pin_memory", False)
        bucket = min(max(num_parameters // BUCKETS, MIN_BUCKET_ELEMENTS), MAX_BUCKET_ELEMENTS)
        zero.setdefault("reduce_bucket_size", _even(min(bucket, num_parameters)))
        zero.setdefault("allgather_bucket_size", min(_even(num_parameters), MAX_BUCKET_ELEMENTS))  # no memory
        is_small = num_parameters // self.data_parallel_size < MIN_SHARE_ELEMENTS
        zero.setdefault("use_multi_rank_bucket_allreduce", is_small)
        if self.zero_stage == 3:
            # At 10^9, the defaults of "live" and "reuse" keep every weight of a detector whole from its first
            # use to the step, which is what ZeRO-3 is there to avoid.
            part = _even(max(num_parameters // 4, 2**16))
            zero.setdefault("stage3_prefetch_bucket_size", min(part, MAX_BUCKET_ELEMENTS))
            zero.setdefault("stage3_max_live_parameters", part)
            zero.setdefault("stage3_max_reuse_distance", part)
            # BatchNorm's vectors (at most 1280 elements) stay whole: a gather of them costs more than they do.
            zero.setdefault(
                "stage3_param_persistence_threshold", min(max(num_parameters // 1000, 2048), 10**5)
            )
        return zero

    def _precision_in_words(self) -> str:
        words = self._computed_in()
        sums = self.source.get("data_types", {}).get("grad_accum_dtype", "fp32")
        if sums != "fp32" and self.precision not in ("bf16", "fp16"):
            words += f", but gradients summed in {sums}"
        sent = self.source.get("communication_data_type")
        return words + (f"; gradients sent in {sent}" if sent else "")

    def _computed_in(self) -> str:
        if self.precision == "fp32":
            return "everything in fp32"
        kind, always = self.precision.removeprefix("autocast_"), "BatchNorm, loss, optimizer and EMA in fp32"
        if kind == self.precision:
            sums = self.source.get("data_types", {}).get("grad_accum_dtype", kind)
            return f"convolutions and weights in {kind}, gradients summed in {sums}; master weights, {always}"
        if self.source["torch_autocast"].get("lower_precision_safe_modules", []):
            always = f"{always}; gradients of lower_precision_safe_modules in {kind}"
            return f"convolutions in {kind} (autocast); weights, {always}, others in fp32"
        return f"convolutions in {kind} (autocast); weights, gradients, {always}"

    def explain(self) -> list[str]:
        """A few lines for the start of a run: what runs."""
        ranks = f"{self.data_parallel_size} rank{'s' if self.data_parallel_size > 1 else ''}"
        batch = f"batch: {self.global_batch} images per step = {self.micro_batch} per GPU"
        sharded = ("nothing sharded", "optimizer states", "optimizer states and gradients", "all states")
        offload = ", ".join(
            f"{what} {f'in files in {folder}' if folder else f'on {device}'}"
            for what, device, folder in (
                ("optimizer", self.offload_optimizer, self.offload_folders[0]),
                ("parameters", self.offload_param, self.offload_folders[1]),
            )
            if device
        )
        params = ", ".join(f"{key} {value}" for key, value in self.optimizer_params.items())
        lines = [
            f"{batch} x {self.accumulation} accumulation x {ranks}",
            f"precision: {self._precision_in_words()}",
            f"ZeRO {self.zero_stage}: {sharded[self.zero_stage]}"
            + f"{' sharded' if self.zero_stage else ''}; offload: {offload or 'none'}",
            f"optimizer: {self.optimizer}, {params}",
            f"gradient norm: {f'clipped at {self.gradient_clipping:g}' if self.gradient_clipping else 'not clipped'}",
        ]
        if self.recompute != "none":
            what = "all blocks" if self.recompute == "blocks" else "the fewest blocks that fit the budget"
            lines.append(
                f"recompute: {what}{', their inputs in host memory' if self.offload_activations else ''}"
            )
        if self.stages > 1:
            lines.append(f"pipeline: {self.stages} stages, partition {self.partition}")
        return lines


def check(
    config: str | Path | Mapping[str, Any],
    *,
    world_size: int,
    accelerator: str,
    layers: Sequence[bool] | None = None,
    recompute: str = "auto",
    halved: bool = False,
    saved_batch: int | None = None,
    name: str | None = None,
) -> DsConfig:
    """The DeepSpeed configuration of a file or dict, for so many ranks.

    Args:
        config: path of the JSON, or its content.
        world_size: ranks of the run, all hosts together.
        accelerator: DeepSpeed's name of the device: `cpu`, `cuda`, ...
        layers: of the network's sequence, whether each has parameters, for a pipeline to be checked against it.
        recompute: what the command line says of it; `auto` leaves it to the JSON.
        halved: half of the JSON's micro-batch, twice the accumulation.
        saved_batch: global batch of the run that goes on. It stays on any ranks that divide it: micro-batch and
            accumulation are fitted, where a run that begins must have them right.
        name: of the file that a content comes from.

    Raises:
        UserError: every problem of the file, each with what was given, the rule and the remedy.
    """
    assert world_size >= 1, world_size
    path = name if isinstance(config, Mapping) else str(config)
    problems: list[str] = []
    source = dict(config) if isinstance(config, Mapping) else read_json(str(path), problems)
    result = None
    if source is not None:
        more = (accelerator, layers, recompute, halved, saved_batch)
        result = _resolve(path, source, world_size, *more, problems)
    if problems or result is None:
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        raise UserError(f"{path or 'The DeepSpeed configuration'} cannot be used on {ranks}", problems)
    return result


def _resolve(
    path: str | None,
    source: dict[str, Any],
    world_size: int,
    accelerator: str,
    layers: Sequence[bool] | None,
    recompute: str,
    halved: bool,
    saved_batch: int | None,
    problems: list[str],
) -> DsConfig | None:
    """The whole, or None; problems are added in the order in which a reader wants them."""
    faults: list[str] = []
    sane = sane_part(source, faults)
    zero_stage = int(sane.get("zero_optimization", {}).get("stage", 0))
    stages, partition = pipeline(sane, zero_stage, world_size, layers, faults)
    batch = batch_triple(source, sane, world_size, stages, problems, saved_batch)
    problems += faults
    optimizer, params = optimizer_and_params(sane, problems)
    kind = precision(sane, accelerator, zero_stage, problems)
    data_types(sane, kind, zero_stage, problems)
    offload_optimizer, offload_param = offload(sane, zero_stage, problems)
    recomputed, offload_activations = activations(sane, stages, recompute, problems)
    monitors(sane, stages, problems)
    if batch and halved:
        batch = halve(batch, problems)
    if batch is None:
        return None
    return DsConfig(
        path=path,
        world_size=world_size,
        global_batch=batch[0],
        micro_batch=batch[1],
        accumulation=batch[2],
        zero_stage=zero_stage,
        precision=kind,
        optimizer=optimizer,
        optimizer_params=params,
        gradient_clipping=float(sane.get("gradient_clipping", GRADIENT_CLIPPING)),
        offload_optimizer=offload_optimizer,
        offload_param=offload_param,
        stages=stages,
        partition=partition,
        recompute=recomputed,
        offload_activations=offload_activations,
        source=source,
    )


def _even(elements: int) -> int:
    return elements + elements % 2
