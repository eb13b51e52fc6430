"""Starts and ends the process group that DeepSpeed uses, and replaces its reductions over gloo."""

import contextlib
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as torch_dist

from dsyolo.base.environment import export_to_torch, read_environment
from dsyolo.cluster.agreed_port import agreed_port
from dsyolo.cluster.rendezvous import Rendezvous
from dsyolo.cluster.world import World, world_from_environment
from dsyolo.engine import deepspeed_internals as internals
from dsyolo.engine.device import accelerator, pins_memory


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
        rendezvous = Rendezvous(
            world.rank, world.size, address, port, wait_s=rendezvous_timeout_s, agreed=agreed_port(place)
        )
        rendezvous.wait()
        export_to_torch(place._replace(master_port=rendezvous.port), instead=True)
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
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "DS_ACCELERATOR": "cpu"}  # nobody connects
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

    With the JSON's `comms_logger` on, rank 0 logs its summary: DeepSpeed leaves that to the program. If not `orderly`,
    this rank leaves after an error, and waits for no other.
    """
    from deepspeed import comm

    if orderly and internals.comms_logger_is_on():
        comm.log_summary()
    if orderly:
        torch_dist.barrier()
    torch_dist.destroy_process_group()


def send_only_shares() -> None:
    """Replace DeepSpeed's reductions on gloo by ones that send only what the other rank needs, in the order of ranks.

    Gloo's own reduce-scatter sends as much as an all-reduce. Bytes sent per rank, relative to the tensor, measured on 2
    and 4 ranks: 1.00 and 1.50 for it, 0.50 and 0.75 here. ZeRO 1 to 3 reduce all gradients so. NCCL needs none of this.
    """
    if torch_dist.get_backend() == "gloo":
        internals.replace_reductions(_reduce_scatter, _reduce)


def _reduce_scatter(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    op: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> None:
    """Write the sum of all ranks' i-th parts of `input_tensor` (N * elements,) into `output_tensor` of rank i."""
    _assert_plain(op, async_op)
    parts = torch.empty_like(input_tensor)
    torch_dist.all_to_all_single(parts, input_tensor, group=group)
    torch.sum(parts.view(-1, output_tensor.numel()), 0, out=output_tensor.view(-1))


def _reduce(
    tensor: torch.Tensor, dst: int, op: Any = None, group: Any = None, async_op: bool = False
) -> None:
    """Sum all ranks' `tensor` in place on the rank `dst` of the world."""
    _assert_plain(op, async_op)
    if torch_dist.get_rank() != dst:
        torch_dist.send(tensor, dst, group=group)
        return
    own, part = tensor.clone(), torch.empty_like(tensor)
    tensor.zero_()
    for rank in torch_dist.get_process_group_ranks(group or torch_dist.group.WORLD):
        if rank != dst:
            torch_dist.recv(part, rank, group=group)
        tensor += own if rank == dst else part


def _assert_plain(op: Any, async_op: bool) -> None:
    from deepspeed.comm import ReduceOp

    assert op in (None, ReduceOp.SUM), op
    assert not async_op
