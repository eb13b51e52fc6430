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
    """Starts the process group that DeepSpeed uses, alone or as the launcher said.

    Inside, the ranks' meeting still watches them: so nobody is unwatched until what watches a run has begun. Ranks wait `rendezvous_timeout_s` for each other; torchrun's agents see to that themselves.
    """
    place = read_environment()
    world = world_from_environment()
    is_alone = world.size == 1 and not place.under_torchrun
    if is_alone:  # nobody has to find it: the launcher's port may be another run's
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
    meeting = None
    if world.size > 1 and not place.under_torchrun:
        meeting = Rendezvous(
            world.rank,
            world.size,
            str(place.master_addr),
            place.master_port or 0,
            wait_s=rendezvous_timeout_s,
        )
        meeting.wait()
    deepspeed.init_distributed(backend, verbose=False)
    send_only_shares()
    yield world
    if meeting:
        meeting.close()


def init_process_group(rendezvous_timeout_s: float = 300) -> World:
    """As `joined`, where nobody has to watch the ranks afterwards."""
    with started(rendezvous_timeout_s) as world:
        return world


def quiet_deepspeed() -> None:
    """Leaves out what DeepSpeed would do at every start, or say at every step.

    Its shared-memory collectives are a C++ op that would be compiled at the first start; gloo needs no compiler, and a
    build that is killed leaves a lock that every later start waits for.
    """

    internals.disable_shared_memory_op()
    # It calls some at every step, and only it can change that.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*deprecated", category=FutureWarning)


def destroy_process_group(world: World, *, orderly: bool = True) -> None:
    """Leaves the process group, so that no rank is torn down while another still talks to it.

    Args:
        orderly: all ranks leave; False: this rank leaves after an error, and waits for none.

    Where the JSON's `comms_logger` is on, the first rank prints what it saw: DeepSpeed leaves that to the program.
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
