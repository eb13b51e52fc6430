"""The walk over the keys of the DeepSpeed JSON: for each a value, and where it is found once the engine is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


class Entry(NamedTuple):
    """A key's value, the start in whose JSON it stands, and the function that finds it in what was started."""

    start: str
    value: Any
    held: Callable[[Any], Any]
    expected: Any = None  # None: the value


def _zero(name: str) -> Callable[[Any], Any]:
    """Return the function that gives a value of DeepSpeed's configuration of ZeRO, which it reads when it needs it."""
    return lambda x: getattr(x.config.zero_config, name)


def _config(path: str) -> Callable[[Any], Any]:
    def held(x: Any) -> Any:
        found = x.config
        for name in path.split("."):
            found = getattr(found, name)
        return found

    return held


def _section(prefix: str, start: str, config: str, values: Mapping[str, Any]) -> dict[str, Entry]:
    """Return entries of keys that DeepSpeed keeps in a block of its configuration, under the same names."""
    return {
        f"{prefix}.{key}": Entry(start, value, _config(f"{config}.{key}")) for key, value in values.items()
    }


def _weights(key: str) -> Callable[[Any], Any]:
    return lambda x: x.groups["weights"][key]


# ---- the walk

ADAM_VALUES = {"lr": 0.002, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.07}
SGD_VALUES = {"lr": 0.03, "momentum": 0.8, "nesterov": False, "weight_decay": 0.001}


def _is_of_torch(x: Any) -> bool:
    return type(x.torch).__module__.startswith("torch.")


def _is_decoupled(x: Any) -> bool:
    return type(x.torch) is torch.optim.AdamW


def _optimizers() -> dict[str, Entry]:
    sgd = {
        f"optimizer[SGD].params.{key}": Entry("SGD, ZeRO 0", value, _weights(key))
        for key, value in SGD_VALUES.items()
    }
    sgd["optimizer[SGD].params.weight_decay"] = Entry(
        "SGD, ZeRO 0", 0.001, _weights("weight_decay"), 0.001 * 8 / 64
    )
    found = dict(sgd)
    for kind, start in (("AdamW", "AdamW, ZeRO 2"), ("Adam", "Adam, ZeRO 3")):
        path = f"optimizer[{kind}].params"
        found |= {f"{path}.{key}": Entry(start, value, _weights(key)) for key, value in ADAM_VALUES.items()}
        found[f"{path}.torch_adam"] = Entry(start, True, _is_of_torch)
    found["optimizer[AdamW].params.adam_w_mode"] = Entry("AdamW, ZeRO 2", True, _is_decoupled)
    found["optimizer[Adam].params.adam_w_mode"] = Entry("Adam, ZeRO 3", False, _is_decoupled)
    return found


def _schedulers() -> dict[str, Entry]:
    def rate(step: int, expected: float) -> tuple[Callable[[Any], Any], float]:
        return lambda x: x.lr_at(step), expected

    common = {"warmup_num_steps": 4, "warmup_type": "linear"}
    lr = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.005}
    ratio = {"warmup_min_ratio": 0.2, "cos_min_ratio": 0.3}
    values = {
        "WarmupLR": ("scheduler WarmupLR", {**lr, **common}),
        "WarmupDecayLR": ("pipeline", {**lr, **common, "total_num_steps": 8}),
        "WarmupCosineLR": ("autocast, ZeRO 1", {**ratio, **common, "total_num_steps": 8}),
    }
    # Iteration k - 1 at step k: the first two steps at the least rate, step 3 half of the way up, step 5 at the top.
    ends = {"warmup_min_lr": rate(0, 0.001), "warmup_max_lr": rate(5, 0.005)}
    half = {"warmup_num_steps": rate(3, 0.003), "warmup_type": rate(2, 0.002)}
    falls = {"total_num_steps": rate(7, 0.001 + 0.004 * 2 / 4)}
    top = ADAM_VALUES["lr"]
    cosine = {
        "warmup_min_ratio": rate(1, 0.2 * top),
        "warmup_num_steps": rate(3, 0.6 * top),
        "warmup_type": rate(2, 0.4 * top),
        "cos_min_ratio": rate(20, 0.3 * top),
        "total_num_steps": rate(6, (0.3 + 0.7 * 0.5) * top),
    }
    found = {
        "WarmupLR": {**ends, **half},
        "WarmupDecayLR": {**ends, **half, **falls},
        "WarmupCosineLR": cosine,
    }
    return {
        f"scheduler[{kind}].params.{key}": Entry(start, value, *found[kind][key])
        for kind, (start, params) in values.items()
        for key, value in params.items()
    } | {
        f"scheduler[{kind}].type": Entry(start, kind, lambda x: x.engine.schedule.kind)
        for kind, (start, _) in values.items()
    }


SGD_0, ADAMW_2, ADAM_3, BF16 = "SGD, ZeRO 0", "AdamW, ZeRO 2", "Adam, ZeRO 3", "bf16, ZeRO 2"
WALK: dict[str, Entry] = {
    "train_batch_size": Entry(SGD_0, 8, lambda x: x.deepspeed.train_batch_size()),
    "train_micro_batch_size_per_gpu": Entry(SGD_0, 2, lambda x: x.deepspeed.train_micro_batch_size_per_gpu()),
    "gradient_accumulation_steps": Entry(SGD_0, 2, lambda x: x.deepspeed.gradient_accumulation_steps()),
    "gradient_clipping": Entry(SGD_0, 3.5, lambda x: x.deepspeed.gradient_clipping()),
    "optimizer.type": Entry(SGD_0, "SGD", lambda x: type(x.torch).__name__),
    **_optimizers(),
    **_schedulers(),
    "zero_optimization.stage": Entry(ADAM_3, 3, lambda x: x.deepspeed.zero_optimization_stage()),
    "zero_optimization.reduce_bucket_size": Entry(ADAMW_2, 123456, lambda x: x.zero.reduce_bucket_size),
    "zero_optimization.allgather_bucket_size": Entry(ADAMW_2, 234568, lambda x: x.zero.allgather_bucket_size),
    "zero_optimization.sub_group_size": Entry(ADAM_3, 345678, lambda x: x.zero.sub_group_size),
    "zero_optimization.contiguous_gradients": Entry(BF16, False, lambda x: x.zero.contiguous_gradients),
    "zero_optimization.reduce_scatter": Entry(ADAMW_2, False, lambda x: x.zero.reduce_scatter),
    "zero_optimization.use_multi_rank_bucket_allreduce": Entry(
        BF16, True, lambda x: x.zero.use_multi_rank_bucket_allreduce
    ),
    "zero_optimization.allgather_partitions": Entry(ADAMW_2, False, _zero("allgather_partitions")),
    "zero_optimization.overlap_comm": Entry(ADAMW_2, True, lambda x: x.zero.overlap_comm),
    "zero_optimization.ignore_unused_parameters": Entry(
        ADAMW_2, False, lambda x: x.zero.ignore_unused_parameters
    ),
    "zero_optimization.parameter_alignment": Entry(BF16, True, lambda x: x.zero.parameter_alignment),
    "zero_optimization.memory_efficient_linear": Entry(ADAM_3, False, _zero("memory_efficient_linear")),
    "zero_optimization.override_module_apply": Entry(ADAM_3, False, _zero("override_module_apply")),
    "zero_optimization.log_trace_cache_warnings": Entry(ADAM_3, True, _zero("log_trace_cache_warnings")),
    "zero_optimization.enable_sanity_checks": Entry(ADAM_3, True, _zero("enable_sanity_checks")),
    "zero_optimization.offload_optimizer.device": Entry(
        ADAMW_2, "cpu", lambda x: "cpu" if x.zero.cpu_offload else ""
    ),
    "zero_optimization.offload_optimizer.pin_memory": Entry(
        ADAMW_2, False, lambda x: x.zero.cpu_offload_pin_memory
    ),
    "zero_optimization.offload_optimizer.buffer_count": Entry(
        ADAMW_2, 7, _config("zero_config.offload_optimizer.buffer_count")
    ),
    "zero_optimization.offload_optimizer.nvme_path": Entry(
        ADAM_3, "/tmp", lambda x: x.ds.parallelism.offload.optimizer_folder
    ),
    "zero_optimization.offload_param.device": Entry(
        ADAM_3, "nvme", lambda x: x.ds.parallelism.offload.params
    ),
    "zero_optimization.offload_param.nvme_path": Entry(
        ADAM_3, "/tmp", lambda x: x.ds.parallelism.offload.params_folder
    ),
    "zero_optimization.offload_param.pin_memory": Entry(
        ADAM_3, False, _config("zero_config.offload_param.pin_memory")
    ),
    "zero_optimization.offload_param.buffer_count": Entry(
        ADAM_3, 7, _config("zero_config.offload_param.buffer_count")
    ),
    "zero_optimization.offload_param.buffer_size": Entry(
        ADAM_3, 66666, _config("zero_config.offload_param.buffer_size")
    ),
    "zero_optimization.offload_param.max_in_cpu": Entry(ADAM_3, 77777, lambda x: x.zero.max_params_in_cpu),
    "zero_optimization.stage3_prefetch_bucket_size": Entry(
        ADAM_3, 11111, lambda x: x.zero.parameter_offload._prefetch_bucket_sz
    ),
    "zero_optimization.stage3_param_persistence_threshold": Entry(
        ADAM_3, 2222, lambda x: x.zero.parameter_offload.param_numel_persistence_threshold
    ),
    "zero_optimization.stage3_model_persistence_threshold": Entry(
        ADAM_3,
        333333,
        lambda x: x.zero.parameter_offload.model_persistence_threshold,
    ),
    "zero_optimization.stage3_max_live_parameters": Entry(
        ADAM_3, 444444, lambda x: x.zero.parameter_offload._max_available_parameters_in_numel
    ),
    "zero_optimization.stage3_max_reuse_distance": Entry(
        ADAM_3, 55555, lambda x: x.zero.parameter_offload._max_reuse_distance_in_numel
    ),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Entry(
        ADAM_3, True, _zero("use_all_reduce_for_fetch_params")
    ),
    "zero_optimization.stage3_allgather_sequential": Entry(
        "scheduler WarmupLR", True, _zero("allgather_sequential")
    ),
    # A CPU has no fp16: DeepSpeed would refuse it, so its block is given and off.
    **_section(
        "fp16",
        BF16,
        "float16_config",
        {
            "enabled": False,
            "consecutive_hysteresis": True,
            "loss_scale": 128.0,
            "initial_scale_power": 10,
            "loss_scale_window": 77,
            "hysteresis": 5,
            "min_loss_scale": 4,
        },
    ),
    "bf16.enabled": Entry(BF16, True, lambda x: x.weight.dtype == torch.bfloat16),
    "bf16.check_grad_overflow": Entry(BF16, False, lambda x: x.zero.check_grad_overflow),
    "bf16.immediate_grad_update": Entry(BF16, True, _config("bfloat16_config.immediate_grad_update")),
    "torch_autocast.enabled": Entry("autocast, ZeRO 1", True, lambda x: x.deepspeed.torch_autocast_enabled()),
    "torch_autocast.dtype": Entry(
        "autocast, ZeRO 1", "bfloat16", lambda x: x.deepspeed.torch_autocast_dtype(), torch.bfloat16
    ),
    "torch_autocast.lower_precision_safe_modules": Entry(
        "autocast, ZeRO 1", ["torch.nn.Conv2d"], lambda x: torch.bfloat16 in x.zero.ipg_buckets, True
    ),
    "data_types.grad_accum_dtype": Entry(
        BF16, "fp32", lambda x: x.zero.gradient_accumulation_dtype, torch.float32
    ),
    "data_types.param_dtype": Entry(BF16, "bf16", lambda x: x.weight.dtype, torch.bfloat16),
    "data_types.buffer_dtype": Entry(BF16, "fp32", lambda x: x.statistics.dtype, torch.float32),
    "data_types.keep_in_fp32_modules": Entry(BF16, ["running_mean"], _config("keep_in_fp32_modules")),
    "communication_data_type": Entry(
        ADAMW_2, "bf16", lambda x: x.zero.communication_data_type, torch.bfloat16
    ),
    "pipeline.stages": Entry("pipeline", 2, lambda x: x.deepspeed.num_stages),
    "pipeline.partition": Entry(
        "pipeline", [12], lambda x: 12 in (x.engine.network.start, x.engine.network.stop), True
    ),
    "activation_checkpointing.recompute": Entry(
        "autocast, ZeRO 1",
        "blocks",
        lambda x: x.network.checkpointed == x.activations.counted.blocks != set(),
        True,
    ),
    "activation_checkpointing.cpu_checkpointing": Entry(
        "autocast, ZeRO 1", True, lambda x: x.network.offload_inputs
    ),
    "steps_per_print": Entry(SGD_0, 17, lambda x: x.deepspeed.steps_per_print()),
    "dump_state": Entry(SGD_0, True, lambda x: x.deepspeed.dump_state()),
    "disable_python_gc": Entry(SGD_0, True, _config("disable_python_gc")),
    "wall_clock_breakdown": Entry(SGD_0, True, lambda x: x.deepspeed.wall_clock_breakdown()),
    "memory_breakdown": Entry(SGD_0, True, lambda x: x.deepspeed.memory_breakdown()),
    "log_level": Entry(SGD_0, "error", lambda x: x.deepspeed.log_level()),
    **_section("timers.throughput", SGD_0, "timers_config", {"enabled": True, "synchronized": False}),
    **_section(
        "flops_profiler",
        SGD_0,
        "flops_profiler_config",
        {
            "enabled": True,
            "detailed": False,
            "profile_step": 9,
            "top_modules": 3,
            "recompute_fwd_factor": 0.5,
            "module_depth": 2,
            "output_file": "flops.txt",
        },
    ),
    "comms_logger.enabled": Entry(SGD_0, True, _config("comms_config.comms_logger_enabled")),
    **_section(
        "comms_logger",
        SGD_0,
        "comms_config.comms_logger",
        {"prof_all": False, "verbose": True, "debug": True, "prof_ops": ["all_reduce"]},
    ),
    **_section(
        "tensorboard",
        SGD_0,
        "monitor_config.tensorboard",
        {"enabled": HAS_TENSORBOARD, "output_path": "tb", "job_name": "tb_job"},
    ),
    **_section(
        "csv_monitor",
        SGD_0,
        "monitor_config.csv_monitor",
        {"enabled": True, "output_path": "csv", "job_name": "csv_job"},
    ),
}
# What a start needs beside the values of its entries.
BATCH = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
ADAMW = {"type": "AdamW", "params": ADAM_VALUES}
STARTS: dict[str, dict[str, Any]] = {
    SGD_0: {},
    ADAMW_2: {**BATCH, "zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}},
    ADAM_3: {
        **BATCH,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}},
        "optimizer": {"type": "Adam"},
    },
    BF16: {**BATCH, "zero_optimization": {"stage": 2}},
    "scheduler WarmupLR": {**BATCH, "zero_optimization": {"stage": 3}, "optimizer": ADAMW},
    "autocast, ZeRO 1": {**BATCH, "zero_optimization": {"stage": 1}, "optimizer": ADAMW},
    "pipeline": {**BATCH, "zero_optimization": {"stage": 1}, "optimizer": ADAMW},
}
