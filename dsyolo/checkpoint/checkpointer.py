"""Saves and loads checkpoints: named tensors, independent of ranks, ZeRO stage and precision.

A checkpoint is a folder `step_<n>`: one safetensors file of each rank, and the manifest `progress.json`. It is renamed to
this when it is complete, and then never written to. A second one of the same step is `step_<n>.1`.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsyolo.base.atomic_file import refuse_planted_link
from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import shortened
from dsyolo.checkpoint.latest import verify
from dsyolo.checkpoint.manifest import (
    FORMAT,
    Manifest,
    Reader,
    all_checkpoints,
    headline_of,
    read_manifest,
    readable_manifest,
    sha256_of,
)
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.collectives import barrier, first_problem_of_any_rank
from dsyolo.cluster.shared_fs import free_path
from dsyolo.cluster.world import World, balanced_owners
from dsyolo.engine.ema import Ema
from dsyolo.engine.engine import Engine
from dsyolo.engine.offload import FIRST_STATE
from dsyolo.engine.partitions import Partitions


class Checkpointer:
    """Saves and loads the whole state of a run in `folder`. Keeps the `keep` newest checkpoints and the best one."""

    def __init__(
        self, folder: Path, engine: Engine, partitions: Partitions, ema: Ema, world: World, *, keep: int = 2
    ) -> None:
        self.folder, self.keep = folder, keep
        self._engine, self._partitions, self._ema, self._world = engine, partitions, ema, world

    def save(self, progress: TrainState, *, is_best: bool = False) -> str | None:
        """Write a checkpoint, all ranks together. Return why it could not be written, on all ranks; None on success."""
        part = self.folder / f".step_{progress.step:08d}.part"
        problem = self._agreed(self._begin, part, on_main=True)
        own = {} if problem else dict(self._own_tensors())
        problem = problem or self._agreed(self._write, part, own)
        problem = problem or self._agreed(self._complete, part, progress, is_best, on_main=True)
        if problem is None:
            return None
        if self._world.is_main_process:
            shutil.rmtree(part, ignore_errors=True)  # make room on a full disk for the rest of the run
        newest = all_checkpoints(self.folder)[-1:]
        kept = f"The one before, {newest[0].name}, is kept" if newest else "There is none before it"
        return f"The checkpoint of step {progress.step} could not be written: {problem}. {kept}."

    def _agreed(self, work: Callable[..., None], *args: Any, on_main: bool = False) -> str | None:
        """Do a part of the writing. Return the problem of the first rank that failed, on all ranks."""
        problem = None
        try:
            if self._world.is_main_process or not on_main:
                work(*args)
        except (OSError, SafetensorError) as error:
            problem = f"rank {self._world.rank}: {getattr(error, 'strerror', None) or error} ({self.folder})"
        return first_problem_of_any_rank(problem)

    def _begin(self, part: Path) -> None:
        refuse_planted_link(self.folder)
        for old in self.folder.glob(".step_*.part"):  # killed runs left them
            if old.is_symlink():
                old.unlink()
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)

    def _write(self, part: Path, own: dict[str, torch.Tensor]) -> None:
        file = part / f"tensors-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
        save_file(own, file)
        file.chmod(part.stat().st_mode & 0o666)  # safetensors creates files that only their owner may read
        _sync_to_disk(file)
        # Each rank leaves its part of the manifest beside its tensors; rank 0 joins them.
        (part / f"{file.stem}.json").write_text(
            json.dumps({"sha256": sha256_of(file), "names": sorted(own)}), encoding="utf-8"
        )

    def load(self, path: Path, *, verified: bool = False) -> TrainState:
        """Set engine, optimizer, EMA and buffers to the state of the checkpoint at `path`.

        Args:
            verified: `newest_whole` has compared its checksums.

        Raises:
            UserError: a file is missing, damaged, or of another network; nothing has been changed.
        """
        manifest = read_manifest(path, verify=False) if verified else verify(path, self._world)
        reader = Reader(path, manifest)
        self._check_tensors(reader, manifest)

        def read(kind: str) -> Callable[[str], torch.Tensor]:
            return lambda name: reader.tensor(f"{kind}/{name}")

        partitions = self._partitions
        partitions.scatter(partitions.masters(), read("param"))
        partitions.copy_to_model(partitions.masters())
        state_names = sorted(manifest.optimizer_states)
        for key, tensors in partitions.make_state(state_names, manifest.optimizer_scalars).items():
            if key in state_names:  # else there was none yet, and the zeros stay
                partitions.scatter(tensors, read(f"optimizer/{key}"))
        self._engine.loss_scale.load(manifest.loss_scale)
        buffers = self._engine.buffers
        buffers.flat.copy_(buffers.own(reader.tensor("buffers/network")))
        if self._ema.tensors:
            self._ema.partitions.scatter(self._ema.tensors, read("ema"))
            self._ema.buffers.copy_(buffers.own(reader.tensor("buffers/ema")))
            self._ema.updates = manifest.ema_updates
        barrier()
        return manifest.progress

    def _check_tensors(self, reader: Reader, manifest: Manifest) -> None:
        """Check all that `load` reads, before it changes anything: names, shapes, types and finite values."""
        averaged = bool(self._ema.tensors)
        states = manifest.optimizer_states
        optimizer = type(self._partitions.optimizer).__name__
        if unknown := states - set(FIRST_STATE[optimizer][0]):
            rule = f"{optimizer} has no such state. Resume with the optimizer it was saved with"
            raise UserError(headline_of(reader.path), [f"optimizer/{shortened(min(unknown))}: {rule}."])
        kinds = ["param", *(f"optimizer/{state}" for state in sorted(states)), *["ema"] * averaged]
        shapes = {f"{kind}/{name}": one for kind in kinds for name, one in self._partitions.shapes.items()}
        buffers = self._engine.buffers
        flat = tuple(buffers.gathered(buffers.flat).shape)
        shapes |= dict.fromkeys(["buffers/network", *["buffers/ema"] * averaged], flat)
        problems = [
            f"{name}: the checkpoint has {found or 'no such tensor'}, but this run needs {shape}. "
            "It was saved with another network or other settings."
            for name, shape in shapes.items()
            if (found := reader.shape(name)) != shape
        ]
        problems = problems or [
            f"{name}: {fault}. Use another checkpoint." for name in shapes if (fault := reader.fault(name))
        ]
        problems = problems or [
            f"{name}: the checkpoint has a variance below 0. Use another checkpoint."
            for kind in ["buffers/network", *["buffers/ema"] * averaged]
            for name, value in buffers.named(reader.tensor(kind)).items()
            if name.endswith("running_var") and bool((value < 0).any())
        ]
        if problems:
            more = [f"and {len(problems) - 1} more tensors"] if len(problems) > 1 else []
            raise UserError(headline_of(reader.path), problems[:1] + more)

    def _own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what this rank writes. All ranks run the same gathers in the same order."""
        partitions, ema = self._partitions, self._ema
        sources = [("param", partitions, partitions.masters())]
        sources += [(f"optimizer/{key}", partitions, own) for key, own in sorted(partitions.state().items())]
        if ema.tensors:
            sources.append(("ema", ema.partitions, ema.tensors))
        sizes = [(name, math.prod(shape)) for name, shape in partitions.shapes.items()]
        owner = balanced_owners(sizes, self._world.size)
        for kind, own, tensors in sources:
            for name, tensor in own.gather(tensors):
                if owner[name] == self._world.rank:
                    yield f"{kind}/{name}", _host_copy(tensor)
        buffers = self._engine.buffers
        for name, flat in (("buffers/network", buffers.flat), ("buffers/ema", ema.buffers)):
            gathered = buffers.gathered(flat)
            if self._world.is_main_process:
                yield name, _host_copy(gathered)

    def _complete(self, part: Path, progress: TrainState, is_best: bool) -> None:
        manifest = Manifest(
            format=FORMAT,
            progress=progress,
            optimizer_scalars=self._partitions.scalars(),
            ema_updates=self._ema.updates,
            loss_scale=self._engine.loss_scale.state(),
            is_best=is_best,
            files={},
            tensors={},
        )
        for note in sorted(part.glob("tensors-*.json")):
            part_of_rank = json.loads(note.read_text(encoding="utf-8"))
            file = note.with_suffix(".safetensors").name
            manifest.files[file] = part_of_rank["sha256"]
            manifest.tensors |= dict.fromkeys(part_of_rank["names"], file)
            note.unlink()
        (part / "progress.json").write_bytes(manifest.to_bytes())
        for path in (part / "progress.json", part):
            _sync_to_disk(path)
        os.replace(part, free_path(self.folder / f"step_{progress.step:08d}"))
        _sync_to_disk(self.folder)
        self._prune()

    def _prune(self) -> None:
        """Remove all but the newest and the best one; renamed first, so that no half of one is found."""
        old = all_checkpoints(self.folder)
        newest, old = old[-self.keep :], old[: -self.keep]
        manifests = ((path, readable_manifest(path)) for path in reversed(old + newest))
        best = next((path for path, manifest in manifests if manifest and manifest.is_best), None)
        for path in old:
            if path != best:
                gone = path.with_name(f".{path.name}.part")
                os.replace(path, gone)
                shutil.rmtree(gone, ignore_errors=True)


def _sync_to_disk(path: Path) -> None:
    """Wait until a file or folder would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
