"""Reads tensors of a checkpoint from its files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.manifest import Manifest, headline_of, read_manifest
from dsyolo.models.weights import is_finite


class Reader:
    """Reads tensors of a checkpoint by name, from files that stay open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._where = manifest.tensors
        try:
            self._files = {name: safe_open(path / name, framework="pt") for name in manifest.files}
            names = {name: set(file.keys()) for name, file in self._files.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(headline_of(path), [f"a file is damaged ({error})."]) from None
        if lost := [name for name, file in self._where.items() if name not in names[file]]:
            rule = f"{lost[0]}: progress.json says it is in {self._where[lost[0]]}, and it is not"
            raise UserError(headline_of(path), [f"{rule}. Take another copy."])

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
