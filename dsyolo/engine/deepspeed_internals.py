"""Every private or undocumented name of DeepSpeed that dsyolo reads or replaces, each behind one function.

All names are as of DeepSpeed 0.19.8. The rest of `engine/` uses DeepSpeed's documented API and these functions only.
`tests/engine/test_deepspeed_internals.py` asserts each name and says which feature depends on it: after an upgrade of
DeepSpeed, run it first.

In all functions `engine` is what `deepspeed.initialize` returned, and `optimizer` its `optimizer`: ZeRO's wrapper of the
torch optimizer, or at stage 0 the torch optimizer itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

# ---- start and logging


def disable_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling the C++ op `deepspeed_shm_comm` at the first start on a CPU.

    Gloo needs no compiler, and a killed build leaves a lock for which every later start waits without a message.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def quiet_logger() -> None:
    """Log warnings and errors of DeepSpeed only, and not the warning about optimizers that are tested here."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    # DeepSpeed warns about all but Adam's kinds under ZeRO; SGD is compared to plain torch in tests/support/parity.py.
    return "untested optimizer" not in record.getMessage()


# ---- communication


def replace_reductions(reduce_scatter_tensor: Callable[..., None], reduce: Callable[..., None]) -> None:
    """Make ZeRO call these two instead of its backend's. The backend object `cdb` lives until the process ends."""
    backend = _comm().cdb
    backend.reduce_scatter_tensor = reduce_scatter_tensor
    backend.reduce = reduce


@contextlib.contextmanager
def rebound_collectives() -> Iterator[None]:
    """Inside, DeepSpeed's backend calls torch.distributed's present functions.

    It keeps references to two of them from its construction, which a replacement in torch.distributed does not reach.
    """
    backend = _comm().cdb
    kept = {name: getattr(backend, name) for name in _KEPT_FUNCTIONS}
    for name, own in _KEPT_FUNCTIONS.items():
        setattr(backend, name, getattr(torch.distributed, own))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(backend, name, function)


_KEPT_FUNCTIONS = {
    "all_gather_function": "all_gather_into_tensor",
    "reduce_scatter_function": "reduce_scatter_tensor",
}


def comms_logger_is_on() -> bool:
    """Whether the JSON's `comms_logger` block, or `set_comms_logger`, has it on."""
    logger = _comm().comms_logger
    return logger is not None and logger.enabled


def set_comms_logger(enabled: bool) -> None:
    """Switch the comms logger in the middle of a run. Off, it also forgets what it has logged."""
    _comm().configure(enabled=enabled, prof_all=True, verbose=False)
    if not enabled:
        _comm().comms_logger.comms_dict.clear()


def logged_collectives() -> dict[str, dict[str, int]]:
    """Return calls and bytes by operation, bytes as DeepSpeed counts them: of the tensors, not what is sent."""
    return {
        name: {
            "calls": sum(record[0] for record in sizes.values()),
            "bytes": sum(int(size) * record[0] for size, record in sizes.items()),
        }
        for name, sizes in _comm().comms_logger.comms_dict.items()
    }


def _comm() -> Any:
    from deepspeed.comm import comm

    return comm


# ---- the step


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside ZeRO's wrapper; at stage 0 there is no wrapper."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def replace_step(optimizer: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    """Make the engine call `step` where it would step the optimizer. Return the original."""
    original, optimizer.step = optimizer.step, step
    return original


def replace_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Make the engine clip by `clip` at stage 0.

    DeepSpeed's own waits for the device, does not report the norm, and ignores a pipeline's other stages.
    """
    engine.clip_fp32_gradients = clip


def set_overflow(optimizer: Any, overflow: bool) -> None:
    """Tell the engine at stage 0 whether the step was skipped: it reads the attribute as of ZeRO's optimizers."""
    optimizer.overflow = overflow


def replace_monitor_writer(engine: Any, write: Callable[[list], None]) -> Callable[[list], None]:
    """Make the engine hand its events to `write`. Return the original, which takes [(name, value, samples)]."""
    original, engine.monitor.write_events = engine.monitor.write_events, write
    return original


def monitor_samples(engine: Any) -> int | None:
    """Return the samples so far, by which monitors count; None without a monitor."""
    return engine.global_samples if engine.monitor.enabled else None


def accumulate_in_partition(engine: Any) -> None:
    """Let ZeRO 2 accumulate micro-batches in the rank's own partition of the gradients.

    DeepSpeed does so only where it accumulates bf16 or fp16 gradients in fp32. Elsewhere it keeps the whole gradient of
    each parameter that crosses a partition's border, and one wide layer is larger than a partition of hundreds of ranks.
    With the optimizer in host memory the partitions wait there already.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 2 and not optimizer.cpu_offload:
        assert callable(optimizer._use_compact_grad_partition_buffer), "as of DeepSpeed 0.19.8"
        optimizer._use_compact_grad_partition_buffer = lambda group: True


# ---- loss scale of fp16


def autocast_scaler(engine: Any) -> torch.amp.GradScaler | None:
    """Return torch's scaler, which the engine uses for fp16 autocast at stage 0."""
    return getattr(engine, "torch_autocast_z0_gradscaler", None)


def dynamic_scaler(engine: Any) -> Any | None:
    """Return DeepSpeed's own dynamic scaler (`fp16.enabled`, or fp16 autocast under ZeRO); None without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def scaler_state(scaler: Any) -> dict[str, float]:
    """Return a dynamic scaler's scale, steps since its last change, and overflows left until it falls."""
    return {
        "scale": scaler.cur_scale,
        "good_steps": scaler.cur_iter - scaler.last_overflow_iter - 1,
        "hysteresis": scaler.cur_hysteresis,
    }


def load_scaler_state(scaler: Any, state: Mapping[str, float]) -> None:
    """Continue a dynamic scaler from what `scaler_state` returned; `hysteresis` may be missing."""
    scaler.cur_scale = state["scale"]
    scaler.cur_iter, scaler.last_overflow_iter = int(state["good_steps"]), -1
    scaler.cur_hysteresis = int(state.get("hysteresis", scaler.delayed_shift))


# ---- partitions


class FragmentAddress(NamedTuple):
    """A run of elements of a parameter, and its place in one of this rank's flat fp32 masters."""

    group: int  # index of the master
    start: int  # first element in the parameter, flattened
    offset: int  # first element in the master
    numel: int


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, of which ZeRO 3 leaves an empty tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """Return the flat fp32 tensors that the torch optimizer steps at ZeRO 1 to 3, one per group."""
    sharded = engine.zero_optimization_stage() == 3
    optimizer = engine.optimizer
    return list(
        optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
    )


def fragment_address(engine: Any, parameter: nn.Parameter, rank: int) -> FragmentAddress | None:
    """Return which elements of `parameter` are in this rank's masters at ZeRO 1 to 3; None: other ranks have all."""
    if engine.zero_optimization_stage() < 3:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        return FragmentAddress(mapping.param_group_index, source.start, place.start, place.numel)
    optimizer = engine.optimizer
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * padded  # the last ranks' parts are padding
    numel = min(padded, parameter.ds_numel - start)
    return FragmentAddress(group, start, offset, numel) if numel > 0 else None


def shard(parameter: nn.Parameter) -> torch.Tensor:
    """Return this rank's part under ZeRO 3, flat and in the precision of computing."""
    return parameter.ds_tensor


@contextlib.contextmanager
def persistent_parameters_sharded(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters that ZeRO 3 keeps whole are shards too, so that writing shards reaches them."""
    persistent = optimizer.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
    yield
    if persistent:
        persistent[0].all_gather(persistent)


# ---- offload: after tensors have moved, the views that DeepSpeed made of them must be made again


def relink_masters(optimizer: Any) -> None:
    """Renew the views of the masters and the optimizer's states at ZeRO 1 and 2."""
    optimizer._link_all_hp_params()


def flat_shards(optimizer: Any) -> list[torch.Tensor]:
    """Return the flat tensors of all shards of parameters under ZeRO 3 with `offload_param`."""
    return list(optimizer.fp16_partitioned_groups_flat)


def relink_shards(optimizer: Any) -> None:
    """Release the pinned memory of which `flat_shards` were views, and renew the parameters' views of them."""
    from deepspeed.accelerator import get_accelerator

    for buffer in optimizer.param_groups_fp16_flat_cpu_memory:
        get_accelerator().unpin_memory(buffer)
    optimizer.param_groups_fp16_flat_cpu_memory = []
    for group in range(len(optimizer.fp16_partitioned_groups_flat)):
        optimizer._unflatten_partitioned_parameters(group)


# ---- memory


def weights_held(parameter: nn.Parameter) -> list[torch.Tensor]:
    """Return what this rank holds of a parameter: ZeRO 3 keeps its shard, and small parameters whole beside it."""
    if not hasattr(parameter, "ds_tensor"):
        return [parameter.data]
    return [parameter.ds_tensor, *([parameter.data] if parameter.ds_persist else [])]


def bucket_buffers(optimizer: Any) -> list[Any]:
    """Return the buffers (nested) in which gradients are reduced; none at stage 0."""
    return [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]


def gradient_buffers(optimizer: Any, tensors: Iterable[torch.Tensor]) -> list[Any]:
    """Return where (nested) the gradients of `tensors` are kept: each stage has some of these attributes."""
    beside = [getattr(tensor, "grad_accum", None) for tensor in tensors]  # accumulated in another precision
    return [beside, *(getattr(optimizer, name, None) for name in _GRADIENT_BUFFERS)]


def all_attributes(optimizer: Any) -> list[Any]:
    """Return everything else that ZeRO's wrapper holds."""
    return list(vars(optimizer).values())


_GRADIENT_BUFFERS = (
    "grads_in_partition",
    "averaged_gradients",
    "all_grad_tensors",
    "grad_partitions_flat_buffer",
    "accumulated_grads_in_cpu",
)


# ---- pipeline


def replace_instructions(
    engine: Any, wrap: Callable[[str, Callable[..., None]], Callable[..., None]]
) -> None:
    """Replace the methods that the pipeline's schedule runs: `wrap(name, method)`, name as in `schedule.ForwardPass`."""
    engine._INSTRUCTION_MAP = {
        kind: wrap(kind.__name__, method) for kind, method in type(engine)._INSTRUCTION_MAP.items()
    }


def replace_global_norm(optimizer: Any, norm: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Make ZeRO 1 clip by `norm`. Return the original, which gives -1 where a gradient is not finite."""
    original, optimizer.scaled_global_norm = optimizer.scaled_global_norm, norm
    return original


@contextlib.contextmanager
def without_sum_over_stages(optimizer: Any) -> Iterator[None]:
    """Inside, ZeRO's norm is of this stage alone."""
    optimizer._model_parallel_all_reduce = lambda tensor, op: None
    try:
        yield
    finally:
        del optimizer._model_parallel_all_reduce


def stage_group(engine: Any) -> Any:
    """Return the process group of this rank's replica: one rank of each stage."""
    return engine.mpu.get_pipe_parallel_group()


def replica_group(engine: Any) -> Any:
    """Return the process group of all replicas of this rank's stage."""
    return engine.mpu.get_data_parallel_group()
