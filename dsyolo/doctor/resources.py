"""Judges what the machines have: cores and GPUs for the ranks, room on disks and in shared memory, and the time."""

from __future__ import annotations

from collections.abc import Iterator

from dsyolo.config.deepspeed.optimizers import OPTIMIZERS
from dsyolo.doctor.answers import Devices, Disk, Hello
from dsyolo.doctor.context import DoctorContext, common
from dsyolo.doctor.findings import FAIL, OK, WARNING, Finding

KEPT = 3  # checkpoints at once: the last two, and the one that is being written
LITTLE_DISK, LITTLE_SHM = (
    8 << 30,
    1 << 30,
)  # bytes: the largest model with Adam; a container's default is 64 MiB
CACHE = 64 << 20  # bytes: of a scan, some hundred for an image
SKEW_S = 1.0
MOST_SHARING = 8  # ranks of a core: each takes some 400 MiB before it has a model
VAL_BATCH, PREFETCHED = 16, 2  # of the validation's loader


def slots(case: DoctorContext) -> Iterator[Finding]:
    """A rank for each GPU, or ranks that share the cores."""
    found = dict(case.each(Devices))
    if not found:
        return
    most, there = common({host: one.accelerator for host, one in found.items()})
    for host in case.hosts:
        one = found.get(host.name)
        if one is None:
            continue
        ranks = f"{host.slots} rank{'s' if host.slots > 1 else ''}"
        has = f"{len(one.gpus)} GPUs" if one.accelerator == "cuda" else f"{one.cores} cores"
        enough = len(one.gpus) if one.accelerator == "cuda" else one.cores
        text = f"{ranks} on {has}"
        if one.accelerator != most:
            remedy = "See nvidia-smi there, CUDA_VISIBLE_DEVICES, DS_ACCELERATOR and torch's build."
            text = f"ranks on {one.accelerator}, but on {most} on {there}"
            yield Finding("slots", host.name, FAIL, text, remedy)
        elif host.slots > enough and one.accelerator == "cuda":
            yield Finding("slots", host.name, FAIL, text, f"Set slots to {enough}.")
        elif host.slots > MOST_SHARING * enough:
            text += ", more than can work there"
            yield Finding("slots", host.name, FAIL, text, f"Set slots to {enough}.")
        elif host.slots > enough:
            remedy = f"They will share cores: set slots to {enough}."
            yield Finding("slots", host.name, WARNING, text, remedy)
        else:
            yield Finding("slots", host.name, OK, text)


def disk(case: DoctorContext) -> Iterator[Finding]:
    """Room for the checkpoints of a run and for the cache of the labels."""
    need, what = runs_bytes(case)
    for host, section in case.each(Disk):
        for name, least in (("runs", need), ("cache", CACHE)):
            room = section.folders.get(name)
            if room is None:
                continue
            text = f"{name} in {room.path}: {_size(room.free)} free"
            if room.fault:
                remedy = "Name another folder by --project." if name == "runs" else "Set XDG_CACHE_HOME."
                verdict = FAIL if name == "runs" else WARNING
                fault = f"{name} in {room.path}: cannot be written to: {room.fault}"
                yield Finding("disk", host, verdict, fault, remedy)
            elif name == "runs" and least is not None and room.free < least:
                text = f"{text}, but {_size(least)} needed {what}"
                yield Finding("disk", host, FAIL, text, "Make room, or name another folder by --project.")
            elif room.free < (least or LITTLE_DISK):
                remedy = "Give --model to compare it with what its checkpoints need, or make room."
                remedy = remedy if name == "runs" else "Make room, or set XDG_CACHE_HOME."
                yield Finding("disk", host, WARNING, text, remedy)
            else:
                yield Finding("disk", host, OK, text + (f", {_size(least)} needed" if least else ""))


def runs_bytes(case: DoctorContext) -> tuple[int | None, str]:
    """Bytes that the folder of a run comes to, and of what; None without --model."""
    if case.num_parameters is None:
        return None, ""
    states = case.ds.optimizer.states_per_param if case.ds else max(one.states for one in OPTIMIZERS.values())
    tensor = 4 * case.num_parameters  # fp32, as all files have it
    checkpoint = tensor * (2 + states)  # weights and their average
    return KEPT * checkpoint + 2 * tensor, f"for {KEPT} checkpoints of {_size(checkpoint)} and two of weights"


def shared_memory(case: DoctorContext) -> Iterator[Finding]:
    """Room for the batches that loader processes have made and ranks have not taken yet."""
    devices = dict(case.each(Devices))
    for host, section in case.each(Disk):
        room = section.folders.get("shm")
        if room is None or host not in devices:
            continue
        train, val = _batches_bytes(case, case.slots(host), devices[host])
        text = f"{room.path}: {_size(room.free)} free"
        remedy = (
            "Make it larger (docker run --shm-size, an emptyDir of medium Memory), or give fewer --workers."
        )
        if room.fault:
            yield Finding("shm", host, FAIL, f"{room.path} cannot be written to: {room.fault}", remedy)
        elif train is None:
            little = room.free < LITTLE_SHM
            hint = "Give --deepspeed_config to compare it with what a run needs." if little else ""
            yield Finding("shm", host, WARNING if little else OK, text, hint)
        else:
            text += f", up to {_size(train + val)} needed for batches"
            verdict = FAIL if room.free < train else WARNING if room.free < train + val else OK
            yield Finding("shm", host, verdict, text, "" if verdict == OK else remedy)


def _batches_bytes(case: DoctorContext, ranks: int, devices: Devices) -> tuple[int | None, int]:
    """Bytes of training's and of validation's batches that can wait at once on a host. See data/loader.py."""
    if case.ds is None:
        return None, 0
    workers = case.options.workers
    if workers is None:
        workers = min(8, max(1, devices.cores // ranks)) if devices.accelerator == "cuda" else 1
    ahead = 1 + -(-case.ds.accumulation // max(workers, 1))
    image = 3 * case.options.image_size_px**2
    waiting = ranks * workers * image
    return waiting * ahead * case.ds.micro_batch, waiting * PREFETCHED * VAL_BATCH


def clock(case: DoctorContext) -> Iterator[Finding]:
    """Against this machine's. The time that the question took is no difference, so small ones do not show."""
    if len(case.hosts) < 2:
        return
    for host, _ in case.each(Hello):
        skew_s = case.replies[host].skew_s
        if abs(skew_s) > SKEW_S:
            text = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
            remedy = (
                "Start chrony or ntpd there: logs do not fit together, and files seem to be of the future."
            )
            yield Finding("clock", host, WARNING, text, remedy)
        else:
            yield Finding("clock", host, OK, f"within {SKEW_S:g} s of this machine's")


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"
