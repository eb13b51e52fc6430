"""Starts and ends the process group that DeepSpeed uses."""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist

from dsyolo.base.environment import export_to_torch, read_environment
from dsyolo.cluster.rendezvous import Rendezvous
from dsyolo.cluster.world import World, world_from_environment
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.device import pins_memory
from dsyolo.engine.gloo import send_only_shares


@contextlib.contextmanager
def started(rendezvous_timeout_s: float = 300) -> Iterator[World]:
    """Start the process group that DeepSpeed uses: of the launcher's ranks, or of one rank without a launcher.

    Inside, the rendezvous still watches the ranks, until the watchdog takes over. torchrun's agents have a rendezvous of
    their own.

    Args:
        rendezvous_timeout_s: how long ranks wait for each other.
    """
    place = read_environment()
    world = world_from_environment()
    is_alone = world.size == 1 and not place.under_torchrun
    if is_alone:  # a port of its own: a launcher's default may be another run's
        place = place._replace(master_addr="127.0.0.1", master_port=_free_port())
    export_to_torch(place, instead=is_alone)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    quiet_deepspeed()
    get_accelerator().set_device(world.local_rank)
    if not pins_memory():
        # On a CPU determinism costs nothing: without it the gradient of indexing is summed in any order.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    backend = get_accelerator().communication_backend_name()
    rendezvous = None
    if world.size > 1 and not place.under_torchrun:
        rendezvous = Rendezvous(
            world.rank,
            world.size,
            str(place.master_addr),
            place.master_port or 0,
            wait_s=rendezvous_timeout_s,
        )
        rendezvous.wait()
    deepspeed.init_distributed(backend, verbose=False)
    send_only_shares()
    yield world
    if rendezvous:
        rendezvous.close()


def init_process_group(rendezvous_timeout_s: float = 300) -> World:
    """Start the process group as `started`, for ranks that nothing watches afterwards."""
    with started(rendezvous_timeout_s) as world:
        return world


def quiet_deepspeed() -> None:
    """Keep DeepSpeed from compiling an op at the first start, and from warning at every step."""
    internals.disable_shared_memory_op()
    # DeepSpeed itself calls deprecated functions at every step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*deprecated", category=FutureWarning)


def destroy_process_group(world: World, *, orderly: bool = True) -> None:
    """Leave the process group, after all ranks have stopped talking to each other.

    Args:
        orderly: all ranks leave together; False: this rank leaves after an error, and waits for no other.

    With the JSON's `comms_logger` on, rank 0 prints its summary: DeepSpeed leaves that to the program.
    """
    from deepspeed import comm

    if orderly and internals.comms_logger_is_on():
        comm.log_summary()
    if world.size > 1 and orderly:
        torch_dist.barrier()
    torch_dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
