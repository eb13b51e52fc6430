"""How far loader workers run ahead, and the images that wait in shared memory because of it."""

VAL_AHEAD = 2  # batches that each worker of a validation makes ahead: torch's default


def train_ahead(num_workers: int, accumulation: int) -> int:
    """Return the micro-batches that each worker of a training makes ahead: a step takes all of its own at once."""
    return 1 + -(-accumulation // max(num_workers, 1))


def waiting_batches(num_workers: int, accumulation: int) -> int:
    """Return the micro-batches of one rank that can wait at once: what workers make ahead, and a step's own."""
    return num_workers * train_ahead(num_workers, accumulation) + accumulation if num_workers else 0


def waiting_images(num_workers: int, micro_batch: int, accumulation: int, val_batch: int) -> tuple[int, int]:
    """Return the images of one rank that can wait at once: those of its training, and those of a validation beside it."""
    train = waiting_batches(num_workers, accumulation) * micro_batch
    return train, num_workers * VAL_AHEAD * val_batch
