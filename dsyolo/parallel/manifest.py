"""What lies in a folder of checkpoints, and what each says of itself: its manifest, `progress.json`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dsyolo.errors import UserError
from dsyolo.parallel.progress import Progress
from dsyolo.untrusted import read_bytes, shortened

FORMAT = 1
_STEP_FOLDER = re.compile(r"step_(\d+)(?:\.(\d+))?$")
MOST_MANIFEST_BYTES = 16 << 20  # the largest network's, saved by a thousand ranks, has half a MiB
_FILE = re.compile(r"[\w-]+\.safetensors", re.ASCII)


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


def read_manifest(path: Path, *, verify: bool = True) -> Manifest:
    """Reads progress.json and, to `verify`, every file's checksum.

    Raises:
        UserError: something is missing or damaged.
    """
    headline = headline_of(path)
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
    if verify and (damaged := damaged_files(path, manifest, manifest.files)):
        raise UserError(headline, damaged)
    return manifest


def damaged_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """A line for each file of `names` that is not as it was saved. Reads all of them."""
    rule = "its checksum is not the one that was saved. Remove this folder to use the checkpoint before it."
    return [f"{name}: {rule}" for name in names if not _is_as_saved(path / name, manifest.files[name])]


def _is_as_saved(file: Path, checksum: str) -> bool:
    try:
        return file.is_file() and sha256_of(file) == checksum
    except OSError:  # of a disk that fails
        return False


def headline_of(path: Path) -> str:
    """Of all errors about a checkpoint."""
    return f"{path} cannot be resumed from"


def sha256_of(path: Path) -> str:
    """The checksum of a file's content."""
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
