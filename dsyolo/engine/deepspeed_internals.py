"""Every private or undocumented name of DeepSpeed that dsyolo reads or replaces, each behind one function.

All names are as of DeepSpeed 0.19.8. The rest of `engine/` uses DeepSpeed's documented API and these functions.
After an upgrade run `tests/engine/test_deepspeed_internals.py` first: it asserts each name, and names the feature
that depends on it. `engine` is what `deepspeed.initialize` returned, `optimizer` its ZeRO wrapper of the torch
optimizer, or at stage 0 the torch optimizer itself; `parameter` an nn.Parameter with what DeepSpeed added to it.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch


def disable_shared_memory_op() -> None:
    """Keep `init_distributed` from compiling the C++ op `deepspeed_shm_comm` at the first start on a CPU.

    Gloo needs no compiler, and a killed build leaves a lock for which every later start waits without a message.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def route_logger() -> None:
    """Route DeepSpeed's log records to the root logger's handlers; without any, DeepSpeed prints its warnings."""
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_is_relevant)
    if logging.getLogger().handlers:
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.INFO)  # DeepSpeed's own level is WARNING


def _is_relevant(record: logging.LogRecord) -> bool:
    # It warns about all but Adam's kinds under ZeRO; SGD is compared to plain torch in tests/support/parity.py.
    return "untested optimizer" not in record.getMessage()


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
    kept = backend.all_gather_function, backend.reduce_scatter_function
    backend.all_gather_function = torch.distributed.all_gather_into_tensor
    backend.reduce_scatter_function = torch.distributed.reduce_scatter_tensor
    try:
        yield
    finally:
        backend.all_gather_function, backend.reduce_scatter_function = kept


def comms_logger_is_on() -> bool:
    """Return whether the JSON's `comms_logger` block, or `set_comms_logger`, has it on."""
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


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside ZeRO's wrapper; at stage 0 there is no wrapper."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def replace_step(optimizer: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    """Make the engine call `step` where it would step the optimizer. Return the original."""
    original, optimizer.step = optimizer.step, step
    return original


def replace_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Make the engine clip by `clip` at stage 0: its own waits for the device and ignores other pipeline stages."""
    engine.clip_fp32_gradients = clip


def set_overflow(optimizer: Any, overflow: bool) -> None:
    """Mark the step as skipped at stage 0: the engine reads this attribute, which only ZeRO's optimizers have."""
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


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Return the parameter's full shape; under ZeRO 3 the tensor itself is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """Return the flat fp32 tensors that the torch optimizer steps at ZeRO 1 to 3, one per group."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def fragment_address(engine: Any, parameter: Any, rank: int) -> tuple[int, int, int, int] | None:
    """Return which elements of `parameter` are in this rank's masters at ZeRO 1 to 3; None: other ranks have all.

    Returns:
        (index of the master, first element in the flattened parameter, first element in the master, elements)
    """
    if engine.zero_optimization_stage() < 3:
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        source, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        return mapping.param_group_index, source.start, place.start, place.numel
    optimizer = engine.optimizer
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * padded  # the last ranks' parts are padding
    numel = min(padded, parameter.ds_numel - start)
    return (group, start, offset, numel) if numel > 0 else None


def shard(parameter: Any) -> torch.Tensor:
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


def relink_masters(optimizer: Any) -> None:
    """Renew DeepSpeed's views of the masters and the optimizer's states at ZeRO 1 and 2, after these have moved."""
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


def memory_held(optimizer: Any, parameters: Sequence[Any], keys: Sequence[torch.Tensor]) -> tuple[list, ...]:
    """Return four nested lists of tensors: weights, gradients, buckets, and all that is left.

    Args:
        keys: the tensors that the torch optimizer steps.
    """
    # ZeRO 3 keeps a shard of each parameter, and small parameters whole beside it.
    sharded = [[p.ds_tensor, p.data if p.ds_persist else None] for p in parameters if hasattr(p, "ds_tensor")]
    weights = sharded or [p.data for p in parameters]
    # `grad_accum`: accumulated in another precision. Each stage has some of the optimizer's attributes.
    gradients: list[Any] = [[t.grad, getattr(t, "grad_accum", None)] for t in (*parameters, *keys)]
    names = ["grads_in_partition", "averaged_gradients", "all_grad_tensors"]
    names += ["grad_partitions_flat_buffer", "accumulated_grads_in_cpu"]
    gradients += [getattr(optimizer, name, None) for name in names]
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    return weights, gradients, buckets, [[p.data for p in parameters], *vars(optimizer).values()]


def replace_instructions(engine: Any, wrap: Callable[[str, Callable], Callable]) -> None:
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
    """Return the process group of one rank of each stage, through which micro-batches pass."""
    return engine.mpu.get_pipe_parallel_group()


def dp_group(engine: Any) -> Any:
    """Return the process group of the ranks that train this rank's stage, each with data of its own."""
    return engine.mpu.get_data_parallel_group()
