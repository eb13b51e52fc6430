"""The interface of hooks, and the list that calls them in order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from dsyolo.base.batch import StepStats
from dsyolo.base.errors import UserError
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.world import World
from dsyolo.config.resolve import RunSpec
from dsyolo.detection.evaluator import ImageResult
from dsyolo.detection.metrics import Metrics
from dsyolo.engine.engine import Engine
from dsyolo.trainer.data_parts import DataParts

T = TypeVar("T")
log = logging.getLogger(__name__)
Part = Literal["step", "validation", "checkpoint"]


class StepResult(NamedTuple):
    """One optimizer step."""

    stats: StepStats
    lr: float  # learning rate of the weights
    data_wait_s: float  # seconds that this rank waited for its batches


class Validation(NamedTuple):
    """One validation, the same on all ranks."""

    metrics: Metrics
    detections: list[ImageResult]
    is_best: bool


class ExitStatus(NamedTuple):
    """How a training ended: the process's exit status, and a message for the user."""

    status: int = 0
    message: str = ""


class StopTraining(Exception):
    """Ends the training with a status. Raise it on all ranks at the same place."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.end = ExitStatus(status, message)


@dataclass(eq=False)
class RunningTrainer:
    """The part of the trainer that hooks see.

    Attributes:
        spec: the resolved run.
        state: how far the run is.
        epoch: the one that is trained, or was trained last.
        validation: that of the last epoch, None where there was none.
        figures: those of the current epoch, for its row: add yours in `after_epoch`, before the metrics hook.
        stop_status: the exit status that a rank was asked to stop with, for `preempted`: 75, or 130 after Ctrl-C.
        end: how the training ended, None until it did.
    """

    spec: RunSpec
    world: World
    engine: Engine
    data: DataParts
    state: TrainState
    hooks: HookList
    epoch: int = field(default=0, init=False)
    validation: Validation | None = field(default=None, init=False)
    figures: dict[str, float] = field(default_factory=dict, init=False)
    stop_status: int = field(default=0, init=False)
    end: ExitStatus | None = field(default=None, init=False)

    @property
    def is_last_epoch(self) -> bool:
        """Return whether no epoch follows `epoch`."""
        return self.epoch + 1 == self.spec.config.epochs or self.state.stopped_early


class Hook:
    """Base class: override what you need. `self.trainer` is set before `open`.

    All ranks have the same hooks in the same order, but for those that only write on the main process: a hook
    that calls a collective must be on all ranks. Whatever happens, every hook whose `open` was called is closed,
    in reverse order.
    """

    trainer: RunningTrainer

    def open(self) -> None:
        """Called before the first step; `self.trainer.state` says where the run is."""

    def before_epoch(self) -> None:
        """Called before the first step of an epoch, or of its rest after a resume."""

    def before_step(self) -> None:
        """Called before each step, when its batches are loaded."""

    def after_step(self, result: StepResult) -> None:
        """Called after each optimizer step; `self.trainer.state.step` counts it already."""

    def before_validation_batch(self) -> None:
        """Called before each batch of a validation."""

    def after_validation(self, validation: Validation) -> None:
        """Called on all ranks after a validation, before `after_epoch`."""

    def after_epoch(self) -> None:
        """Called after an epoch and its validation; `self.trainer.validation` is None where there was none."""

    def between_epochs(self) -> None:
        """Called after `after_epoch` of all hooks: `state.epoch` is the next epoch, and what is saved resumes there."""

    def preempted(self) -> ExitStatus | None:
        """Called after a rank was asked to stop: save, and return how the run ends."""

    def finish(self) -> None:
        """Called on all ranks after the last step of an orderly end. Collectives are allowed here, but not in `close`."""

    def close(self) -> None:
        """Called at the end, whatever was raised: release what `open` took."""

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """Wrap an epoch's iterator of batches."""
        return batches

    def around(self, part: Part) -> AbstractContextManager[Any]:
        """Return a context around a training step, a validation or the writing of a checkpoint."""
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return what the hook wants in a checkpoint's JSON, where its keys must be unique among all hooks.

        After a resume it is in `self.trainer.state.tracking`.
        """
        return {}


class HookList:
    """Calls hooks in their order.

    Invariant: once `running` is entered, each opened hook is closed exactly once, in reverse order, whatever is raised.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks = tuple(hooks)

    def __iter__(self) -> Iterator[Hook]:
        return iter(self._hooks)

    @contextmanager
    def running(self, trainer: RunningTrainer) -> Iterator[None]:
        """Open all hooks; close them at the end. Log close errors if another exception is being raised; raise them otherwise."""
        opened: list[Hook] = []
        try:
            for hook in self._hooks:
                hook.trainer = trainer
                opened.append(hook)
                hook.open()
            yield
        except BaseException as raised:
            for error in _close(opened):
                log.warning("A hook could not be closed: %s: %s", type(error).__name__, error)
            if isinstance(raised, SystemExit):
                rule = f"it called sys.exit({raised.code!r}). Raise StopTraining, on all ranks: docs/hook.md"
                raise UserError("This run ended", [f"--hook: {rule}."]) from raised
            raise
        for error in _close(opened):
            raise error

    def call(self, event: str, *args: Any) -> list[Any]:
        """Call the method `event` of every hook, and return what they return."""
        return [getattr(hook, event)(*args) for hook in self._hooks]

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        """Wrap an epoch's batches by every hook."""
        for hook in self._hooks:
            batches = _checked(hook, "steps", hook.steps(batches), Iterator, "an iterator of batches")
        return batches

    @contextmanager
    def around(self, part: Part) -> Iterator[None]:
        """Enter the contexts of all hooks."""
        with ExitStack() as stack:
            for hook in self._hooks:
                context = hook.around(part)
                stack.enter_context(_checked(hook, "around", context, AbstractContextManager, "a context"))
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all hooks in one mapping. Raise UserError where two hooks use one key."""
        states: dict[str, Any] = {}
        for hook in self._hooks:
            state = _checked(hook, "state_dict", hook.state_dict(), dict, "a dict, which goes into JSON")
            for key in states.keys() & state.keys():
                rule = f"{type(hook).__name__}.state_dict returns the key {key!r}, which another hook uses"
                raise UserError("The checkpoint cannot be written", [f"--hook: {rule}. Rename it."])
            states |= state
        return states


def _checked(hook: Hook, method: str, value: Any, kind: type, wanted: str) -> Any:
    """Return what a hook returned. Raise UserError for the None of a forgotten `return`, and for what JSON cannot hold."""
    with suppress(TypeError, ValueError):
        if isinstance(value, kind) and (kind is not dict or json.dumps(value)):
            return value
    rule = f"{type(hook).__name__}.{method} returned {value!r}, but it must return {wanted}"
    raise UserError("This run cannot go on", [f"--hook: {rule}. See docs/hook.md."])


def _close(hooks: list[Hook]) -> list[BaseException]:
    """Close hooks in reverse order; return what was raised."""
    errors: list[BaseException] = []
    for hook in reversed(hooks):
        try:
            hook.close()
        except (Exception, SystemExit) as error:  # a hook may be a user's own
            errors.append(error)
    return errors
