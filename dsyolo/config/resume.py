"""Decides whether a run begins at a checkpoint. Nobody else does."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsyolo.base.safe_io import names_in
from dsyolo.config.run_config import RunConfig


@dataclass(frozen=True)
class ResumePoint:
    """The run to resume, as its folder was when it was read."""

    folder: Path
    config: RunConfig  # its settings so far
    version: tuple[int, int, int]  # inode, size and time of change of config.yaml
    global_batch: int | None = None  # images in a step so far; None: no checkpoint could be read yet
    epochs: int | None = None  # those that the newest checkpoint was to be trained for; None as above
    schedule_epochs: int | None = (
        None  # over which its lr comes down: fewer if it was extended; None as above
    )
    is_finished: bool = False  # all epochs are trained

    @property
    def checkpoints(self) -> Path:
        """Return the folder of its checkpoints."""
        return self.folder / "checkpoints"


class LrEnd(NamedTuple):
    """The end of a run's learning rate."""

    is_zero: bool = False
    is_constant: bool = False  # after the warm-up: more epochs change nothing before them


def resume_point(resume: str, folder: Path, known: ResumePoint | None = None) -> ResumePoint | None:
    """Return the point to resume from in `folder`; None to start from scratch.

    Args:
        resume: the option: never, always, or auto: where there is a checkpoint.
        known: found before: config.yaml is read again only if it has changed since.

    Raises:
        UserError: config.yaml is missing or cannot be used.
    """
    path = config_path(folder)
    has_checkpoint = path.is_file() and any(
        name.startswith("step_") for name in names_in(folder / "checkpoints")
    )
    if not (resume == "always" or (resume == "auto" and has_checkpoint)):
        return None
    status = path.stat() if path.is_file() else None
    version = (status.st_ino, status.st_size, status.st_mtime_ns) if status else (0, 0, 0)
    if known and status and known.version == version:
        return known
    return ResumePoint(folder, RunConfig.load(path), version)


def extension_fault(point: ResumePoint, epochs: int, lr_end: LrEnd) -> str | None:
    """Return why a run cannot be extended to `epochs`; None where it can, or where they do not grow.

    A finished run goes on at the lr that its schedule ended with. An unfinished one is in the middle of a schedule over
    its own epochs, which would jump, unless its lr is constant.
    """
    if epochs <= (point.epochs or point.config.epochs):
        return None
    anew = f"start another run from its weights: --weights {point.folder}/weights/last.safetensors --name NEW"
    if not point.is_finished and not lr_end.is_constant:
        rule = "only a finished run can be extended, as the lr comes down over its epochs"
        return f"{rule}. Finish it first, without --epochs; or {anew}."
    if lr_end.is_zero:
        return f"the schedule of the run has ended with lr 0, by which nothing is learned. To go on, {anew}."
    return None


def config_path(folder: Path) -> Path:
    """Return where a run in `folder` keeps its settings."""
    return folder / "config.yaml"
