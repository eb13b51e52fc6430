"""Starts and ends the process group that DeepSpeed uses."""

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
from dsyolo.engine.device import accelerator, pins_memory
from dsyolo.engine.gloo import send_only_shares


@contextlib.contextmanager
def started(rendezvous_timeout_s: float = 300) -> Iterator[World]:
    """Start the process group that DeepSpeed uses: of the launcher's ranks, or of one rank without a launcher.

    Inside, the rendezvous watches the ranks, until the watchdog takes over; under torchrun its agents do.
    """
    place = read_environment()
    world = world_from_environment()
    is_alone = world.size == 1 and not place.under_torchrun
    if is_alone:  # a port of its own: a launcher's default may be another run's
        with socket.create_server(("127.0.0.1", 0)) as probe:
            place = place._replace(master_addr="127.0.0.1", master_port=probe.getsockname()[1])
    export_to_torch(place, instead=is_alone)
    import deepspeed

    _quiet_deepspeed()
    accelerator().set_device(world.local_rank)
    if not pins_memory():
        # On a CPU determinism costs nothing: without it the gradient of indexing is summed in any order.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # not in stubs
    rendezvous = None
    if world.size > 1 and not place.under_torchrun:
        address, port = str(place.master_addr), place.master_port or 0
        rendezvous = Rendezvous(world.rank, world.size, address, port, wait_s=rendezvous_timeout_s)
        rendezvous.wait()
    deepspeed.init_distributed(accelerator().communication_backend_name(), verbose=False)
    send_only_shares()
    yield world
    if rendezvous:
        rendezvous.close()


def init_process_group(rendezvous_timeout_s: float = 300) -> World:
    """Start the process group as `started`, for ranks that nothing watches afterwards."""
    with started(rendezvous_timeout_s) as world:
        return world


def join_store(backend: str, store: torch_dist.Store, rank: int = 0, size: int = 1) -> World:
    """Start a process group over `store`, on the CPU of a process that no launcher started. It is one rank a machine."""
    variables: dict[str, object] = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "DS_ACCELERATOR": "cpu"}  # nobody connects
    export_to_torch(read_environment({name: str(value) for name, value in variables.items()}), instead=True)
    import deepspeed

    _quiet_deepspeed()
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    deepspeed.init_distributed("gloo", verbose=False)
    send_only_shares()
    return World(rank, size, 0, 1)


def _quiet_deepspeed() -> None:
    """Keep DeepSpeed from printing, from compiling an op at the first start, and from warning at every step."""
    internals.route_logger()
    internals.disable_shared_memory_op()
    # DeepSpeed itself calls deprecated functions at every step.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*deprecated", category=FutureWarning)


def destroy_process_group(*, orderly: bool = True) -> None:
    """Leave the process group, after all ranks have stopped talking to each other.

    With the JSON's `comms_logger` on, rank 0 logs its summary: DeepSpeed leaves that to the program.

    Args:
        orderly: all ranks leave together; False: this rank leaves after an error, and waits for no other.
    """
    from deepspeed import comm

    if orderly and internals.comms_logger_is_on():
        comm.log_summary()
    if orderly:
        torch_dist.barrier()
    torch_dist.destroy_process_group()
