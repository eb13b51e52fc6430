"""Checks before anything is built that the system gives this process what the run needs."""

from dsyolo.base.limits import (
    LEAST_BESIDE_IMPORTS,
    check_address_space,
    check_shared_memory,
    raise_open_files,
)
from dsyolo.cluster.world import World
from dsyolo.config.resolve import RunSpec
from dsyolo.engine import device

# Open files, measured on one rank: 29 without workers; with one worker 46, 88 and 256 for 1, 4 and 16 micro-batches in a
# step: a batch that waits has seven tensors, each of them an open file.
FILES, FILES_OF_WORKER, FILES_OF_BATCH, FILES_OF_RANK = 28, 6, 7, 2


def check_process_limits(spec: RunSpec, world: World) -> None:
    """Check address space, open files and shared memory; raise the limit of open files to the largest allowed.

    Raises:
        UserError: one is too small even for the smallest run, or for this run's loader workers.
    """
    check_address_space(LEAST_BESIDE_IMPORTS)
    workers = device.num_workers(world, spec.config.workers)
    # As data/loader.py has them made ahead.
    batches = workers * (1 + -(-spec.ds.accumulation // workers)) + spec.ds.accumulation if workers else 0
    raise_open_files(
        FILES + FILES_OF_WORKER * workers + FILES_OF_BATCH * batches + FILES_OF_RANK * min(world.size, 64)
    )
    images = batches * spec.ds.micro_batch * world.local_size
    check_shared_memory(images * 3 * spec.config.imgsz**2)
