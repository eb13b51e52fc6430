"""Checks before anything is built that the system gives this process what the run needs."""

import logging

from dsyolo.base.limits import (
    LEAST_BESIDE_IMPORTS,
    check_address_space,
    check_shared_memory,
    raise_open_files,
    shared_memory_fault,
)
from dsyolo.cluster.world import World
from dsyolo.config.resolve import RunSpec, largest_image_px
from dsyolo.data.prefetch import waiting_batches, waiting_images
from dsyolo.engine import device

log = logging.getLogger(__name__)

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
    batches = waiting_batches(workers, spec.ds.accumulation)
    raise_open_files(
        FILES + FILES_OF_WORKER * workers + FILES_OF_BATCH * batches + FILES_OF_RANK * min(world.size, 64)
    )
    train, val = waiting_images(
        workers, spec.ds.micro_batch, spec.ds.accumulation, spec.config.val_batch_size
    )
    train_bytes = world.local_size * train * 3 * largest_image_px(spec.config, len(spec.data.names)) ** 2
    val_bytes = world.local_size * val * 3 * spec.config.imgsz**2
    check_shared_memory(train_bytes)
    # A small split has fewer images than this, so it is no error.
    if world.is_main_process and (fault := shared_memory_fault(train_bytes + val_bytes)):
        log.warning("In validations: %s", fault)
