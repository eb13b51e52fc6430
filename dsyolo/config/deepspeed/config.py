"""Checks and explains the DeepSpeed JSON, which sets how a training runs. Needs neither torch nor DeepSpeed.

DeepSpeed ignores unknown keys, and finds wrong arithmetic after every rank has built its model. Here one error names
all problems within a second. The blocks that dsyolo owns are taken out before DeepSpeed sees the JSON.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.config.deepspeed import rules
from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS, batch_json, batch_plan, halved, open_batch
from dsyolo.config.deepspeed.json_reader import JsonSource, read_json, settled, valid_part
from dsyolo.config.deepspeed.scheduler_table import scheduler_spec
from dsyolo.config.deepspeed.set_aside import Reason, merged, remove, without_effect
from dsyolo.config.deepspeed.set_aside import explain as explain_set_aside
from dsyolo.config.messages import counted
from dsyolo.config.recipe import NOMINAL_BATCH
from dsyolo.config.spec import BatchPlan, OptimizerSpec, Parallelism, Precision, SchedulerSpec

GRADIENT_CLIPPING = 10.0  # the recipe's; DeepSpeed's own default, 1.0, would silently be another training
# Read by dsyolo; DeepSpeed gets objects instead.
OWN_BLOCKS = ("optimizer", "scheduler", "pipeline", "activation_checkpointing")

# A bucket is allocated whole. A sixth of the elements holds the largest weight of every variant (yolov5n's and
# yolov5s's are a sixth), so that no gradient needs a copy of its own, and what is full can travel during backward.
BUCKETS = 6
MAX_BUCKET_ELEMENTS = 2**24  # 67 MB
MIN_BUCKET_ELEMENTS = 2**20  # 4 MB: smaller messages cost more time than their bytes
# DeepSpeed's default sums a bucket that several ranks own parts of on all of them, and sends half as much again as ZeRO
# needs. One reduction for each owner sends what is needed, in more messages: for shares of 1 MB and more.
MIN_SHARE_ELEMENTS = 2**18
PRINTING_KEYS = ("steps_per_print", "dump_state", "memory_breakdown", "comms_logger")
UNNAMED = "The DeepSpeed configuration"  # where no file gives it
NO_PRINT = 10**9  # steps between DeepSpeed's own lines; dsyolo's tracker prints


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A checked DeepSpeed JSON on a given number of ranks, with everything resolved that DeepSpeed derives."""

    path: str  # the file, for messages
    world_size: int
    batch: BatchPlan
    precision: Precision
    optimizer: OptimizerSpec
    parallelism: Parallelism
    gradient_clipping: float  # largest norm of the gradient; 0: none
    source: Mapping[str, Any]  # the JSON as given, without what is set aside
    scheduler: SchedulerSpec | None = None  # None: the recipe's schedule
    set_aside: tuple[Reason, ...] = ()  # keys of the JSON that have no effect here

    @property
    def global_batch(self) -> int:
        return self.batch.global_batch

    @property
    def micro_batch(self) -> int:
        return self.batch.micro

    @property
    def accumulation(self) -> int:
        return self.batch.accumulation

    @property
    def dp_size(self) -> int:
        return self.batch.dp_size

    @property
    def zero_stage(self) -> int:
        return self.parallelism.zero_stage

    @property
    def stages(self) -> int:
        return self.parallelism.stages

    @property
    def sent_type(self) -> str | None:
        """Return the type that gradients are sent in, where the JSON gives one that DeepSpeed heeds."""
        return (
            None
            if self.precision.is_autocast and self.zero_stage
            else self.source.get("communication_data_type")
        )

    @property
    def num_gradient_types(self) -> int:
        """Return the number of types of gradients that are sent: ZeRO has a bucket for each."""
        autocast = self.source["torch_autocast"] if self.precision.is_autocast else {}
        return 2 if autocast.get("lower_precision_safe_modules") else 1

    def optimizer_json(self) -> dict[str, Any]:
        """Return the block of a DeepSpeed JSON that asks for this optimizer."""
        coupled = {"adam_w_mode": False} if self.optimizer.type == "Adam" else {}
        return {"type": self.optimizer.type, "params": {**self.optimizer.params, **coupled}}

    def own_blocks(self) -> dict[str, Any]:
        """Return the blocks that DeepSpeed does not get, as given, without the optimizer's."""
        given = (key for key in OWN_BLOCKS if key != "optimizer" and key in self.source)
        return {key: copy.deepcopy(self.source[key]) for key in given}

    def deepspeed_json(self, num_parameters: int, *, cpu: bool) -> dict[str, Any]:
        """Return what `deepspeed.initialize` gets beside the optimizer that we build, as a new dict.

        The JSON's own values stay. Added are the batch triple, clipping, fp32 gradients under autocast as in torch, and
        buffers of ZeRO sized to a model of `num_parameters` elements (DeepSpeed's defaults are for 10^9 and more).
        DeepSpeed's own lines are off, and so is the device synchronisation of its throughput timer.
        """
        out = {key: copy.deepcopy(value) for key, value in self.source.items() if key not in OWN_BLOCKS}
        out |= batch_json(self.batch)
        out["gradient_clipping"] = self.gradient_clipping
        out["zero_allow_untested_optimizer"] = True  # SGD is untested for DeepSpeed
        out["zero_force_ds_cpu_optimizer"] = False  # its CPU Adam is a compiled op
        prints = any(out.get(key) for key in PRINTING_KEYS)
        out.setdefault("log_level", "info" if prints else "warning")  # level of DeepSpeed's own lines
        out.setdefault("steps_per_print", NO_PRINT)
        out.setdefault("timers", {"throughput": {"enabled": False}})
        if self.precision.is_autocast:
            # DeepSpeed's default sums the gradients of convolutions in bf16, over micro-batches and ranks.
            out["torch_autocast"].setdefault("lower_precision_safe_modules", [])
        out["zero_optimization"] = self._zero_block(num_parameters, cpu)
        return out

    def _zero_block(self, num_parameters: int, cpu: bool) -> dict[str, Any]:
        zero = {**copy.deepcopy(self.source.get("zero_optimization", {})), "stage": self.zero_stage}
        if self.zero_stage == 0:
            return zero
        if cpu:
            zero.setdefault("overlap_comm", False)  # no streams to overlap on, but a second bucket
        for key in ("offload_optimizer", "offload_param"):
            block = zero.get(key) or {}
            if block.get("device") == "nvme":
                # Its swapper is a compiled op: dsyolo moves the host's memory into a file (engine/offload.py).
                kept = {k: v for k, v in block.items() if k not in ("device", "nvme_path", "pin_memory")}
                zero[key] = {**kept, "device": "cpu", "pin_memory": False}
            elif cpu and block:
                block.setdefault("pin_memory", False)
        bucket = min(max(num_parameters // BUCKETS, MIN_BUCKET_ELEMENTS), MAX_BUCKET_ELEMENTS)
        zero.setdefault("reduce_bucket_size", _even(min(bucket, num_parameters)))
        zero.setdefault("allgather_bucket_size", min(_even(num_parameters), MAX_BUCKET_ELEMENTS))  # no memory
        is_small = num_parameters // self.dp_size < MIN_SHARE_ELEMENTS
        zero.setdefault("use_multi_rank_bucket_allreduce", is_small)
        if self.zero_stage == 3:
            # At 10^9, the defaults of "live" and "reuse" keep every weight of a detector whole from its first
            # use to the step, which is what ZeRO-3 is there to avoid.
            part = _even(max(num_parameters // 4, 2**16))
            zero.setdefault("stage3_prefetch_bucket_size", min(part, MAX_BUCKET_ELEMENTS))
            zero.setdefault("stage3_max_live_parameters", part)
            zero.setdefault("stage3_max_reuse_distance", part)
            # BatchNorm's vectors (at most 1280 elements) stay whole: a gather of them costs more than they do.
            least = min(max(num_parameters // 1000, 2048), 10**5)
            zero.setdefault("stage3_param_persistence_threshold", least)
        return zero

    def _explain_precision(self) -> str:
        kinds = self.precision
        always = "BatchNorm, loss, optimizer and EMA in fp32"
        if kinds.params != "fp32":
            text = f"convolutions and weights in {kinds.params}, gradients summed in {kinds.grads}; master weights, {always}"
        elif not kinds.is_autocast:
            text = "everything in fp32"
        elif self.num_gradient_types > 1:
            always += f"; gradients of lower_precision_safe_modules in {kinds.compute}"
            text = f"convolutions in {kinds.compute} (autocast); weights, {always}, others in fp32"
        else:
            text = f"convolutions in {kinds.compute} (autocast); weights, gradients, {always}"
        if kinds.params == "fp32" != kinds.grads:
            text += f", but gradients summed in {kinds.grads}"
        sent = self.source.get("communication_data_type")
        return text + (f"; gradients sent in {sent}" if sent else "")

    def _explain_offload(self) -> str:
        offload = self.parallelism.offload
        whats = zip(("optimizer", "parameters"), offload.devices, offload.folders, strict=True)
        parts = [f"{what} in files in {to}" if to else f"{what} on {on}" for what, on, to in whats if on]
        return ", ".join(parts) or "none"

    def _explain_optimizer(self) -> list[str]:
        spec = self.optimizer
        params = ", ".join(f"{key} {value}" for key, value in spec.params.items())
        runs = spec.weight_decay_at(self.global_batch)
        scaled = (
            f" (weight_decay x {self.global_batch} / {NOMINAL_BATCH} images)"
            if spec.scales_weight_decay
            else ""
        )
        which = "on the weights of convolutions and other matrices; none on norms and biases"
        decay = f"weight decay: {runs:g}{scaled}, {which}" if runs else "weight decay: none"
        return [f"optimizer: {spec.type}, {params}", decay]

    def explain(self) -> list[str]:
        """Return a few lines for the start of a run: how it runs."""
        batch, parallelism = self.batch, self.parallelism
        sharded = ("nothing", "optimizer states", "optimizer states and gradients", "all states")
        clipped = f"clipped at {self.gradient_clipping:g}" if self.gradient_clipping else "not clipped"
        lines = [
            f"batch: {batch.global_batch} images per step = {batch.micro} per GPU x {batch.accumulation} accumulation "
            f"x {counted(batch.dp_size, 'rank')}",
            f"precision: {self._explain_precision()}",
            f"ZeRO {self.zero_stage}: {sharded[self.zero_stage]} sharded; offload: {self._explain_offload()}",
            *self._explain_optimizer(),
            f"gradient norm: {clipped}",
        ]
        if parallelism.recompute != "none":
            is_all = parallelism.recompute == "blocks"
            what = "all blocks" if is_all else "the fewest blocks that fit the budget"
            where = ", their inputs in host memory" if parallelism.offload.activations else ""
            lines.append(f"recompute: {what}{where}")
        if self.stages > 1:
            lines.append(f"pipeline: {self.stages} stages, partition {parallelism.partition}")
        return [*lines, *explain_set_aside(self.set_aside)]


def check(
    config: str | Path | Mapping[str, Any] | JsonSource,
    *,
    world_size: int,
    accelerator: str,
    layers: Sequence[bool] | None = None,
    recompute: str = "auto",
    halve: bool = False,
    saved_batch: int | None = None,
    name: str = UNNAMED,
) -> DeepSpeedConfig:
    """Check a DeepSpeed JSON by all rules, for so many ranks, and resolve it.

    Args:
        config: path of the JSON, its content, or the JSON as read: where that leaves its batch open, the recipe's is taken.
        world_size: ranks of the run, all hosts together.
        accelerator: DeepSpeed's name of the device: `cpu`, `cuda`, ...
        layers: of the network's sequence, whether each has parameters, for a pipeline to be checked against it.
        recompute: the option; `auto` leaves it to the JSON.
        halve: take half of the JSON's micro-batch, and twice the accumulation.
        saved_batch: global batch of the resumed run. It stays on any ranks that divide it: micro-batch and
            accumulation are fitted, where a run that begins must have them right.
        name: of the file that a content comes from.

    Raises:
        UserError: every problem of the file, each with what was given, the rule and the remedy.
    """
    assert world_size >= 1, world_size
    if isinstance(config, Mapping):
        config = JsonSource(name, config)
    elif not isinstance(config, JsonSource):
        config = read_json(config)
    config = settled(config)
    problems = list(config.problems)
    if config.content is None:
        raise cannot_be_used(config.name, world_size, problems)
    source = copy.deepcopy(dict(config.content))
    if config.left_open and (open_to := open_batch(source, world_size, config.left_open)):
        source[BATCH_KEYS[0]] = open_to
    faults: list[str] = []
    valid = valid_part(source, faults)
    set_aside = merged(config.set_aside, found := tuple(without_effect(valid, recompute)))
    remove(valid, found)
    remove(source, found)
    zero_stage = int(valid.get("zero_optimization", {}).get("stage", 0))
    stages, partition = rules.pipeline(valid, zero_stage, world_size, layers, faults)
    batch = batch_plan(source, valid, world_size, stages, problems, saved_batch)
    problems += faults  # a reader wants those of the batch first
    runs = rules.optimizer(valid, problems)
    scheduler = scheduler_spec(valid, frozenset(config.left_open), problems)
    kinds = rules.precision(valid, accelerator, zero_stage, problems)
    kinds = rules.data_types(valid, kinds, zero_stage, problems)
    offloaded = rules.offload(valid, zero_stage, problems)
    recomputed, offload_activations = rules.activations(valid, stages, recompute, problems)
    rules.monitors(valid, stages, problems)
    if batch and halve:
        batch = halved(batch, problems)
    if problems or batch is None:
        raise cannot_be_used(config.name, world_size, problems)
    offloaded = replace(offloaded, activations=offload_activations)
    parallelism = Parallelism(zero_stage, stages, partition, offloaded, recomputed)
    clipping = float(valid.get("gradient_clipping", GRADIENT_CLIPPING))
    return DeepSpeedConfig(
        config.name, world_size, batch, kinds, runs, parallelism, clipping, source, scheduler, set_aside
    )


def cannot_be_used(path: str, world_size: int, problems: Sequence[str]) -> UserError:
    """Return the error of a JSON with these problems."""
    return UserError(f"{path} cannot be used on {counted(world_size, 'rank')}", problems)


def _even(elements: int) -> int:
    return elements + elements % 2
