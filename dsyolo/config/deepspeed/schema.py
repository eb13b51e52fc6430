"""Every key that DeepSpeed 0.19 knows in its JSON, and how dsyolo treats it.

Verdicts: a `JsonKey` is honoured; a `JsonSection` is a block of keys; a `SetAside` key is harmless and has no effect
here; a `Refused` key would be another training, or has another owner, unless its value turns it off, which sets it
aside; an `Alias` is another spelling. `set_aside.py` applies those that need no more than the key.
Source: DeepSpeed 0.19.8, runtime/config.py, runtime/zero/config.py, runtime/precision_config.py and the
modules that they read. `tests/config/test_deepspeed_config.py` compares these tables with the installed package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from dsyolo.config.deepspeed.verdicts import NEVER, Alias, JsonKey, JsonSection, Keys, Refused, SetAside
from dsyolo.config.run_config import AUTO, RECOMPUTE_RULE, read_recompute

__all__ = ["NEVER", "Alias", "JsonKey", "JsonSection", "Keys", "Refused", "SetAside"]  # found here too


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def whole(least: int = 0, *, even: bool = False) -> JsonKey:
    """Describe a whole number; 5e8 is one."""
    rule = f"{'an even' if even else 'a'} whole number of at least {least}"
    return JsonKey(rule, lambda v: _is_number(v) and v == int(v) and v >= least and not (even and v % 2))


def number(least: float = 0.0, *, above: bool = False, below: float = math.inf) -> JsonKey:
    """Describe a finite number: of at least `least`, or `above` it, and `below` a bound."""
    rule = f"a number {'above' if above else 'of at least'} {least:g}"
    rule += f" and below {below:g}" if below < math.inf else ""
    return JsonKey(rule, lambda v: _is_number(v) and (v > least if above else v >= least) and v < below)


def one_of(*values: str, remedy: Callable[[Any], str] | None = None) -> JsonKey:
    """Describe one of these strings."""
    names = [json.dumps(value) for value in values]
    return JsonKey(" or ".join(names), lambda v: isinstance(v, str) and v in values, remedy)


FLAG = JsonKey("true or false", lambda v: isinstance(v, bool))
PRINT_STEPS = JsonKey("a number above 0", lambda v: _is_number(v) and v > 0)  # DeepSpeed takes fractions
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
RECOMPUTE = JsonKey(  # "auto" is left to --recompute
    RECOMPUTE_RULE, lambda v: isinstance(v, str) and (v == AUTO or read_recompute(v) is not None)
)
BFLOAT16_NAMES = ("bfloat16", "bf16", "torch.bfloat16")
FLOAT16_NAMES = ("float16", "fp16", "torch.float16", "half")
FLOAT32_NAMES = ("float32", "fp32", "torch.float32", "float")


def short_dtype(value: Any) -> Any:
    """Return the short name of a type, as in bf16; any other value as it is."""
    names = {"bf16": BFLOAT16_NAMES, "fp16": FLOAT16_NAMES, "fp32": FLOAT32_NAMES}
    return next((short for short, known in names.items() if isinstance(value, str) and value in known), value)


def _dtype_remedy(value: Any) -> str:
    short = short_dtype(value)
    return f"Write {json.dumps(short)}" if short != value else "Write one of them"


DTYPE = one_of("fp32", "fp16", "bf16", remedy=_dtype_remedy)

_REMOVED = "DeepSpeed removed it. Leave it out."
_PLAIN_MEAN = "the loss relies on DeepSpeed's plain mean over ranks. Leave it out."
_OWN_CHECKPOINTS = SetAside("dsyolo writes its own checkpoints of named tensors")
_OWN_WEIGHTS = SetAside("dsyolo's weights files are whole and in fp32")
_OWN_TRACKING = "the run configuration owns tracking. Leave it out and use --wandb."
_OWN_FOLDER = SetAside("offload to a folder uses memory-mapped files, and no asynchronous I/O")
_DETECTOR = SetAside("it is made for language models")
_OWN_MEAN = SetAside("the mean gradient is the same without it")
_FP32_MASTER = "checkpoints hold fp32 master weights and states. Leave it out."
_QUANTIZED = "quantised collectives need a compiled op and are not supported. Leave it out."


def _each(names: str, key: JsonKey | JsonSection | Refused | SetAside) -> Keys:
    """Return the same rule for several keys."""
    return dict.fromkeys(names.split(), key)


def _given_as(name: str) -> str:
    return f"so is {name}, which replaced it. Leave one out."


MAX_GRAD_NORM = Refused("an optimizer does not clip. Set gradient_clipping, at the top level.", NEVER)

_OFFLOAD: Keys = {
    "device": one_of("none", "cpu", "nvme"),
    "pin_memory": FLAG,
    "buffer_count": whole(),
    "nvme_path": JsonKey("the path of a folder, as a string", lambda v: isinstance(v, str) and v != ""),
}
OFFLOAD_OPTIMIZER: Keys = {
    **_OFFLOAD,
    **_each("pipeline_read pipeline_write fast_init", _OWN_FOLDER),
    "ratio": Refused("partial offload needs DeepSpeed's compiled Adam. Leave it out: all is offloaded.", 1.0),
    "super_offload": Refused("SuperOffload is made for Grace Hopper and Adam only. Leave it out."),
    "cpuadam_cores_perc": SetAside("it belongs to SuperOffload"),
}
OFFLOAD_PARAM: Keys = {**_OFFLOAD, "buffer_size": whole(), "max_in_cpu": whole()}

_STAGE3: Keys = {
    **_each("prefetch_bucket_size param_persistence_threshold model_persistence_threshold", whole()),
    **_each("max_live_parameters max_reuse_distance", whole()),
    **_each("use_all_reduce_for_fetch_params allgather_sequential", FLAG),
    "module_granularity_threshold": SetAside("only speed, and gathering whole blocks fails in DeepSpeed"),
    "gather_16bit_weights_on_model_save": _OWN_WEIGHTS,
}

ZERO: Keys = {
    "stage": JsonKey("0, 1, 2 or 3", lambda v: whole().keeps(v) and v <= 3),
    "reduce_bucket_size": whole(1),
    "sub_group_size": whole(),
    "allgather_bucket_size": whole(2, even=True),  # DeepSpeed asserts a multiple of 2
    **_each("contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions", FLAG),
    **_each("overlap_comm ignore_unused_parameters parameter_alignment memory_efficient_linear", FLAG),
    **_each("override_module_apply log_trace_cache_warnings enable_sanity_checks", FLAG),
    "offload_optimizer": JsonSection(OFFLOAD_OPTIMIZER, shorthand="device", switched_on="cpu"),
    "offload_param": JsonSection(OFFLOAD_PARAM, shorthand="device", switched_on="cpu"),
    "round_robin_gradients": SetAside("only speed, in an order of the weights that dsyolo cannot checkpoint"),
    **{f"stage3_{name}": key for name, key in _STAGE3.items()},
    **{name: Alias(f"stage3_{name}") for name in _STAGE3},
    "stage3_gather_fp16_weights_on_model_save": _OWN_WEIGHTS,
    **_each("elastic_checkpoint pipeline_loading_checkpoint load_from_fp32_weights", _OWN_CHECKPOINTS),
    "compute_grad_norm": SetAside("clipping and the log need the norm"),
    "zenflow": Refused("ZenFlow transposes 4-D gradients, and so breaks convolutions. Leave it out.", None),
    # `set_aside.modern` turns these into the blocks that DeepSpeed makes of them.
    "cpu_offload": Refused(_given_as("offload_optimizer")),
    **_each("cpu_offload_param cpu_offload_params", Refused(_given_as("offload_param"))),
    "cpu_offload_use_pin_memory": SetAside("pin_memory of the offload decides"),
    "legacy_stage1": SetAside("DeepSpeed has one stage 1"),
    "mics_shard_size": Refused(_REMOVED, -1),
    "mics_hierarchical_params_gather": Refused(_REMOVED),
    "zeropp_loco_param": Refused(_REMOVED, None),
    "zero_hpz_partition_size": Refused("secondary partitions (ZeRO++) are not supported. Leave it out.", 1),
    **_each("zero_quantized_weights zero_quantized_nontrainable_weights", Refused(_QUANTIZED)),
    "zero_quantized_gradients": Refused(_QUANTIZED),
    "save_muon_momentum_buffer_in_memory": SetAside("it belongs to the optimizer Muon"),
    "leaf_module": SetAside("it is made for mixtures of experts"),
}

_OWN_CAST = SetAside("images enter as uint8, and the stem casts them")
FP16: Keys = {
    **_each("enabled consecutive_hysteresis", FLAG),
    "auto_cast": _OWN_CAST,
    "loss_scale": number(),
    "initial_scale_power": whole(),
    **_each("loss_scale_window hysteresis min_loss_scale", whole(1)),
    "fp16_master_weights_and_grads": Refused(_FP32_MASTER),
}
_NO_SCALE = SetAside("bf16 needs no loss scale")
BF16: Keys = {
    **_each("enabled immediate_grad_update check_grad_overflow", FLAG),
    **_each("bf16_master_weights_and_grads bf16_optimizer_states", Refused(_FP32_MASTER)),
    "auto_cast": _OWN_CAST,
    **_each("loss_scale initial_scale_power loss_scale_window hysteresis", _NO_SCALE),
    **_each("min_loss_scale consecutive_hysteresis", _NO_SCALE),
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
    "activation_checkpoint_interval": Refused(
        'set it to 0, and activation_checkpointing to {"recompute": "blocks"}.', 0
    ),
    **_each("pipe_partitioned grad_partitioned", SetAside("it belongs to tensor parallelism")),
}
ACTIVATION_CHECKPOINTING: Keys = {
    "recompute": RECOMPUTE,  # ours
    "cpu_checkpointing": FLAG,
    "partition_activations": SetAside("it splits them over tensor-parallel ranks"),
    "contiguous_memory_optimization": SetAside("it needs partition_activations"),
    "number_checkpoints": SetAside("recompute says which blocks are computed again"),
    "synchronize_checkpoint_boundary": SetAside("it waits for the device at every block"),
    "profile": SetAside("it waits for the device at every block; flops_profiler does not"),
}
_MONITOR = JsonSection({"enabled": FLAG, "output_path": TEXT, "job_name": TEXT})

TOP_LEVEL: Keys = {
    **_each("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps", whole(1)),
    "gradient_clipping": number(),
    "optimizer": JsonSection({}),  # its keys follow from its type: optimizer_table.py
    "scheduler": JsonSection({}),  # its keys follow from its type: scheduler_table.py
    "zero_optimization": JsonSection(ZERO, shorthand="stage"),
    "fp16": JsonSection(FP16),
    "bf16": JsonSection(BF16),
    "torch_autocast": JsonSection(TORCH_AUTOCAST, shorthand="dtype"),
    "data_types": JsonSection(
        {**_each("grad_accum_dtype param_dtype buffer_dtype", DTYPE), "keep_in_fp32_modules": PATTERNS}
    ),
    "communication_data_type": DTYPE,
    "pipeline": JsonSection(PIPELINE, shorthand="stages"),
    "activation_checkpointing": JsonSection(
        ACTIVATION_CHECKPOINTING, is_strict=False, shorthand="recompute", switched_on="blocks"
    ),
    # Handed on as they are.
    "steps_per_print": PRINT_STEPS,
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
        },
        is_strict=False,
    ),
    "comms_logger": JsonSection({**_each("enabled prof_all verbose debug", FLAG), "prof_ops": TEXTS}),
    **_each("tensorboard csv_monitor", _MONITOR),
    # Ours.
    **_each("wandb comet", Refused(_OWN_TRACKING)),
    "zero_allow_untested_optimizer": SetAside("dsyolo allows the optimizers that it has"),
    "zero_force_ds_cpu_optimizer": SetAside("the optimizer is torch's, on the host too"),
    "managed_gradient_accumulation": Refused(
        "dsyolo relies on DeepSpeed's accumulation. Leave it out.", True
    ),
    "dataloader_drop_last": SetAside("dsyolo has its own loader"),
    **_each("checkpoint datastates_ckpt", _OWN_CHECKPOINTS),
    "nebula": Refused("DeepSpeed removed it, and dsyolo writes its own checkpoints. Leave it out."),
    # The mean over ranks stays the same, or would change the gradient.
    **_each("prescale_gradients gradient_predivide_factor", _OWN_MEAN),
    "gradient_allreduce_op": Refused(_PLAIN_MEAN, "mean"),
    # No use here.
    **_each("compression_training sparse_attention", Refused(_REMOVED, on_by_presence=True)),
    **_each("curriculum_learning eigenvalue graph_harvesting progressive_layer_drop", Refused(_REMOVED)),
    **_each("quantize_training sparse_gradients", Refused(_REMOVED)),
    "bfloat16": Alias("bf16"),
    "amp": Refused(
        'DeepSpeed removed Apex AMP. Write "torch_autocast": {"enabled": true, "dtype": "bfloat16"} in its place.'
    ),
    "aio": _OWN_FOLDER,
    "autotuning": SetAside("the launcher's --autotuning alone uses it, and cannot tune dsyolo"),
    "compile": Refused("DeepCompile is not supported. Leave it out.", on_by_presence=True),
    "data_efficiency": Refused("curricula and random-LTD work on sequences of tokens. Leave it out."),
    "disable_allgather": SetAside("DeepSpeed reads it and uses it nowhere"),
    "elasticity": Refused(
        "DeepSpeed removed it. Leave it out: --resume takes any ranks that divide the batch."
    ),
    "expert_parallel": Refused("a detector has no experts. Leave it out."),
    "use_data_before_expert_parallelism": SetAside("a detector has no experts"),
    **_each("hybrid_engine weight_quantization vocabulary_size", _DETECTOR),
    "tensor_parallel": Refused(
        "convolutions are not split over ranks. Leave it out: ZeRO or pipeline divide a network.",
        on_by_presence=True,
    ),
    "sequence_parallel_size": Refused("a detector has no sequence to split. Leave it out.", 1),
    "seq_parallel_communication_data_type": _DETECTOR,
    "data_parallel_size": Refused("it follows from the ranks and the stages. Leave it out.", NEVER),
    "allgather_size": SetAside("DeepSpeed reads it only beside a zero_optimization that is true or false"),
    # Of other libraries, so that who looks for them finds them.
    "max_grad_norm": Refused("it is Hugging Face's. Write gradient_clipping.", NEVER),
    "gradient_checkpointing": Refused(
        'it is Hugging Face\'s. Write activation_checkpointing: {"recompute": "blocks"}.'
    ),
}
