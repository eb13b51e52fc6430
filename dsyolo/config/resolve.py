"""Resolves a run once: the command line, the recipe, data.yaml and the DeepSpeed JSON become one frozen `RunSpec`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dsyolo.base.errors import UserError
from dsyolo.config.batch_options import with_batch_options
from dsyolo.config.cli_args import read_command_line
from dsyolo.config.deepspeed.config import DeepSpeedConfig, check
from dsyolo.config.deepspeed.json_reader import JsonSource, read_source
from dsyolo.config.deepspeed.scheduler_table import SCHEDULE_KEYS
from dsyolo.config.ready_configs import locate
from dsyolo.config.resume import LrEnd, ResumePoint
from dsyolo.config.run_config import AUTO, RunConfig, image_size_fault
from dsyolo.config.spec import DataSpec
from dsyolo.data.formats.yolo import read_data_yaml
from dsyolo.data.loader import largest_size_px
from dsyolo.models.activation_memory import ActivationPlan, choose, count_activations
from dsyolo.models.registry import is_known, meta_network
from dsyolo.models.weights import GivenWeights, read_weights

T = TypeVar("T")


class PlannedConfig(NamedTuple):
    """A DeepSpeed configuration that leaves nothing open."""

    ds: DeepSpeedConfig
    lines: tuple[str, ...] = ()  # what was filled in or set by options, for the start of the run
    val_images: int | None = None  # the most that can be validated at a time, where that was planned
    is_planned: bool = False  # whether the JSON left something to the machine


# Takes the run, its JSON (None: plan all of it), the number of classes and the global batch of the resumed run.
Planner = Callable[[RunConfig, JsonSource | None, int, int | None], PlannedConfig]


@dataclass(frozen=True)
class RunSpec:
    """One resolved run: everything that is known before anything is built."""

    config: RunConfig
    ds: DeepSpeedConfig
    data: DataSpec
    folder: Path
    activations: ActivationPlan
    resume: ResumePoint | None = None  # None: start from scratch
    notes: tuple[str, ...] = ()  # lines for the start of the run: options that were taken, what was planned
    is_planned: bool = False  # whether the JSON left something to the machine
    # The weights that it starts from: maps of the file, so page cache and not memory of the process.
    weights: GivenWeights | None = field(default=None, repr=False, compare=False)

    @property
    def resumes(self) -> bool:
        """Return whether the run begins at a checkpoint."""
        return self.resume is not None

    @property
    def schedule_epochs(self) -> int:
        """Return the epochs over which the lr comes down: fewer than the run's if it was finished and then extended."""
        if self.lr_is_constant:
            return self.config.epochs
        return (self.resume and self.resume.schedule_epochs) or self.config.epochs

    @property
    def ends_at_zero(self) -> bool:
        """Return whether the last lr is 0."""
        return _ends_at_zero(self.config, self.ds)

    @property
    def lr_is_constant(self) -> bool:
        """Return whether the lr stays as it is after the warm-up, so that more epochs change nothing before them."""
        return _is_constant(self.config, self.ds)


def _is_constant(run: RunConfig, ds: DeepSpeedConfig | None) -> bool:
    return ds.scheduler.is_constant if ds and ds.scheduler else run.recipe.lrf == 1


def _ends_at_zero(run: RunConfig, ds: DeepSpeedConfig | None) -> bool:
    return ds.scheduler.ends_at_zero if ds and ds.scheduler else not run.recipe.lrf


def resolve(
    argv: Sequence[str] | None,
    program: str,
    *,
    world_size: int,
    accelerator: str,
    plan: Planner,
    saved_state: Callable[[Path], Any],
    check_folder: Callable[[RunConfig, ResumePoint | None, LrEnd], None],
) -> RunSpec:
    """Read each file that the user gave once, and check everything before any rank builds a model.

    Args:
        argv: the command line; None: of this process.
        program: its name in the help.
        world_size: ranks of the run, all hosts together.
        accelerator: DeepSpeed's name of the device: `cpu`, `cuda`, ...
        plan: fills in what the DeepSpeed JSON leaves to the machine.
        saved_state: reads the newest checkpoint's state in a folder of checkpoints, None where there is none.
        check_folder: refuses a folder that cannot be this run's.

    Raises:
        UserError: something in it cannot be used.
    """
    notes: list[str] = []
    run, resume = read_command_line(argv, program, ranks=world_size, notes=notes)
    errors: list[UserError] = []
    data = _attempt(errors, lambda: read_data_yaml(run.data))
    weights = _attempt(
        errors, lambda: read_weights(Path(run.weights)) if run.weights and not resume else None
    )
    run = _with_model_of(weights, run, notes)
    if run.transfer_classes and not run.weights:
        rule = "true given, but there are no weights to take classes from. Give --weights too."
        errors.append(UserError("This run cannot start", [f"--transfer_classes: {rule}"]))
    network = _attempt(errors, lambda: meta_network(run.model, data.num_classes if data else 1))
    if network and (fault := image_size_fault(run.imgsz, run.model, network.size_multiple_px)):
        errors.append(UserError("This run cannot start", [f"--imgsz: {fault}"]))
    if resume and (saved := saved_state(resume.checkpoints)):
        resume = replace(
            resume,
            global_batch=saved.global_batch,
            epochs=saved.epochs,
            schedule_epochs=saved.schedule_epochs or saved.epochs,
            is_finished=saved.epoch >= saved.epochs,
        )
    known = None if errors else data  # planning needs a network, its images and their classes
    layers = network.has_parameters if network else None
    planned = _attempt(errors, lambda: _configure(run, known, layers, resume, world_size, accelerator, plan))
    if planned and (problems := _two_schedules(run, planned.ds)):
        errors.append(UserError("This run cannot start", problems))
    lr_end = LrEnd(*(ask(run, planned.ds if planned else None) for ask in (_ends_at_zero, _is_constant)))
    _attempt(errors, lambda: check_folder(run, resume, lr_end))
    if len(errors) > 1:
        raise UserError("This run cannot start", [str(error).replace("\n", "\n  ") for error in errors])
    if errors:
        raise errors[0]
    assert planned is not None
    assert data is not None
    ds, val_images = planned.ds, planned.val_images
    if ds.stages > 1 and run.recipe.multi_scale:
        rule = "the stages of a pipeline agree on one size. Leave it out, or set pipeline.stages to 1."
        raise UserError("This run cannot start", [f"multi_scale: true given, but {rule}"])
    if val_images:
        run = run.model_copy(update={"val_batch_size": min(run.val_batch_size, val_images)})
    activations = plan_activations(run, ds, data.num_classes)
    return RunSpec(
        run, ds, data, run.folder, activations, resume, (*notes, *planned.lines), planned.is_planned, weights
    )


def _with_model_of(weights: GivenWeights | None, run: RunConfig, notes: list[str]) -> RunConfig:
    """Return the run with the variant of its weights, as YOLOv5 takes it, where the user gave no other."""
    variant = weights[1].variant if weights and weights[1] else run.model
    if "model" in run.model_fields_set or variant == run.model or not is_known(variant):
        return run
    notes.append(f"--weights {run.weights}: of a {variant}, so --model {variant}")
    return run.model_copy(update={"model": variant})


def _configure(
    run: RunConfig,
    data: DataSpec | None,
    layers: tuple[bool, ...] | None,
    resume: ResumePoint | None,
    world_size: int,
    accelerator: str,
    plan: Planner,
) -> PlannedConfig | None:
    """Read and check the DeepSpeed JSON once, and plan what it leaves open; None if planning lacks usable data."""
    saved_batch = resume.global_batch if resume else None
    if run.deepspeed_config == AUTO:
        return plan(run, None, data.num_classes, saved_batch) if data else None
    source, lines = with_batch_options(
        read_source(locate(run.deepspeed_config)), run, world_size, saved_batch
    )
    if source.left_open and data:
        planned = plan(run, source, data.num_classes, saved_batch)
        return planned._replace(lines=(*lines, *planned.lines))
    return PlannedConfig(
        check(
            source,
            world_size=world_size,
            accelerator=accelerator,
            layers=layers,
            recompute=run.recompute,
            halve=run.halve_micro_batch,
            saved_batch=saved_batch,
        ),
        lines,
    )


def _two_schedules(run: RunConfig, ds: DeepSpeedConfig) -> list[str]:
    """Return a problem for each option of the recipe's schedule that was given beside the JSON's scheduler."""
    if ds.scheduler is None:
        return []
    rule = f"scheduler in {ds.path}, a {ds.scheduler.type}, sets the learning rate. Leave one of them out"
    given = (key for key in SCHEDULE_KEYS if key in run.recipe.model_fields_set)
    return [f"--{key}: {getattr(run.recipe, key)} given, but {rule}." for key in given]


def _attempt(errors: list[UserError], reader: Callable[[], T]) -> T | None:
    try:
        return reader()
    except UserError as error:
        errors.append(error)
        return None


def plan_activations(config: RunConfig, ds: DeepSpeedConfig, num_classes: int) -> ActivationPlan:
    """Return what is recomputed, counted without memory at the largest images. A budget too small raises UserError."""
    size_px = largest_image_px(config, num_classes)
    network = meta_network(config.model, num_classes)
    counted = count_activations(network, (ds.micro_batch, 3, size_px, size_px), ds.precision)
    return choose(counted, ds.parallelism.recompute, offload=ds.parallelism.offload.activations)


def largest_image_px(config: RunConfig, num_classes: int) -> int:
    """Return the largest side of a training's images."""
    if not config.recipe.multi_scale:
        return config.imgsz
    return largest_size_px(config.imgsz, meta_network(config.model, num_classes).size_multiple_px)
