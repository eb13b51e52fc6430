"""Reads checkpoints: the list of them in a folder, the manifest `progress.json` of one, and its tensors."""

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError

from dsyolo.base.errors import UserError
from dsyolo.base.safe_io import names_in, read_bytes, shortened
from dsyolo.base.tensor_file import open_tensors
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.models.weights import is_finite

FORMAT = 1
REMEDY = "Remove this folder to use the checkpoint before it."
MOST_COUNT = 2**53  # images or steps; a float still represents each such number
_STEP_FOLDER = re.compile(r"step_(\d+)(?:\.(\d+))?$")
MOST_MANIFEST_BYTES = 16 << 20  # half a MiB is the largest network's, saved by a thousand ranks
_HEAD = re.compile(rb'\{\n "sha256": "([0-9a-f]{64})",')
_FILE = re.compile(r"[\w-]+\.safetensors", re.ASCII)


class Manifest(BaseModel):
    """The content of progress.json."""

    model_config = ConfigDict(extra="forbid")

    format: int
    progress: TrainState
    optimizer_scalars: dict[str, float]
    ema_updates: int
    loss_scale: dict[str, float] = {}  # under fp16; see LossScale.state
    is_best: bool = False  # the best of the epochs validated so far
    files: dict[str, str]  # file name -> sha256
    tensors: dict[str, str]  # tensor name -> file name
    sha256: str | None = None  # of the rest of the file; older runs wrote none

    def to_bytes(self) -> bytes:
        """Return the content of progress.json, which begins with the checksum of all that follows it."""
        body = self.model_dump_json(indent=1, exclude={"sha256"}).encode()
        return b'{\n "sha256": "%s",' % hashlib.sha256(body).hexdigest().encode() + body[1:]

    @property
    def optimizer_states(self) -> set[str]:
        return {name.split("/")[1] for name in self.tensors if name.startswith("optimizer/")}


def all_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    matches = [(_STEP_FOLDER.match(name), folder / name) for name in names_in(folder)]
    return [path for *_, path in sorted((int(m[1]), int(m[2] or 0), path) for m, path in matches if m)]


def saved_progress(folder: Path) -> TrainState | None:
    """Return the progress of the newest checkpoint in `folder` whose manifest can be read. Read nothing else."""
    manifests = map(readable_manifest, reversed(all_checkpoints(folder)))
    return next((manifest.progress for manifest in manifests if manifest), None)


def readable_manifest(path: Path) -> Manifest | None:
    """Return a checkpoint's manifest; None if it cannot be read, which is reported when the checkpoint is chosen."""
    try:
        return read_manifest(path, verify=False)
    except UserError:
        return None


def read_manifest(path: Path, *, verify: bool = True) -> Manifest:
    """Read progress.json, and with `verify` compare every file's checksum. Raise UserError if anything is damaged."""
    headline = headline_of(path)
    try:
        data = read_bytes(path / "progress.json", MOST_MANIFEST_BYTES)
        manifest = Manifest.model_validate_json(data)
        if manifest.sha256 is not None:
            _compare_checksum(data)
    except (OSError, ValueError) as error:  # pydantic's message is too long to print
        what = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise UserError(headline, [f"progress.json cannot be read ({what}). {REMEDY}"]) from None
    if manifest.format != FORMAT:
        raise UserError(
            headline,
            [
                f"it has format {manifest.format:.6g}, but this dsyolo reads {FORMAT}. Use the dsyolo version that wrote it."
            ],
        )
    if not _is_possible(manifest):
        raise UserError(
            headline, ["progress.json has numbers that no run has. Copy the file again, or use another."]
        )
    for name in {*manifest.files, *manifest.tensors.values()}:
        if not _FILE.fullmatch(name) or name not in manifest.files or (path / name).is_symlink():
            rule = f"{shortened(name)}: progress.json may name only safetensors files in its own folder, and no links"
            raise UserError(headline, [f"{rule}. Do not use checkpoints from this source."])
    if verify and (damaged := damaged_files(path, manifest, manifest.files)):
        raise UserError(headline, damaged)
    return manifest


def _compare_checksum(data: bytes) -> None:
    """Compare the checksum at the start of progress.json with the bytes after it. Raise ValueError if they differ."""
    head = _HEAD.match(data)
    if not head or hashlib.sha256(b"{" + data[head.end() :]).hexdigest().encode() != head[1]:
        raise ValueError("its checksum is not the one that was saved")


def _is_possible(manifest: Manifest) -> bool:
    """Return whether a run can have reached these numbers."""
    try:
        return _is_within_bounds(manifest)
    except OverflowError:  # a whole number beyond any float
        return False


def _is_within_bounds(manifest: Manifest) -> bool:
    now, scale, tracking = manifest.progress, manifest.loss_scale, manifest.progress.tracking
    totals = (now.total_steps, now.epochs, now.num_images, now.global_batch)
    if not all(0 < total < MOST_COUNT for total in totals):
        return False
    first, last = (now.epoch_start_step(epoch) for epoch in (now.epoch, now.epoch + 1))
    losses, num_summed = tracking.get("loss_sum", [0.0] * 3), tracking.get("num_summed", 0)
    counts = [
        (first, now.step, min(last, now.total_steps)),
        (0, now.epoch, now.epochs),
        (0, now.images_seen, now.step * now.global_batch),
        (-1, now.best_fitness, 1),
        (-1, now.best_epoch, now.epoch),
        (0, now.skipped_in_a_row, now.step),
        (0, manifest.ema_updates, now.total_steps),
        *((0, value, now.total_steps) for value in manifest.optimizer_scalars.values()),
        *((0, value, math.inf) for value in scale.values()),
        (0, num_summed if isinstance(num_summed, int) else -1, now.step),
        (3, len(losses) if isinstance(losses, list) else 0, 3),
    ]
    numbers = [*scale.values(), *losses] if isinstance(losses, list) else [math.nan]
    return (
        all(least <= value <= most for least, value, most in counts)  # false for NaN
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
        and (not scale or (scale.keys() >= {"scale", "good_steps"} and scale["scale"] > 0))
    )


def damaged_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return a line for each file of `names` whose checksum differs. Reads all of them."""

    def is_as_saved(name: str) -> bool:
        try:
            return (path / name).is_file() and sha256_of(path / name) == manifest.files[name]
        except OSError:  # a failing disk
            return False

    rule = "its checksum is not the one that was saved"
    return [f"{name}: {rule}. {REMEDY}" for name in names if not is_as_saved(name)]


def headline_of(path: Path) -> str:
    """Return the headline of all errors about a checkpoint."""
    return f"{path} cannot be resumed from"


def sha256_of(path: Path) -> str:
    """Return the checksum of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class Reader:
    """Reads tensors of a checkpoint by name, from files that stay open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._where = manifest.tensors
        try:
            self._files = {name: open_tensors(path / name) for name in manifest.files}
            names = {name: set(file.keys()) for name, file in self._files.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(headline_of(path), [f"a file is damaged ({error})."]) from None
        if lost := [name for name, file in self._where.items() if name not in names[file]]:
            rule = f"{lost[0]}: progress.json says it is in {self._where[lost[0]]}, and it is not"
            raise UserError(headline_of(path), [f"{rule}. Copy the file again, or use another."])

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape; None if there is no such tensor."""
        if name not in self._where:
            return None
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[self._where[name]].get_tensor(name)

    def fault(self, name: str) -> str | None:
        """Return why a tensor's values cannot be used; None if they can. Reads them."""
        kind = self._files[self._where[name]].get_slice(name).get_dtype()
        if kind != "F32":
            return f"it is of type {kind}, and a checkpoint's tensors are F32"
        return None if is_finite(self.tensor(name)) else "NaN or infinity in it"


def read_buffers(path: Path) -> torch.Tensor:
    """Return the network's float buffers, flat, in the order of `named_buffers`, or raise UserError. Compare no checksum."""
    reader = Reader(path, read_manifest(path, verify=False))
    fault = "missing" if reader.shape("buffers/network") is None else reader.fault("buffers/network")
    if fault:
        raise UserError(headline_of(path), [f"buffers/network: {fault}."])
    return reader.tensor("buffers/network")
