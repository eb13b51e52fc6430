"""Checkpoints of named tensors: nothing in them knows of ranks, ZeRO stage or precision.

A checkpoint is a folder `step_<n>`: safetensors files, one written by each rank, and `progress.json` with the
progress of the run, which file holds which tensor, and each file's checksum. It is written under another name
and becomes whole by a rename; one that is whole is never written to again. A second one of the same step, as after
a validation that was interrupted, is `step_<n>.1`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsyolo.batch import StepStats
from dsyolo.errors import UserError
from dsyolo.model.weights import is_finite
from dsyolo.parallel.dist import World, barrier, decided_by_first, problem_of_any, share_of, together
from dsyolo.parallel.ema import Ema, NoEma
from dsyolo.parallel.engine import Engine
from dsyolo.parallel.folder import FIRST_STATE
from dsyolo.parallel.shards import Shards
from dsyolo.untrusted import read_bytes, shortened

FORMAT = 1
SIGN_S = 10.0  # network file systems show a new file after some seconds
_STEP_FOLDER = re.compile(r"step_(\d+)(?:\.(\d+))?$")
MOST_MANIFEST_BYTES = 16 << 20  # the largest network's, saved by a thousand ranks, has half a MiB
_FILE = re.compile(r"[\w-]+\.safetensors", re.ASCII)


class Progress(BaseModel):
    """How far a run is. Its attributes change; the trackers read them."""

    model_config = ConfigDict(extra="forbid")

    total_steps: int
    epochs: int
    num_images: int  # of the training split
    global_batch: int
    seed: int
    step: int = 0  # optimizer steps done
    epoch: int = 0  # 0-based, the one that is being trained
    images_seen: int = 0  # position in the stream of samples
    best_fitness: float = -1.0
    best_epoch: int = -1
    stopped_early: bool = False
    skipped_in_a_row: int = 0  # steps, up to now
    tracking: dict[str, Any] = {}  # what the tracker wants back
    settings: dict[str, Any] = {}  # what must be the same when the run goes on, by the name that users know

    def advance(self, stats: StepStats) -> Progress:
        """One more optimizer step."""
        self.step += 1
        self.images_seen += stats.num_images
        self.skipped_in_a_row = 0 if stats.was_applied else self.skipped_in_a_row + 1
        return self

    def judge(self, fitness: float, patience: int) -> bool:
        """Notes an epoch's fitness and tells whether it is the best; sets `stopped_early` after `patience` epochs without."""
        is_best = fitness > self.best_fitness
        if is_best:
            self.best_fitness, self.best_epoch = fitness, self.epoch
        self.stopped_early = patience > 0 and self.epoch - self.best_epoch >= patience
        return is_best


class Manifest(BaseModel):
    """The content of progress.json."""

    model_config = ConfigDict(extra="forbid")

    format: int
    progress: Progress
    optimizer_scalars: dict[str, float]
    ema_updates: int
    loss_scale: dict[str, float] = {}  # of fp16; see LossScale.state
    is_best: bool = False  # of the epochs validated so far
    files: dict[str, str]  # file name -> sha256
    tensors: dict[str, str]  # tensor name -> file name

    @property
    def optimizer_states(self) -> set[str]:
        """Names of what the optimizer keeps of each weight."""
        return {name.split("/")[1] for name in self.tensors if name.startswith("optimizer/")}


class Checkpoints:
    """Saves and loads the whole state of a run in `folder`.

    Args:
        folder: gets one sub-folder per checkpoint.
        keep: so many of the newest stay, and the best one.
    """

    def __init__(
        self, folder: Path, engine: Engine, shards: Shards, ema: Ema | NoEma, world: World, *, keep: int = 2
    ) -> None:
        self.folder, self.keep = folder, keep
        self._engine, self._shards, self._ema, self._world = engine, shards, ema, world

    def save(self, progress: Progress, *, is_best: bool = False) -> str | None:
        """Writes a checkpoint, all ranks together. The previous ones stay whole whatever happens.

        Returns:
            why it could not be written, the same on all ranks; None where it was.
        """
        part = self.folder / f".step_{progress.step:08d}.part"
        problem = self._agreed(self._begin, part, on_first=True)
        own = {} if problem else dict(self._own_tensors())
        problem = problem or self._agreed(self._write, part, own)
        problem = problem or self._agreed(self._complete, part, progress, is_best, on_first=True)
        if problem is None:
            return None
        if self._world.is_first:
            shutil.rmtree(part, ignore_errors=True)  # on a full disk, room for the rest of the run
        newest = all_checkpoints(self.folder)[-1:]
        kept = f"{newest[0].name} is kept" if newest else "there is none yet"
        return f"The checkpoint of step {progress.step} could not be written: {problem}. Of those before, {kept}."

    def _agreed(self, work: Callable[..., None], *args: Any, on_first: bool = False) -> str | None:
        """Does a part of the writing, and tells all ranks where one of them failed."""
        problem = None
        try:
            if self._world.is_first or not on_first:
                work(*args)
        except (OSError, SafetensorError) as error:
            problem = f"rank {self._world.rank}: {getattr(error, 'strerror', None) or error} ({self.folder})"
        return problem_of_any(problem)

    def _begin(self, part: Path) -> None:
        for old in self.folder.glob(".step_*.part"):  # of runs that were killed
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir(parents=True)

    def _write(self, part: Path, own: dict[str, torch.Tensor]) -> None:
        file = part / f"tensors-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
        save_file(own, file)
        file.chmod(part.stat().st_mode & 0o666)  # safetensors makes files that nobody else may read
        _to_disk(file)
        # Beside its tensors each rank leaves what the manifest says of them; the first one puts it together.
        (part / f"{file.stem}.json").write_text(json.dumps({"sha256": _sha256(file), "names": sorted(own)}))

    def load(self, path: Path, *, verify: bool = True) -> Progress:
        """Brings engine, optimizer, EMA and buffers to the state of the checkpoint at `path`.

        Args:
            verify: compare checksums; False where `newest_whole` has done it, once for all ranks.

        Raises:
            UserError: a file is missing, damaged, or of another network. Nothing is changed then.
        """
        manifest = read_manifest(path, verify=verify)
        reader = _Reader(path, manifest)
        self._check_tensors(reader, manifest)
        shards = self._shards
        shards.scatter(shards.masters(), lambda name: reader.tensor(f"param/{name}"))
        shards.publish(shards.masters())
        state_names = sorted(manifest.optimizer_states)
        for key, tensors in shards.make_state(state_names, manifest.optimizer_scalars).items():
            if key in state_names:  # else none was needed yet, and zeros lie in a file
                shards.scatter(tensors, lambda name, key=key: reader.tensor(f"optimizer/{key}/{name}"))
        self._engine.loss_scale.load(manifest.loss_scale)
        buffers = self._engine.buffers
        buffers.flat.copy_(buffers.own(reader.tensor("buffers/network")))
        if self._ema.tensors:
            self._ema.shards.scatter(self._ema.tensors, lambda name: reader.tensor(f"ema/{name}"))
            self._ema.buffers.copy_(buffers.own(reader.tensor("buffers/ema")))
            self._ema.updates = manifest.ema_updates
        barrier()
        return manifest.progress

    def _check_tensors(self, reader: _Reader, manifest: Manifest) -> None:
        """All that `load` will take, before it changes anything: names, shapes, types and finite values."""
        averaged = bool(self._ema.tensors)
        states = manifest.optimizer_states
        optimizer = type(self._shards.optimizer).__name__
        if strange := states - set(FIRST_STATE[optimizer][0]):
            rule = f"{optimizer} has no such state"
            raise UserError(
                f"{reader.path} cannot be resumed from", [f"optimizer/{shortened(min(strange))}: {rule}."]
            )
        kinds = ["param", *(f"optimizer/{state}" for state in sorted(states)), *(["ema"] if averaged else [])]
        shapes = {f"{kind}/{name}": tuple(one) for kind in kinds for name, one in self._shards.shapes.items()}
        buffers = self._engine.buffers
        flat = tuple(buffers.gathered(buffers.flat).shape)
        shapes |= dict.fromkeys(["buffers/network", *(["buffers/ema"] if averaged else [])], flat)
        problems = [
            f"{name}: {found or 'nothing'} in it, but {shape} needed. It is of another network or setting."
            for name, shape in shapes.items()
            if (found := reader.shape(name)) != shape
        ]
        problems = problems or [
            f"{name}: {fault}. Take another checkpoint." for name in shapes if (fault := reader.fault(name))
        ]
        if problems:
            more = [f"and {len(problems) - 1} more tensors"] if len(problems) > 1 else []
            raise UserError(f"{reader.path} cannot be resumed from", problems[:1] + more)

    def _own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this rank writes. All ranks run through the same gathers in the same order."""
        shards, ema = self._shards, self._ema
        sources: dict[str, tuple[Shards, Sequence[torch.Tensor]]] = {"param": (shards, shards.masters())}
        sources |= {f"optimizer/{key}": (shards, state) for key, state in sorted(shards.state().items())}
        if ema.tensors:
            sources["ema"] = (ema.shards, ema.tensors)
        sizes = [(name, torch.Size(shape).numel()) for name, shape in self._shards.shapes.items()]
        owner = share_of(sizes, self._world.size)
        for kind, (holders, tensors) in sources.items():
            for name, tensor in holders.gather(tensors):
                if owner[name] == self._world.rank:
                    yield f"{kind}/{name}", _host_copy(tensor)
        buffers = self._engine.buffers
        for name, flat in (("buffers/network", buffers.flat), ("buffers/ema", self._ema.buffers)):
            gathered = buffers.gathered(flat)
            if self._world.is_first:
                yield name, _host_copy(gathered)

    def _complete(self, part: Path, progress: Progress, is_best: bool) -> None:
        files, tensors = {}, {}
        for note in sorted(part.glob("tensors-*.json")):
            said = json.loads(note.read_text())
            file = note.with_suffix(".safetensors").name
            files[file] = said["sha256"]
            tensors |= dict.fromkeys(said["names"], file)
            note.unlink()
        manifest = Manifest(
            format=FORMAT,
            progress=progress,
            optimizer_scalars=self._shards.scalars(),
            ema_updates=self._ema.updates,
            loss_scale=self._engine.loss_scale.state(),
            is_best=is_best,
            files=files,
            tensors=tensors,
        )
        (part / "progress.json").write_text(manifest.model_dump_json(indent=1))
        for path in (part / "progress.json", part):
            _to_disk(path)
        os.replace(part, self._free_name(progress.step))
        _to_disk(self.folder)
        self._prune()

    def _free_name(self, step: int) -> Path:
        name = f"step_{step:08d}"
        names = [name, *(f"{name}.{i}" for i in range(1, 1 + len(all_checkpoints(self.folder))))]
        return next(path for path in map(self.folder.joinpath, names) if not path.exists())

    def _prune(self) -> None:
        """Removes all but the newest, and the best one: under another name first, so that no half of one is found."""
        old = all_checkpoints(self.folder)
        newest, old = old[-self.keep :], old[: -self.keep]
        best = next((path for path in reversed(old + newest) if _is_best(path)), None)
        for path in old:
            if path != best:
                gone = path.with_name(f".{path.name}.part")
                os.replace(path, gone)
                shutil.rmtree(gone, ignore_errors=True)


def check_shared(folder: Path, world: World) -> None:
    """That all hosts see the same `folder`, into which every rank writes its share of a checkpoint. All ranks call it.

    Raises:
        UserError: on all ranks; a host has another folder of that name.
    """
    if world.local_size == world.size:
        return

    def leave_a_sign() -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".seen-", dir=folder))
        except OSError as error:
            raise UserError(f"{folder} cannot be used", [f"{error.strerror}. Name another."]) from None

    def look() -> None:
        end = time.monotonic() + SIGN_S
        while not sign.is_dir():
            if time.monotonic() > end:
                rule = f"{socket.gethostname()} does not see there what rank 0 writes"
                remedy = "Put --project on storage that all hosts share"
                raise UserError(f"{folder} is not one folder for all hosts", [f"{rule}. {remedy}."])
            if folder.is_dir():
                os.listdir(folder)  # has a network file system ask its server
            time.sleep(0.1)

    sign = decided_by_first(world, leave_a_sign)
    try:
        together(look)
    finally:
        if world.is_first:
            shutil.rmtree(sign, ignore_errors=True)


class _Reader:
    """Tensors of a checkpoint by name, from files that stay open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._where = manifest.tensors
        try:
            self._files = {name: safe_open(path / name, framework="pt") for name in manifest.files}
            names = {name: set(file.keys()) for name, file in self._files.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be resumed from", [f"a file is damaged ({error})."]) from None
        if lost := [name for name, file in self._where.items() if name not in names[file]]:
            rule = f"{lost[0]}: progress.json says it is in {self._where[lost[0]]}, and it is not"
            raise UserError(f"{path} cannot be resumed from", [f"{rule}. Take another copy."])

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no such tensor."""
        if name not in self._where:
            return None
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[self._where[name]].get_tensor(name)

    def fault(self, name: str) -> str | None:
        """Why a tensor's values cannot be used. Reads them."""
        kind = self._files[self._where[name]].get_slice(name).get_dtype()
        if kind != "F32":
            return f"it is of type {kind}, and a checkpoint's tensors are F32"
        return None if is_finite(self.tensor(name)) else "NaN or infinity in it"


def read_buffers(path: Path) -> torch.Tensor:
    """The network's float buffers, flat, in the order of `named_buffers`. Checksums are left to `Checkpoints.load`.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    reader = _Reader(path, read_manifest(path, verify=False))
    fault = "missing" if reader.shape("buffers/network") is None else reader.fault("buffers/network")
    if fault:
        raise UserError(f"{path} cannot be resumed from", [f"buffers/network: {fault}."])
    return reader.tensor("buffers/network")


def all_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in `folder`, oldest first."""
    found = [
        (int(m[1]), int(m[2] or 0), path)
        for path in folder.glob("step_*")
        if (m := _STEP_FOLDER.match(path.name))
    ]
    return [path for *_, path in sorted(found)]


def saved_progress(folder: Path) -> Progress | None:
    """That of the newest checkpoint in `folder` whose progress can be read; nothing else of it is looked at."""
    for path in reversed(all_checkpoints(folder)):
        try:
            return read_manifest(path, verify=False).progress
        except UserError:
            continue  # told when the checkpoint is chosen
    return None


def newest_whole(folder: Path, *, set_aside: bool) -> Path:
    """The newest checkpoint in `folder`, with its checksums compared.

    Args:
        set_aside: a damaged one is renamed, for a human to look at, and the one before it is taken, if there is one.

    Raises:
        UserError: it is damaged; with `set_aside` all of them are.
    """
    paths = all_checkpoints(folder)
    for path in reversed(paths):
        try:
            read_manifest(path)
            return path
        except UserError as error:
            if not set_aside or path == paths[0]:
                raise
            aside = path.with_name(f"damaged_{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            print(f"{error}\nIt is {aside} now; the one before it is taken.")
    raise UserError(f"{folder} cannot be resumed from", ["it has no checkpoint. Start without --resume."])


def read_manifest(path: Path, *, verify: bool = True) -> Manifest:
    """Reads progress.json and, to `verify`, every file's checksum.

    Raises:
        UserError: something is missing or damaged.
    """
    headline = f"{path} cannot be resumed from"
    try:
        manifest = Manifest.model_validate_json(read_bytes(path / "progress.json", MOST_MANIFEST_BYTES))
    except (OSError, ValueError) as error:  # pydantic's is a ValueError, too long to print
        what = error.strerror if isinstance(error, OSError) else "it is damaged"
        remedy = "Remove this folder to use the one before it."
        raise UserError(headline, [f"progress.json cannot be read ({what}). {remedy}"]) from None
    if manifest.format != FORMAT:
        raise UserError(headline, [f"it is of format {manifest.format}, this dsyolo reads {FORMAT}."])
    progress, scale = manifest.progress, manifest.loss_scale
    counts = ((progress.step, progress.total_steps), (progress.epoch, progress.epochs))
    numbers = [*manifest.optimizer_scalars.values(), *scale.values()]
    sound = all(0 <= now <= last for now, last in counts) and all(map(math.isfinite, numbers))
    if not sound or (scale and not {"scale", "good_steps"} <= scale.keys()):
        raise UserError(headline, ["progress.json has numbers that no run has. Take another copy."])
    for name in {*manifest.files, *manifest.tensors.values()}:
        if not _FILE.fullmatch(name) or name not in manifest.files or (path / name).is_symlink():
            rule = "progress.json may name only safetensors files in its own folder, and no links"
            raise UserError(
                headline, [f"{shortened(name)}: {rule}. Take no checkpoint from whoever made this one."]
            )
    if not verify:
        return manifest
    damaged = [
        f"{name}: its checksum is not the one that was saved. Remove this folder to use the checkpoint before it."
        for name, checksum in manifest.files.items()
        if not (path / name).is_file() or _sha256(path / name) != checksum
    ]
    if damaged:
        raise UserError(headline, damaged)
    return manifest


def _is_best(path: Path) -> bool:
    try:
        return read_manifest(path, verify=False).is_best
    except UserError:
        return False


def _to_disk(path: Path) -> None:
    """Waits until what was written to a file or folder would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
