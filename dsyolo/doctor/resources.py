"""Check the machines: cores and GPUs for the ranks, disk space, shared memory, clocks."""

from collections.abc import Iterator
from functools import partial

from dsyolo.config.deepspeed.optimizer_table import OPTIMIZERS
from dsyolo.config.messages import counted
from dsyolo.data.prefetch import waiting_images
from dsyolo.doctor.answers import Devices, Disk, Hello
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

NUM_CHECKPOINTS = 3  # at once: the last two, and the one being written
LOW_DISK = 8 << 30  # bytes: checkpoints of the largest model with Adam
LOW_SHM = 1 << 30  # bytes; the default of a container is 64 MiB
CACHE = 64 << 20  # bytes of the label cache: some hundred an image
MAX_SKEW_S = 1.0
MAX_RANKS_PER_CORE = 8  # each rank takes some 400 MiB before it has a model
VAL_BATCH = 16  # the default of --val_batch_size


def slots(context: DoctorContext) -> Iterator[Finding]:
    """Check that there is a GPU for each rank, or cores to share."""
    found = context.answers(Devices)
    if not found:
        return
    usual, usual_host = common({host: one.accelerator for host, one in found.items()})
    ranks = dict(context.hosts)
    for host, one in found.items():
        finding = partial(Finding, "slots", host)
        has_gpus = one.accelerator == "cuda"
        enough = len(one.gpus) if has_gpus else one.cores
        text = f"{counted(ranks[host], 'rank')} on {enough} {'GPUs' if has_gpus else 'cores'}"
        if one.accelerator != usual:
            remedy = "Check nvidia-smi there, CUDA_VISIBLE_DEVICES, DS_ACCELERATOR and torch's build."
            yield finding(FAIL, f"ranks use {one.accelerator}, but {usual} on {usual_host}", remedy)
        elif ranks[host] <= enough:
            yield finding(OK, text)
        elif has_gpus:
            yield finding(FAIL, text, f"Set slots to {enough}.")
        elif ranks[host] > MAX_RANKS_PER_CORE * enough:
            yield finding(FAIL, f"{text}, more than {MAX_RANKS_PER_CORE} per core", f"Set slots to {enough}.")
        else:
            yield finding(WARNING, text, f"Set slots to {enough}, or ranks share cores.")


def disk(context: DoctorContext) -> Iterator[Finding]:
    """Check the space for a run's checkpoints and for the label cache."""
    run_bytes, purpose = _run_bytes(context)
    for host, section in context.answers(Disk).items():
        finding = partial(Finding, "disk", host)
        for name, least in (("runs", run_bytes), ("cache", CACHE)):
            space = section.folders.get(name)
            if space is None:
                continue
            text = f"{name} in {space.path}: {_size(space.free)} free"
            if space.fault:
                verdict, hint = (FAIL, "--project") if name == "runs" else (WARNING, "XDG_CACHE_HOME")
                text = f"{name} in {space.path}: cannot be written to: {space.fault}"
                yield finding(verdict, text, f"Choose another folder with {hint}, or change its permissions.")
            elif name == "runs" and least is not None and space.free < least:
                remedy = "Free space, or choose another folder with --project."
                yield finding(FAIL, f"{text}, but {_size(least)} needed {purpose}", remedy)
            elif space.free < (least or LOW_DISK):
                remedy = "Give --model to compare it with what checkpoints need, or free space."
                yield finding(
                    WARNING, text, remedy if name == "runs" else "Free space, or set XDG_CACHE_HOME."
                )
            else:
                yield finding(OK, text + (f", {_size(least)} needed" if least else ""))


def _run_bytes(context: DoctorContext) -> tuple[int | None, str]:
    """Return the bytes of a run's folder, and for what; None without --model."""
    if context.num_parameters is None:
        return None, ""
    most = max(one.states for one in OPTIMIZERS.values())
    states = context.ds.optimizer.states_per_param if context.ds else most
    tensor = 4 * context.num_parameters  # fp32, as in all files
    checkpoint = tensor * (2 + states)  # weights and EMA
    text = f"for {NUM_CHECKPOINTS} checkpoints of {_size(checkpoint)} and two files of weights"
    return NUM_CHECKPOINTS * checkpoint + 2 * tensor, text


def shared_memory(context: DoctorContext) -> Iterator[Finding]:
    """Check the space for batches that loader workers have made and ranks have not taken yet."""
    devices, ranks = context.answers(Devices), dict(context.hosts)
    for host, section in context.answers(Disk).items():
        space, finding = section.folders.get("shm"), partial(Finding, "shm", host)
        if space is None or host not in devices:
            continue
        train, val = _batches_bytes(context, ranks[host], devices[host])
        text = f"{space.path}: {_size(space.free)} free"
        remedy = "Make it larger (docker run --shm-size, an emptyDir of medium Memory), or lower --workers."
        if space.fault:
            yield finding(FAIL, f"{space.path} cannot be written to: {space.fault}", remedy)
        elif train is None:
            hint = "Give --deepspeed_config to compare it with what a run needs."
            yield finding(WARNING, text, hint) if space.free < LOW_SHM else finding(OK, text)
        else:
            verdict = FAIL if space.free < train else WARNING if space.free < train + val else OK
            text += f", up to {_size(train + val)} needed for batches"
            yield finding(verdict, text, "" if verdict == OK else remedy)


def _batches_bytes(context: DoctorContext, ranks: int, devices: Devices) -> tuple[int | None, int]:
    """Return bytes of training and of validation batches that can wait at once on a host."""
    if context.ds is None:
        return None, 0
    workers = context.options.workers
    if workers is None:
        workers = min(8, max(1, devices.cores // ranks)) if devices.accelerator == "cuda" else 1
    train, val = waiting_images(workers, context.ds.micro_batch, context.ds.accumulation, VAL_BATCH)
    image_bytes = 3 * context.options.image_size_px**2
    return ranks * train * image_bytes, ranks * val * image_bytes


def clock(context: DoctorContext) -> Iterator[Finding]:
    """Compare the clocks with this machine's. Differences below the delay of the query do not show."""
    for host in context.answers(Hello) if len(context.hosts) > 1 else ():
        skew_s = context.replies[host].skew_s
        if abs(skew_s) > MAX_SKEW_S:
            text = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
            remedy = "Start chrony or ntpd there: logs and file times are inconsistent otherwise."
            yield Finding("clock", host, WARNING, text, remedy)
        else:
            yield Finding("clock", host, OK, f"within {MAX_SKEW_S:g} s of this machine's")


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"
