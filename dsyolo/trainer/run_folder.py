"""The folder of a run: whether it can be this one's, and makes it so."""

from __future__ import annotations

import logging

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.manifest import all_checkpoints
from dsyolo.cluster.preemption import PreemptionHandler
from dsyolo.cluster.run_lock import BUSY, RunLock, set_aside
from dsyolo.config import run_config
from dsyolo.config.messages import cannot_hold_files
from dsyolo.config.resolve import RunSpec
from dsyolo.config.run_config import RunConfig

log = logging.getLogger(__name__)
CLAIM_S = 60  # for another run in the same folder to end, as one that still saves


def check_folder(run: RunConfig, resumes: bool) -> None:
    """A run needs a folder to write to: a new one of its own; one that goes on its checkpoint and settings.

    Raises:
        UserError: it is not so.
    """
    folder = run.folder
    inside = [folder / name for name in ("checkpoints", "weights") if folder.is_dir()]
    for one in (folder, *inside):
        if problem := cannot_hold_files(one):
            raise UserError(f"{folder} cannot be used", [f"--project: {problem}"])
    if not resumes:
        # What a run left that was stopped before its first checkpoint, `auto` may write over.
        if run.resume == "never" and (folder / "config.yaml").exists():
            rule = "it holds a run already. Go on with it by --resume, or name another by --name."
            raise UserError(f"{folder} cannot be used", [rule])
        return
    if not all_checkpoints(folder / "checkpoints"):
        rule = "it has no checkpoint yet. Remove it, and start without --resume."
        raise UserError(f"{folder} cannot be resumed", [rule])
    changed = run_config.differences(RunConfig.load(folder / "config.yaml"), run)
    if changed:
        rule = "Leave it out, or start another run by --name."
        raise UserError(
            f"{folder} cannot be resumed with other settings", [f"{line}. {rule}" for line in changed]
        )


def claim_folder(run: RunSpec, claim: RunLock, request: PreemptionHandler) -> None:
    """Makes the folder this run's, and looks at it again: another run may have been in it since it was read.

    Raises:
        UserError: another run is in it, or has changed what this one is to do there.
    """
    claim.take(min(CLAIM_S, run.config.rendezvous_timeout_s), request.asked)
    if run.config.resumes() != run.resumes:
        rule = (
            "another run has saved there, or removed what was saved, since this one has started. Start again."
        )
        raise UserError(f"{run.folder} cannot be used", [rule], BUSY)
    check_folder(run.config, run.resumes)
    if not run.resumes and (kept := set_aside(run.folder / "weights")):
        log.warning(
            "%s has weights of a run, but no checkpoint to go on from: they are in %s now", run.folder, kept
        )
