"""The checkpoint that a run goes on from: the newest whole one, all ranks together, each with its share of the files."""

from __future__ import annotations

import os
import shutil
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


def newest_whole(folder: Path, world: World, *, set_aside: bool) -> Path:
    """The newest checkpoint in `folder`, with its checksums compared. All ranks call it, and get the same.

    Args:
        set_aside: a damaged one is renamed, for a human to look at, and the one before it is taken, if there is one.

    Raises:
        UserError: on all ranks; it is damaged, or with `set_aside` all of them are.
    """
    paths = run_on_rank0_and_broadcast(world, lambda: all_checkpoints(folder))
    for path in reversed(paths):
        try:
            verify(path, world)
            return path
        except UserError as error:
            if not set_aside:
                raise
            if path == paths[0]:
                rule = "No other checkpoint of this run is whole. Put a copy of one here, or begin anew under another --name."
                faults = [problem.replace(REMEDY, "").rstrip() for problem in error.problems]
                raise UserError(error.headline, [*faults, rule]) from None
            said = run_on_rank0_and_broadcast(world, lambda path=path, error=error: _set_aside(path, error))
            if world.is_main_process:
                print(said)
    raise UserError(headline_of(folder), ["it has no checkpoint. Start without --resume."])


def verify(path: Path, world: World) -> Manifest:
    """Compares the checksums of a checkpoint's files, each rank those of its share. All ranks call it.

    Raises:
        UserError: on all ranks; something is missing or damaged.
    """
    manifest, sizes = run_on_rank0_and_broadcast(world, lambda: _manifest_and_sizes(path))
    owner = balanced_owners(sizes, world.size)
    own = [name for name in manifest.files if owner[name] == world.rank]
    told = all_gather_objects(damaged_files(path, manifest, own))
    if damaged := sorted(line for lines in told for line in lines):
        raise UserError(headline_of(path), damaged)
    return manifest


def _manifest_and_sizes(path: Path) -> tuple[Manifest, list[tuple[str, int]]]:
    """The sizes are one rank's, so that all share out the same; a file that is missing takes no time."""
    manifest = read_manifest(path, verify=False)
    files = {name: path / name for name in manifest.files}
    return manifest, [(name, file.stat().st_size if file.is_file() else 0) for name, file in files.items()]


def _set_aside(path: Path, error: UserError) -> str:
    """Renames a damaged checkpoint; what there is to say."""
    aside = path.with_name(f"damaged_{path.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    except OSError as failure:
        raise UserError(
            headline_of(path), [*error.problems, f"It cannot be renamed: {failure.strerror}."]
        ) from None
    return f"{error}\nIt is {aside} now; the one before it is taken."
