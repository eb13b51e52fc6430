"""Offload to a folder: optimizer states, EMA and parameters in a file that is mapped to memory.

DeepSpeed's own swapper to NVMe is a compiled op. Here DeepSpeed offloads to host memory that is mapped from a file: the
kernel keeps what fits in its page cache, and writes and drops the rest.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from dsyolo.base.errors import UserError
from dsyolo.cluster.collectives import all_gather_objects
from dsyolo.cluster.world import World
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.partitions import Partitions

ALIGNMENT = 64  # bytes; that of torch's own allocator

# The state that torch's optimizers create in their first step. Starting from these zeros is bit-equal to that.
FIRST_STATE: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "SGD": (("momentum_buffer",), {}),
    "Adam": (("exp_avg", "exp_avg_sq"), {"step": 0.0}),
    "AdamW": (("exp_avg", "exp_avg_sq"), {"step": 0.0}),
}


def move_to_folders(
    folders: tuple[str | None, str | None],
    engine: Any,
    partitions: Partitions,
    ema_tensors: Sequence[torch.Tensor],
    world: World,
) -> None:
    """Move what DeepSpeed offloaded to host memory into files. Values, names and tensor identities stay.

    Every rank has one file per folder, which is unlinked once it is mapped, so nothing is left behind. It is allocated
    as a whole, so that a full disk shows now and not in the middle of a step.

    Args:
        folders: for the optimizer's states and for the parameters; None: they are not offloaded to a folder.
        engine: what `deepspeed.initialize` returned, with offload to the CPU.
        ema_tensors: the average of the masters.

    Raises:
        UserError: on every rank; a folder cannot be written, or has not enough room.
    """
    optimizer = engine.optimizer
    states_folder, parameters_folder = folders
    problems: list[str] = []
    masters = [tensor for partition in partitions.flat for tensor in (partition.key, partition.master)]
    if states_folder:
        names, scalars = FIRST_STATE[type(partitions.optimizer).__name__]
        states = partitions.make_state(names, scalars)
        tensors = [*masters, *ema_tensors, *(tensor for name in names for tensor in states[name])]
        _move(tensors, states_folder, world, problems)
        if partitions.stage in (1, 2):
            internals.relink_masters(optimizer)
    if parameters_folder:
        flats = internals.flat_shards(optimizer)
        # Fp32 weights on the same device share their memory with the masters.
        shared = {flat.data_ptr() for flat in flats}
        _move([*flats, *(m for m in masters if m.data_ptr() in shared)], parameters_folder, world, problems)
        internals.relink_shards(optimizer)
    if found := list(chain(*all_gather_objects(problems))):
        raise UserError("Offload to a folder cannot start", found)


def _move(tensors: Sequence[torch.Tensor], folder: str, world: World, problems: list[str]) -> None:
    """Move each tensor into one file; tensors that share memory share it there too."""
    places: dict[int, int] = {}
    size = 0
    for tensor in tensors:
        if tensor.data_ptr() not in places:
            places[tensor.data_ptr()] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    try:
        descriptor, path = tempfile.mkstemp(prefix=f"dsyolo-rank{world.rank}-", suffix=".offload", dir=folder)
        try:
            # A sparse file, as truncate makes it, would raise SIGBUS in the middle of a step on a full disk.
            os.posix_fallocate(descriptor, 0, max(size, 1))
            mapped = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        finally:
            os.close(descriptor)
            os.unlink(path)
    except OSError as error:
        free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
        need = f"rank {world.rank} needs {size / 2**20:.1f} MiB there, and {free / 2**20:.1f} MiB are free"
        problems.append(f"{folder}: {error.strerror} ({need}). Make room, or name another nvme_path.")
        return
    for tensor in tensors:
        start = places[tensor.data_ptr()]
        place = mapped[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.detach())
        tensor.data = place
