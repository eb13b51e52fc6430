"""Checks and locks the folder of a run."""

import logging
from dataclasses import replace

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.manifest import all_checkpoints
from dsyolo.cluster.preemption import PreemptionHandler
from dsyolo.cluster.run_lock import BUSY, RunLock
from dsyolo.cluster.shared_fs import set_aside
from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.resolve import RunSpec
from dsyolo.config.resume import LrEnd, ResumePoint, extension_fault, resume_point
from dsyolo.config.run_config import RunConfig, differences

log = logging.getLogger(__name__)
LOCK_TIMEOUT_S = 60  # for another run in the same folder to end, as one that still saves


def check_folder(run: RunConfig, resume: ResumePoint | None, lr_end: LrEnd) -> None:
    """Check that the run can use its folder: a new run needs one without a run, a resumed one its checkpoint and settings.

    Raises:
        UserError: it cannot.
    """
    folder = run.folder
    inside = [folder / name for name in ("checkpoints", "weights") if folder.is_dir()]
    for one in (folder, *inside):
        if problem := cannot_hold_files(one):
            raise UserError(f"{folder} cannot be used", [f"--project: {problem}"])
    if not resume:
        # The leftovers of a run stopped before its first checkpoint are overwritten, or set aside by `lock_folder`.
        if run.resume == "never" and not run.exist_ok and all_checkpoints(folder / "checkpoints"):
            rule = "it holds a run already. Resume it with --resume, or choose another folder with --name."
            raise UserError(f"{folder} cannot be used", [rule])
        return
    if not all_checkpoints(resume.checkpoints):
        afresh = f"--project {folder.parent} --name {folder.name}"
        rule = f"it has no checkpoint yet. Start it afresh, without --resume: {afresh} and its --data; or take another --name."
        raise UserError(f"{folder} cannot be resumed", [rule])
    rule = "Leave it out, or start another run with --name."
    longer = run.epochs > (resume.epochs or resume.config.epochs)
    lines = [line for line in differences(resume.config, run) if not (longer and line.startswith("epochs:"))]
    changed = [f"{line}. {rule}" for line in lines]
    if fault := extension_fault(resume, run.epochs, lr_end):
        changed.append(f"epochs: {resume.epochs or resume.config.epochs} -> {run.epochs}: {fault}")
    if changed:
        raise UserError(f"{folder} cannot be resumed with other settings", changed)


def lock_folder(spec: RunSpec, run_lock: RunLock, preemption: PreemptionHandler) -> None:
    """Lock the folder, and check it again: another run may have been in it since it was read.

    Raises:
        UserError: another run is in it, or has changed what this one is to do there.
    """
    run_lock.take(min(LOCK_TIMEOUT_S, spec.config.rendezvous_timeout_s), preemption.is_requested)
    resume = resume_point(spec.config.resume, spec.folder, spec.resume)
    if (resume is None) != (spec.resume is None):
        rule = (
            "another run has saved there, or removed what was saved, since this one has started. Start again."
        )
        raise UserError(f"{spec.folder} cannot be used", [rule], BUSY)
    if (
        resume and spec.resume and resume is not spec.resume
    ):  # settings that a run beside this one has written again
        resume = replace(spec.resume, config=resume.config, version=resume.version)
    check_folder(spec.config, resume, LrEnd(spec.ends_at_zero, spec.lr_is_constant))
    if not resume and spec.config.exist_ok and (kept := set_aside(spec.folder / "checkpoints")):
        log.warning("--exist_ok: the checkpoints of the run before were moved to %s.", kept)
    if not resume and (kept := set_aside(spec.folder / "weights")):
        for name in ("metrics.jsonl", "results.png", "predictions.jpg"):
            set_aside(spec.folder / name)
        rule = "held weights but no checkpoint to resume from. The weights were moved to"
        log.warning("%s %s %s, and the figures of that run beside them.", spec.folder, rule, kept)
