"""The installed DeepSpeed has every private name that dsyolo uses, as `engine/deepspeed_internals.py` expects it."""

from __future__ import annotations

import ast
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import training
from ranks import run_ranks
from source_files import FILES, PACKAGE, each, imports, parse

BORDER = PACKAGE / "engine" / "deepspeed_internals.py"


class Name(NamedTuple):
    """A name of DeepSpeed: where it is, what dsyolo needs of it, and which feature breaks without it."""

    name: str
    of: str  # "engine", "optimizer" or "parameter" of a real engine
    stages: tuple[Any, ...]  # of `ENGINES`
    check: Callable[[Any], bool]
    feature: str


def takes(*parameters: str) -> Callable[[Any], bool]:
    """Whether a function takes these positional parameters and needs no others."""

    def check(function: Any) -> bool:
        inspect.signature(function).bind(*parameters)
        return True

    return check


def is_a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def of_tensors(value: Any) -> bool:
    return len(value) > 0 and all(isinstance(one, torch.Tensor) for one in value)


def anything(value: Any) -> bool:
    return True


OFFLOADED = "3 with offload"
PIPELINE = "pipeline with ZeRO 1"
ENGINES = (0, 1, 2, 3, OFFLOADED, PIPELINE)
ZERO = (1, 2, 3)
CHECKPOINTS = "EMA, checkpoints and resume (engine/partitions.py)"
MEMORY = "the memory profile (engine/memory_profile.py)"
OFFLOAD = "offload to a folder (engine/offload.py)"
NAMES = (
    Name("torch_autocast_z0_gradscaler", "engine", (0, 1, 2, 3), anything, "resume of fp16 autocast"),
    Name("clip_fp32_gradients", "engine", (0,), takes(), "gradient clipping at ZeRO 0"),
    Name("monitor.write_events", "engine", ENGINES, takes("events"), "monitors of the DeepSpeed JSON"),
    Name("monitor.enabled", "engine", ENGINES, is_a(bool), "monitors of the DeepSpeed JSON"),
    Name("global_samples", "engine", ENGINES, is_a(int), "monitors of the DeepSpeed JSON"),
    Name("step", "optimizer", ENGINES, takes(), "skipped steps at ZeRO 0, the memory profile"),
    Name("optimizer", "optimizer", ZERO, is_a(torch.optim.Optimizer), CHECKPOINTS),
    Name("cpu_offload", "optimizer", (2,), is_a(bool), "accumulation in the partition at ZeRO 2"),
    Name(
        "_use_compact_grad_partition_buffer",
        "optimizer",
        (2,),
        takes("group"),
        "accumulation in the partition at ZeRO 2",
    ),
    Name("single_partition_of_fp32_groups", "optimizer", (1, 2), of_tensors, CHECKPOINTS),
    Name("fp32_partitioned_groups_flat", "optimizer", (3,), of_tensors, CHECKPOINTS),
    Name("grad_position", "optimizer", (3,), lambda v: all(len(p) == 3 for p in v.values()), CHECKPOINTS),
    Name("get_param_id", "optimizer", (3,), takes("parameter"), CHECKPOINTS),
    Name("persistent_parameters", "optimizer", (3,), of_tensors, "validation with the EMA at ZeRO 3"),
    Name("ds_shape", "parameter", (3,), is_a(torch.Size), CHECKPOINTS),
    Name("ds_numel", "parameter", (3,), is_a(int), CHECKPOINTS),
    Name("ds_tensor", "parameter", (3,), is_a(torch.Tensor), "validation with the EMA at ZeRO 3"),
    Name("ds_persist", "parameter", (3,), is_a(bool), MEMORY),
    Name("partition", "parameter", (3,), takes("parameters"), "validation with the EMA at ZeRO 3"),
    Name("all_gather", "parameter", (3,), takes("parameters"), "validation with the EMA at ZeRO 3"),
    Name("_hp_mapping.param_group_index", "parameter", (1, 2), is_a(int), CHECKPOINTS),
    Name("_hp_mapping.lp_fragment_address.start", "parameter", (1, 2), is_a(int), CHECKPOINTS),
    Name("_hp_mapping.hp_fragment_address.start", "parameter", (1, 2), is_a(int), CHECKPOINTS),
    Name("_hp_mapping.hp_fragment_address.numel", "parameter", (1, 2), is_a(int), CHECKPOINTS),
    Name("_link_all_hp_params", "optimizer", (1, 2), takes(), OFFLOAD),
    Name("fp16_partitioned_groups_flat", "optimizer", (OFFLOADED,), of_tensors, OFFLOAD),
    Name("param_groups_fp16_flat_cpu_memory", "optimizer", (OFFLOADED,), is_a(list), OFFLOAD),
    Name("_unflatten_partitioned_parameters", "optimizer", (3, OFFLOADED), takes("group"), OFFLOAD),
    Name("ipg_buckets", "optimizer", ZERO, lambda v: all(hasattr(b, "buffer") for b in v.values()), MEMORY),
    Name("averaged_gradients", "optimizer", ZERO, anything, MEMORY),
    Name("grads_in_partition", "optimizer", (1, 2), anything, MEMORY),
    Name("all_grad_tensors", "optimizer", (1, 2), anything, MEMORY),
    Name("grad_partitions_flat_buffer", "optimizer", (3,), is_a(torch.Tensor), MEMORY),
    Name("scaled_global_norm", "optimizer", (PIPELINE,), takes(), "clipping in a pipeline with ZeRO 1"),
    Name(
        "_model_parallel_all_reduce",
        "optimizer",
        (PIPELINE,),
        takes("tensor", "op"),
        "clipping in a pipeline with ZeRO 1",
    ),
    Name("_INSTRUCTION_MAP", "engine", (PIPELINE,), is_a(dict), "the time profile of a pipeline"),
    Name("mpu.get_pipe_parallel_group", "engine", (PIPELINE,), takes(), "losses and norms of a pipeline"),
    Name("mpu.get_data_parallel_group", "engine", (PIPELINE,), takes(), "replicas of a pipeline's stages"),
)


def look(kind: str, name: Name, engine: Any) -> str:
    """Return what is wrong with a name on a real engine; empty: nothing."""
    value = {
        "engine": engine,
        "optimizer": engine.optimizer,
        "parameter": next(engine.module.parameters()),
    }[name.of]
    try:
        for part in name.name.split("."):
            value = getattr(value, part)
        return "" if name.check(value) else f"{value!r:.80} is not what is needed"
    except (AttributeError, TypeError) as error:
        return str(error)


def all_faults(folder: str) -> dict[tuple[str, Any], str]:
    found = {}
    for kind in ENGINES:
        engine = make_engine(kind, Path(folder))
        found |= {(n.name, kind): look(kind, n, engine) for n in NAMES if kind in n.stages}
        engine.destroy()
    return found


def make_engine(kind: Any, folder: Path) -> Any:
    if kind == PIPELINE:
        return make_pipeline()
    stage = 3 if kind == OFFLOADED else kind
    zero: dict[str, Any] = {"stage": stage}
    if kind == OFFLOADED:
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    engine, *_ = training.build(stage, folder, zero_optimization=zero)
    training.train(engine, type("NoEma", (), {"update": lambda self: None})(), 0, 1)
    return engine.ds_engine


def make_pipeline() -> Any:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule([torch.nn.Linear(4, 4)], num_stages=1, loss_fn=torch.nn.functional.mse_loss)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return run_ranks(1, all_faults, str(tmp_path_factory.mktemp("internals")))[0]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{name.of}.{name.name}")
def test_a_real_engine_has(faults, name):
    for kind in name.stages:
        fault = faults[name.name, kind]
        where = f"DeepSpeed's {name.of}.{name.name} at ZeRO stage {kind}"
        assert not fault, f"{where}: {fault}. {name.feature} depends on it"


# ---- names of modules, which need no engine


def test_the_op_that_would_be_compiled_can_be_switched_off():
    import deepspeed

    message = "the start of a run on a CPU without a compiler depends on deepspeed.ops.__compatible_ops__"
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, message


def test_the_logger_and_its_warning_have_the_names_that_are_filtered():
    from deepspeed.runtime import engine as deepspeed_engine
    from deepspeed.utils import logger

    assert logger is logging.getLogger("DeepSpeed"), "a quiet terminal depends on the logger's name"
    source = inspect.getsource(deepspeed_engine)
    assert "untested" in source.lower(), "a quiet start with SGD depends on the warning's text"


def test_the_backend_is_where_reductions_are_replaced():
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend

    assert hasattr(comm, "cdb"), "gloo's reductions and the time profile depend on deepspeed.comm.comm.cdb"
    for function in ("reduce_scatter_tensor", "reduce"):
        message = f"fewer bytes over gloo (engine/process_group.py) depend on the backend's {function}"
        assert callable(getattr(TorchBackend, function, None)), message
    source = inspect.getsource(TorchBackend)
    for name in ("all_gather_function", "reduce_scatter_function"):
        assert f"self.{name} = " in source, f"the time profile (engine/comm_timer.py) depends on {name}"


def test_the_comms_logger_has_its_counts():
    from deepspeed.comm import comm
    from deepspeed.utils.comms_logging import CommsLogger

    assert hasattr(comm, "comms_logger"), "`dsyolo scale` depends on deepspeed.comm.comm.comms_logger"
    logger = CommsLogger()
    assert logger.enabled is False, "`dsyolo scale` depends on CommsLogger.enabled"
    assert logger.comms_dict == {}, "`dsyolo scale` depends on CommsLogger.comms_dict"
    inspect.signature(comm.configure).bind(enabled=True, prof_all=True, verbose=False)


def test_the_dynamic_scaler_has_its_state():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    feature = "resume with fp16 (engine/engine.py)"
    scaler = DynamicLossScaler(
        init_scale=4,
        scale_window=10,
        min_scale=1,
        delayed_shift=2,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
        dtype=torch.half,
    )
    names = ("dynamic", "cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis", "delayed_shift")
    for name in names:
        assert hasattr(scaler, name), f"{feature} depends on DynamicLossScaler.{name}"
    assert "self.loss_scaler" in inspect.getsource(DeepSpeedZeroOptimizer), f"{feature} depends on it"


@pytest.mark.parametrize("name", ["overflow", "grad_accum", "accumulated_grads_in_cpu", "torch_autocast_z0"])
def test_attributes_that_only_some_runs_have_are_in_the_source(name):
    from deepspeed.runtime import base_optimizer, engine
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    source = "".join(map(inspect.getsource, (base_optimizer, engine, stage3, stage_1_and_2)))
    assert f".{name}" in source, f"skipped steps, fp16 or the memory profile depend on the attribute {name}"


@pytest.mark.parametrize("name", ["LoadMicroBatch", "ForwardPass", "BackwardPass", "OptimizerStep"])
def test_the_pipeline_has_the_instructions_that_are_timed(name):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    kinds = {kind.__name__ for kind in PipelineEngine._INSTRUCTION_MAP}
    assert name in kinds, f"the time profile of a pipeline depends on the instruction {name}"


def test_pinned_memory_can_be_released():
    from deepspeed.accelerator import get_accelerator

    assert callable(get_accelerator().unpin_memory), f"{OFFLOAD} depends on accelerator.unpin_memory"


# ---- nobody else uses them

# Private names of others that engine/ uses: torch's and the standard library's.
NOT_DEEPSPEEDS = {
    "_asdict",
    "_buffers",
    "_cdata",
    "_current_frames",
    "_exit",
    "_foreach_lerp_",
    "_functions",
    "_internal",
    "_make",
    "_replace",
}
# `deepspeed.` itself, and its documented modules and functions.
PUBLIC_IMPORTS = {
    "deepspeed",
    "deepspeed.accelerator",
    "deepspeed.accelerator.get_accelerator",
    "deepspeed.comm",
    "deepspeed.comm.ReduceOp",
    "deepspeed.pipe",
    "deepspeed.pipe.PipelineModule",
}
COMMON = {"step", "optimizer", "partition", "all_gather", "enabled", "start", "numel", "monitor"}
PRIVATE = {part for name in NAMES for part in name.name.split(".")} - COMMON
PRIVATE |= {"cdb", "comms_logger", "comms_dict", "__compatible_ops__", "grad_accum", "overflow"}


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private attributes of objects other than `self`, names of `PRIVATE`, and undocumented modules of DeepSpeed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            private = node.attr.startswith("_") and not node.attr.startswith("__") and not own
            if (private and node.attr not in NOT_DEEPSPEEDS) or node.attr in PRIVATE:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value in PRIVATE - {"comms_logger"}:
            yield f"line {node.lineno}: {node.value!r}"
    for name in imports(tree):
        if name.split(".")[0] == "deepspeed" and name not in PUBLIC_IMPORTS:
            yield f"imports {name}"


def test_only_the_border_uses_private_names_of_deepspeed():
    assert len(list(private_uses(parse(BORDER)))) > 40  # it sees them
    each(lambda path: private_uses(parse(path)) if path.parent == BORDER.parent and path != BORDER else ())


def test_outside_of_engine_nobody_uses_them_either():
    def check(path: Path) -> Iterator[str]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE - {"overflow"}:
                yield f"line {node.lineno}: {ast.unparse(node)}"

    assert len(FILES) > 100
    each(lambda path: () if path.parent == BORDER.parent else check(path))


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("engine.optimizer._link_all_hp_params()", False),
        ("getattr(p, 'ds_tensor', None)", False),
        ("from deepspeed.runtime.pipe import schedule", False),
        ("engine.ds_engine.step(); self._mine; x.__class__", True),
        ("from deepspeed.accelerator import get_accelerator", True),
    ],
)
def test_the_check_sees(line, fine):
    assert (not list(private_uses(ast.parse(line)))) == fine
