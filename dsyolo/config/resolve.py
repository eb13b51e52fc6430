"""Resolves a run once: the command line, the recipe, data.yaml and the DeepSpeed JSON become one frozen `RunSpec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsyolo.base.errors import UserError
from dsyolo.cluster.world import World
from dsyolo.config import command_line
from dsyolo.config.deepspeed import config as ds_config
from dsyolo.config.deepspeed.config import DsConfig
from dsyolo.config.run_config import AUTO, RunConfig
from dsyolo.data.formats.yolo import DataSpec, read_data_yaml
from dsyolo.data.loader import largest_size_px
from dsyolo.models.activation_memory import ActivationPlan, choose, count_activations
from dsyolo.models.registry import build_model, has_parameters, max_stride, refuse_image_size
from dsyolo.models.weights import read_weights

Planner = Callable[[RunConfig, int, int | None], Any]  # of a run, its number of classes, a saved global batch


class _Unplanned(NamedTuple):
    config: Any
    lines: tuple[str, ...] = ()
    is_halved: bool = False
    val_images: int | None = None


@dataclass(frozen=True)
class RunSpec:
    """One resolved run: everything that is known before anything is built."""

    config: RunConfig
    ds: DsConfig
    data: DataSpec
    world: World
    folder: Path
    activations: ActivationPlan
    resumes: bool = False  # begins at a checkpoint
    planned: tuple[str, ...] = ()  # what the JSON left to the machine, in words


def resolve(
    argv: Sequence[str] | None,
    world: World,
    accelerator: str,
    *,
    plan: Planner,
    saved_state: Callable[[Path], Any],
    check_folder: Callable[[RunConfig, bool], None],
) -> RunSpec:
    """Reads and checks all that the user gave, before any rank builds a model.

    Args:
        plan: fills in what the DeepSpeed JSON leaves to the machine.
        saved_state: reads the newest checkpoint's state in a folder of checkpoints, None where there is none.
        check_folder: refuses a folder that cannot be this run's.

    Raises:
        UserError: something in it cannot be used.
    """
    run = command_line.parse(argv)
    refuse_image_size(run.model, run.imgsz)
    folder, resumes = run.folder, run.resumes()
    saved = saved_state(folder / "checkpoints") if resumes else None
    filled = _plan(run, saved, plan)
    is_auto = run.deepspeed_config == AUTO

    def checked() -> Any:
        if filled.config == AUTO:
            return None  # not planned, as the data cannot be used
        return ds_config.check(
            filled.config,
            world_size=world.size,
            accelerator=accelerator,
            layers=has_parameters(run.model),
            recompute="auto" if is_auto else run.recompute,  # it is in the plan
            halved=run.halve_micro_batch and not filled.is_halved,
            saved_batch=saved and saved.global_batch,
            name=f"--deepspeed_config {AUTO}" if is_auto else run.deepspeed_config,
        )

    ds, data, *_ = _all_of(
        checked,
        lambda: read_data_yaml(run.data),
        lambda: check_folder(run, resumes),
        lambda: run.weights and not resumes and read_weights(Path(run.weights)),
    )
    if ds.stages > 1 and run.recipe.multi_scale:
        rule = "the stages of a pipeline agree on one size. Leave it out, or set pipeline.stages to 1."
        raise UserError("This run cannot start", [f"multi_scale: true given, but {rule}"])
    if filled.val_images:
        fitting = min(run.val_batch_size, filled.val_images)
        run = run.model_copy(update={"val_batch_size": fitting})
    activations = plan_activations(run, ds, data.num_classes)
    return RunSpec(run, ds, data, world, folder, activations, resumes, filled.lines)


def _plan(run: RunConfig, saved: Any, plan: Planner) -> Any:
    """The DeepSpeed JSON with all that it leaves to the machine; untouched where that is nothing.

    Raises:
        UserError: nothing fits this machine.
    """
    try:
        num_classes = read_data_yaml(run.data).num_classes
    except UserError:  # is told with the other mistakes
        return _Unplanned(run.deepspeed_config)
    return plan(run, num_classes, saved and saved.global_batch)


def _all_of(*readers: Callable[[], Any]) -> list[Any]:
    """What each reader gives; where some fail, all of their problems in one error."""
    results, errors = [], []
    for reader in readers:
        try:
            results.append(reader())
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise UserError("This run cannot start", [str(error).replace("\n", "\n  ") for error in errors])
    if errors:
        raise errors[0]
    return results


def plan_activations(config: RunConfig, ds: DsConfig, num_classes: int) -> ActivationPlan:
    """What is recomputed, counted on a network without memory, at the largest size of its images.

    Raises:
        UserError: the budget is too small.
    """
    size_px = config.imgsz
    if config.recipe.multi_scale:
        size_px = largest_size_px(size_px, max_stride(config.model))
    with torch.device("meta"):
        network = build_model(config.model, num_classes)
    counted = count_activations(network, (ds.micro_batch, 3, size_px, size_px), ds.precision)
    return choose(counted, ds.recompute, offload=ds.offload_activations)
