"""Finds the checkpoint to resume from: the newest intact one. Each rank verifies its share of the files."""

import logging
import os
import shutil
from functools import partial
from itertools import chain
from pathlib import Path

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.manifest import (
    REMEDY,
    Manifest,
    all_checkpoints,
    damaged_files,
    headline_of,
    read_manifest,
)
from dsyolo.cluster.collectives import all_gather_objects, run_on_rank0_and_broadcast
from dsyolo.cluster.world import World, balanced_owners

log = logging.getLogger(__name__)


def newest_whole(folder: Path, world: World, *, set_aside: bool) -> Path:
    """Return the newest checkpoint in `folder` after comparing its checksums. All ranks call it, and get the same.

    Args:
        set_aside: rename a damaged one, and take the one before it.

    Raises:
        UserError: on all ranks; it is damaged, or with `set_aside` all are.
    """
    paths = run_on_rank0_and_broadcast(world, partial(all_checkpoints, folder))
    for path in reversed(paths):
        try:
            verify(path, world)
            return path
        except UserError as error:
            if not set_aside:
                raise
            if path == paths[0]:
                rule = "No other checkpoint of this run is intact. Copy one here, or start a new run with another --name."
                faults = [problem.replace(REMEDY, "").rstrip() for problem in error.problems]
                raise UserError(error.headline, [*faults, rule]) from None
            run_on_rank0_and_broadcast(world, partial(_set_aside, path, error))
    afresh = f"--project {folder.parent.parent} --name {folder.parent.name}"
    rule = f"it has no checkpoint. Start the run afresh, without --resume: {afresh} and its --data; or take another --name."
    raise UserError(headline_of(folder), [rule])


def verify(path: Path, world: World) -> Manifest:
    """Compare the checksums of a checkpoint's files, each rank for its share. All ranks call it, and raise UserError alike."""
    manifest, sizes = run_on_rank0_and_broadcast(world, partial(_manifest_and_sizes, path))
    owner = balanced_owners(sizes, world.size)
    own = [name for name in manifest.files if owner[name] == world.rank]
    if damaged := sorted(chain(*all_gather_objects(damaged_files(path, manifest, own)))):
        raise UserError(headline_of(path), damaged)
    return manifest


def _manifest_and_sizes(path: Path) -> tuple[Manifest, list[tuple[str, int]]]:
    """Return the manifest and the files' sizes as rank 0 sees them; a missing file has size 0."""
    manifest = read_manifest(path, verify=False)
    files = {name: path / name for name in manifest.files}
    return manifest, [(name, file.stat().st_size if file.is_file() else 0) for name, file in files.items()]


def _set_aside(path: Path, error: UserError) -> None:
    aside = path.with_name(f"damaged_{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    except OSError as failure:
        rule = f"{path} is damaged, and cannot be renamed: {failure.strerror}. Make its folder writable, or remove it."
        raise UserError(headline_of(path), [*error.problems, rule]) from None
    log.warning("%s\nIt was renamed to %s; the one before it is used.", error, aside)
