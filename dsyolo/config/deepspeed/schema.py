"""Every key that DeepSpeed 0.19 knows in its JSON, and how dsyolo treats it.

Three kinds: a `JsonKey` is checked and handed on; a `JsonSection` is a block of keys; a `Refused` key is DeepSpeed's,
but has no use here, or another owner: it is refused with its reason, unless its value is the one that turns it off.
Source: DeepSpeed 0.19.8, runtime/config.py, runtime/zero/config.py, runtime/precision_config.py and the
modules that they read. `tests/config/test_deepspeed_config.py` compares these tables with the installed package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsyolo.config.run_config import RECOMPUTE_RULE, read_recompute

NEVER = object()  # no value turns the key off: DeepSpeed refuses its presence, or a value would do nothing


@dataclass(frozen=True)
class JsonKey:
    """A value: its rule as text, as in "must be ...", and whether a value of JSON keeps it."""

    rule: str
    keeps: Callable[[Any], bool]


@dataclass(frozen=True)
class JsonSection:
    """A block of keys."""

    keys: Keys
    may_be_null: bool = False


@dataclass(frozen=True)
class Refused:
    """Not usable: why, and what to do. `off` is the value that turns it off, which is let through."""

    reason: str
    off: Any = False

    def lets_through(self, value: Any) -> bool:
        if self.off is NEVER:
            return False
        disabled = isinstance(value, dict) and value.get("enabled") is False
        same_kind = isinstance(value, bool) == isinstance(self.off, bool)  # 0 is not false
        return (same_kind and value == self.off) or (self.off is False and disabled)


Keys: TypeAlias = Mapping[str, JsonKey | JsonSection | Refused]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int = 0, *, even: bool = False) -> JsonKey:
    """Describe a whole number; 5e8 is one."""
    rule = f"{'an even' if even else 'a'} whole number of at least {least}"
    return JsonKey(rule, lambda v: _is_number(v) and v == int(v) and v >= least and not (even and v % 2))


def number(least: float = 0.0, *, above: bool = False, below: float = math.inf) -> JsonKey:
    """Describe a finite number: of at least `least`, or `above` it, and `below` a bound."""
    rule = f"a number {'above' if above else 'of at least'} {least:g}"
    rule += f" and below {below:g}" if below < math.inf else ""
    return JsonKey(rule, lambda v: _is_number(v) and (v > least if above else v >= least) and v < below)


def one_of(*values: str) -> JsonKey:
    """Describe one of these strings."""
    names = [json.dumps(value) for value in values]
    return JsonKey(" or ".join(names), lambda v: isinstance(v, str) and v in values)


FLAG = JsonKey("true or false", lambda v: isinstance(v, bool))
TEXT = JsonKey("a string", lambda v: isinstance(v, str))
TEXTS = JsonKey("a list of strings", lambda v: isinstance(v, list) and {*map(type, v)} <= {str})
BETAS = JsonKey(
    "two numbers of at least 0 and below 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(_is_number(x) and 0 <= x < 1 for x in v),
)
PATTERNS = JsonKey('"auto" or a list of names', lambda v: v == "auto" or TEXTS.keeps(v))
PARTITION = JsonKey(
    '"balanced" or an increasing list of layer indices',
    lambda v: (
        v == "balanced" or (isinstance(v, list) and all(whole(1).keeps(x) for x in v) and v == sorted(set(v)))
    ),
)
RECOMPUTE = JsonKey(RECOMPUTE_RULE, lambda v: isinstance(v, str) and read_recompute(v) is not None)
DTYPE = one_of("fp32", "fp16", "bf16")

BFLOAT16_NAMES = ("bfloat16", "bf16", "torch.bfloat16")
FLOAT16_NAMES = ("float16", "fp16", "torch.float16", "half")

_REMOVED = "DeepSpeed removed it. Leave it out."
_PLAIN_MEAN = "the loss relies on DeepSpeed's plain mean over ranks. Leave it out."
_OWN_CHECKPOINTS = "dsyolo writes its own checkpoints of named tensors. Leave it out."
_OWN_TRACKING = "the run configuration owns tracking. Leave it out and use --wandb."
_OWN_FOLDER = "offload to NVMe uses memory-mapped files here, not DeepSpeed's asynchronous I/O. Leave it out."
_DETECTOR = "it is made for language models and has no use in a detector. Leave it out."
_FP32_MASTER = "checkpoints hold fp32 master weights and states. Leave it out."
_QUANTIZED = "quantised collectives need a compiled op and are not supported. Leave it out."


def _each(names: str, key: JsonKey | JsonSection | Refused) -> Keys:
    """Return the same rule for several keys."""
    return dict.fromkeys(names.split(), key)


def _renamed(name: str) -> Refused:
    return Refused(f"an old name. Write {name}.", NEVER)


MAX_GRAD_NORM = Refused("an optimizer does not clip. Set gradient_clipping, at the top level.", NEVER)

_OFFLOAD: Keys = {
    "device": one_of("none", "cpu", "nvme"),
    "pin_memory": FLAG,
    "buffer_count": whole(),
    "nvme_path": JsonKey("the path of a folder, as a string", lambda v: isinstance(v, str) and v != ""),
}
OFFLOAD_OPTIMIZER: Keys = {
    **_OFFLOAD,
    **_each("pipeline_read pipeline_write fast_init", Refused(_OWN_FOLDER)),
    "ratio": Refused("partial offload needs DeepSpeed's compiled Adam. Leave it out.", 1.0),
    "super_offload": Refused("SuperOffload is made for Grace Hopper and Adam only. Leave it out."),
    "cpuadam_cores_perc": Refused("it belongs to SuperOffload. Leave it out.", NEVER),
}
OFFLOAD_PARAM: Keys = {**_OFFLOAD, "buffer_size": whole(), "max_in_cpu": whole()}

_STAGE3: Keys = {
    **_each("prefetch_bucket_size param_persistence_threshold model_persistence_threshold", whole()),
    **_each("max_live_parameters max_reuse_distance", whole()),
    **_each("use_all_reduce_for_fetch_params allgather_sequential", FLAG),
    "module_granularity_threshold": Refused("gathering whole blocks fails in DeepSpeed. Leave it out.", 0),
    "gather_16bit_weights_on_model_save": Refused(_OWN_CHECKPOINTS),
}

ZERO: Keys = {
    "stage": JsonKey("0, 1, 2 or 3", lambda v: whole().keeps(v) and v <= 3),
    **_each("reduce_bucket_size sub_group_size", whole(1)),
    "allgather_bucket_size": whole(2, even=True),  # DeepSpeed asserts a multiple of 2
    **_each("contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions", FLAG),
    **_each("overlap_comm ignore_unused_parameters parameter_alignment memory_efficient_linear", FLAG),
    **_each("override_module_apply log_trace_cache_warnings enable_sanity_checks", FLAG),
    "offload_optimizer": JsonSection(OFFLOAD_OPTIMIZER, may_be_null=True),
    "offload_param": JsonSection(OFFLOAD_PARAM, may_be_null=True),
    "round_robin_gradients": Refused(
        "it deals weights out in an order that dsyolo cannot checkpoint. Leave it out."
    ),
    **{f"stage3_{name}": key for name, key in _STAGE3.items()},
    **{name: _renamed(f"stage3_{name}") for name in _STAGE3},
    **_each("stage3_gather_fp16_weights_on_model_save elastic_checkpoint", Refused(_OWN_CHECKPOINTS)),
    "pipeline_loading_checkpoint": Refused(_OWN_CHECKPOINTS),
    "load_from_fp32_weights": Refused(_OWN_CHECKPOINTS, True),
    "compute_grad_norm": Refused("clipping and the log need the norm. Leave it out.", True),
    "zenflow": Refused("ZenFlow transposes 4-D gradients, and so breaks convolutions. Leave it out.", None),
    "cpu_offload": _renamed('offload_optimizer: {"device": "cpu"}'),
    "cpu_offload_param": _renamed('offload_param: {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": _renamed("pin_memory in offload_optimizer or offload_param"),
    "legacy_stage1": Refused(_REMOVED),
    **_each("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param", Refused(_REMOVED, NEVER)),
    "zero_hpz_partition_size": Refused("secondary partitions (ZeRO++) are not supported. Leave it out.", 1),
    **_each("zero_quantized_weights zero_quantized_nontrainable_weights", Refused(_QUANTIZED)),
    "zero_quantized_gradients": Refused(_QUANTIZED),
    "save_muon_momentum_buffer_in_memory": Refused("the optimizer Muon is not supported. Leave it out."),
    "leaf_module": Refused("it is made for mixtures of experts. Leave it out.", NEVER),
}

FP16: Keys = {
    **_each("enabled consecutive_hysteresis", FLAG),
    "auto_cast": Refused("images enter as uint8 and the stem casts them. Leave it out."),
    "loss_scale": number(),
    "initial_scale_power": whole(),
    **_each("loss_scale_window hysteresis min_loss_scale", whole(1)),
    "fp16_master_weights_and_grads": Refused(_FP32_MASTER),
}
BF16: Keys = {
    **_each("enabled immediate_grad_update check_grad_overflow", FLAG),
    **_each("bf16_master_weights_and_grads bf16_optimizer_states", Refused(_FP32_MASTER)),
}
TORCH_AUTOCAST: Keys = {
    "enabled": FLAG,
    "dtype": JsonKey(
        '"bfloat16" or "float16"', lambda v: isinstance(v, str) and v in BFLOAT16_NAMES + FLOAT16_NAMES
    ),
    # DeepSpeed imports what is named there.
    "lower_precision_safe_modules": JsonKey(
        'a list, empty or of "torch.nn.Conv2d"', lambda v: v == [] or v == ["torch.nn.Conv2d"]
    ),
}
_OWN_CUTS = "dsyolo cuts the network itself, by time and by bytes. Leave it out."
PIPELINE: Keys = {
    "stages": whole(1),
    "partition": PARTITION,
    "seed_layers": Refused(_OWN_CUTS),
    "activation_checkpoint_interval": Refused("set activation_checkpointing instead.", 0),
    **_each(
        "pipe_partitioned grad_partitioned", Refused("it belongs to tensor parallelism. Leave it out.", NEVER)
    ),
}
ACTIVATION_CHECKPOINTING: Keys = {
    "recompute": RECOMPUTE,  # ours
    "cpu_checkpointing": FLAG,
    "partition_activations": Refused("it splits them over tensor-parallel ranks. Leave it out."),
    "contiguous_memory_optimization": Refused("it needs partition_activations. Leave it out."),
    "number_checkpoints": Refused("recompute says what is computed again. Leave it out.", None),
    "synchronize_checkpoint_boundary": Refused("it waits for the device at every block. Leave it out."),
    "profile": Refused("it waits for the device at every block. Use flops_profiler."),
}
_MONITOR = JsonSection({"enabled": FLAG, "output_path": TEXT, "job_name": TEXT})

TOP_LEVEL: Keys = {
    **_each("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps", whole(1)),
    "gradient_clipping": number(),
    "optimizer": JsonSection({}),  # its keys follow from its type: optimizer_table.py
    "scheduler": JsonSection({}, may_be_null=True),  # its keys follow from its type: scheduler_table.py
    "zero_optimization": JsonSection(ZERO),
    "fp16": JsonSection(FP16),
    "bf16": JsonSection(BF16),
    "torch_autocast": JsonSection(TORCH_AUTOCAST),
    "data_types": JsonSection(
        {**_each("grad_accum_dtype param_dtype buffer_dtype", DTYPE), "keep_in_fp32_modules": PATTERNS}
    ),
    "communication_data_type": DTYPE,
    "pipeline": JsonSection(PIPELINE),
    "activation_checkpointing": JsonSection(ACTIVATION_CHECKPOINTING),
    # Handed on as they are.
    "steps_per_print": whole(1),
    **_each("dump_state disable_python_gc wall_clock_breakdown memory_breakdown", FLAG),
    "log_level": one_of("debug", "info", "warning", "error", "critical"),
    "timers": JsonSection({"throughput": JsonSection({"enabled": FLAG, "synchronized": FLAG})}),
    "flops_profiler": JsonSection(
        {
            **_each("enabled detailed", FLAG),
            **_each("profile_step top_modules", whole(1)),
            "recompute_fwd_factor": number(),
            "module_depth": whole(-1),
            "output_file": JsonKey("a string or null", lambda v: v is None or isinstance(v, str)),
        }
    ),
    "comms_logger": JsonSection({**_each("enabled prof_all verbose debug", FLAG), "prof_ops": TEXTS}),
    **_each("tensorboard csv_monitor", _MONITOR),
    # Ours.
    **_each("wandb comet", Refused(_OWN_TRACKING)),
    "zero_allow_untested_optimizer": Refused("dsyolo sets it to true. Leave it out.", True),
    "zero_force_ds_cpu_optimizer": Refused("dsyolo sets it to false. Leave it out.", False),
    "managed_gradient_accumulation": Refused(
        "dsyolo relies on DeepSpeed's accumulation. Leave it out.", True
    ),
    "dataloader_drop_last": Refused("dsyolo has its own loader. Leave it out."),
    **_each("checkpoint nebula", Refused(_OWN_CHECKPOINTS, NEVER)),
    "datastates_ckpt": Refused(_OWN_CHECKPOINTS),
    # Would change the gradient.
    "prescale_gradients": Refused(_PLAIN_MEAN),
    "gradient_predivide_factor": Refused(_PLAIN_MEAN, 1.0),
    "gradient_allreduce_op": Refused(_PLAIN_MEAN, "mean"),
    # No use here.
    **_each("compression_training curriculum_learning eigenvalue graph_harvesting", Refused(_REMOVED, NEVER)),
    **_each("progressive_layer_drop quantize_training", Refused(_REMOVED, NEVER)),
    **_each("sparse_attention sparse_gradients", Refused(_REMOVED, NEVER)),
    "bfloat16": _renamed("bf16"),
    "amp": Refused("DeepSpeed removed Apex AMP. Use torch_autocast.", NEVER),
    "aio": Refused(_OWN_FOLDER, NEVER),
    "autotuning": Refused("the autotuner restarts the program with other batch sizes. Leave it out."),
    "compile": Refused("DeepCompile is not supported. Leave it out.", {"deepcompile": False}),
    "data_efficiency": Refused("curricula and random-LTD work on sequences of tokens. Leave it out."),
    "disable_allgather": Refused("DeepSpeed reads it and uses it nowhere. Leave it out."),
    "elasticity": Refused(
        "DeepSpeed removed it. Leave it out: --resume takes any ranks that divide the batch.", NEVER
    ),
    "expert_parallel": Refused("a detector has no experts. Leave it out.", NEVER),
    "use_data_before_expert_parallelism": Refused("a detector has no experts. Leave it out."),
    **_each("hybrid_engine weight_quantization", Refused(_DETECTOR)),
    "tensor_parallel": Refused("convolutions are not split over ranks. Use ZeRO or pipeline.", NEVER),
    "sequence_parallel_size": Refused("a detector has no sequence to split. Leave it out.", 1),
    "data_parallel_size": Refused("it follows from the ranks and the stages. Leave it out.", NEVER),
    **_each("seq_parallel_communication_data_type vocabulary_size", Refused(_DETECTOR, NEVER)),
    "allgather_size": _renamed("zero_optimization.allgather_bucket_size"),
}
