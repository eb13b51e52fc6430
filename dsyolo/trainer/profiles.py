"""What a run tells of its memory and of its time: the two accounts, built once for the loop."""

from __future__ import annotations

import socket
from typing import Any

import psutil
import torch

from dsyolo.cluster import collectives
from dsyolo.config.resolve import RunSpec
from dsyolo.engine import device
from dsyolo.engine.comm_timer import CommTimer
from dsyolo.engine.memory_profile import MemoryMeasurement, MemoryProfiler, NoMemoryProfiler
from dsyolo.engine.memory_terms import MemoryEstimate
from dsyolo.engine.step_timer import StepTimer, clock_of_device
from dsyolo.models.flops import BACKWARD, node_costs
from dsyolo.models.yolov5 import build_yolov5
from dsyolo.planner.local_hardware import host_bytes
from dsyolo.planner.memory_estimate import RankLoad, predict, shortage, table, verdict
from dsyolo.planner.peak_flops import Peak, peak_of_cpu, peak_of_gpu
from dsyolo.tracking.artifacts import NullArtifacts, RunArtifacts
from dsyolo.tracking.nvml import Gpu, load_nvml
from dsyolo.tracking.resource_usage import ResourceUsage
from dsyolo.tracking.throughput import NoTimeProfile, StepDetails, StepFlops, TimeProfile, measured_every
from dsyolo.tracking.tracker import Tracker
from dsyolo.trainer.build import DataParts, Parts

PASSES = 1 + BACKWARD  # what counts of a step's operations, computing again left out


def build_memory(
    run: RunSpec,
    parts: Parts,
    tracker: Tracker,
    record: RunArtifacts | NullArtifacts,
    times: TimeProfile | NoTimeProfile,
) -> MemoryProfiler | NoMemoryProfiler:
    """Tells what memory each rank is expected to need, and gives what measures it."""
    ds, zero = run.ds, parts.engine.deepspeed_json["zero_optimization"]
    loads: list[RankLoad] = parts.engine.all_gather(parts.load)
    predicted = [predict(load, ds, zero) for load in loads]
    shown = range(0, len(loads), ds.data_parallel_size)  # a rank of each stage
    titles = {rank: f"rank {rank} of {len(loads)}" for rank in shown}
    if run.world.is_main_process:
        largest = max(shown, key=lambda rank: predicted[rank].together.total)
        print(table((f"{title}, predicted", predicted[rank].together) for rank, title in titles.items()))
        counted, stages = run.activations.counted, loads[:: ds.data_parallel_size]
        plain, least = counted.peak_bytes(), counted.peak_bytes(counted.blocks)
        groups = tuple(sizes for load in stages for sizes in load.groups)
        alone = RankLoad(groups, plain, plain, least, 0, run.world.size, run.config.ema)
        print(verdict(loads[largest], ds, zero, alone))
        if warning := _shortage(run, predicted[: run.world.local_size], parts.engine.device.type == "cpu"):
            print(warning)

    def tell(measured: list[MemoryMeasurement]) -> None:
        rows = []
        for rank, title in titles.items():
            rows.append((f"{title}, predicted", predicted[rank].together))
            rows.append((f"{title}, measured", measured[rank].account.together))
        peaks = [one.peak for one in measured if one.peak is not None]
        most = (
            f"most at once: {max(peaks) / 2**20:.1f} MiB" if peaks else "activations cannot be measured here"
        )
        tracker.say(f"{table(rows)}\n{most}")
        times.memory(measured)
        record.memory(
            [
                {
                    "rank": rank,
                    "predicted": wanted.to_json(),
                    "measured": found.account.to_json(),
                    "peak": found.peak,
                }
                for rank, (wanted, found) in enumerate(zip(predicted, measured, strict=True))
            ]
        )

    if run.config.memory_profile == "off":
        return NoMemoryProfiler()
    again = run.config.memory_profile == "epochs"
    return MemoryProfiler(parts.engine, parts.partitions, parts.ema, tell, again=again)


def _shortage(run: RunSpec, accounts: list[MemoryEstimate], on_cpu: bool) -> str:
    if "nvme" in (run.ds.offload_optimizer, run.ds.offload_param):
        accounts = [MemoryEstimate(account.device) for account in accounts]  # the page cache keeps what fits
    device_bytes = None if on_cpu else device.total_memory(run.world.local_rank)
    return shortage(accounts, device_bytes, host_bytes())


def build_time_profile(
    run: RunSpec, data: DataParts, parts: Parts, start: int
) -> TimeProfile | NoTimeProfile:
    """Tells where the time of steps goes. On an accelerator only some steps are measured, so that events cost nothing.

    Args:
        start: steps that are done: those of a run that goes on get a file of their own.
    """
    config, ds, world = run.config, run.ds, run.world
    if config.time_profile == "off":
        return NoTimeProfile()
    in_detail = config.time_profile == "steps"
    on_cpu = parts.engine.device.type == "cpu"
    every = 1 if on_cpu or in_detail else measured_every(config.log_every, data.stream.epoch_start_step(1))
    phases = StepTimer(clock_of_device(), every)
    parts.engine.tell(phases)
    with torch.device("meta"):
        network = build_yolov5(config.model, run.data.num_classes)
    flops = sum(cost.flops for cost in node_costs(network, (1, 3, config.imgsz, config.imgsz)))
    peak = _peak(run, parts, on_cpu)

    def flops_of_step(step: int) -> float:
        area = (data.train.size_px(step - 1) / config.imgsz) ** 2  # of multi-scale
        return PASSES * flops * ds.global_batch * area

    details = None
    if in_detail:
        about: dict[str, Any] = {
            "rank": world.rank,
            "host": socket.gethostname(),
            "started_at": psutil.Process().create_time(),
            "images_per_step": ds.global_batch,
            "num_images": data.stream.num_images,
            "threads": torch.get_num_threads(),
            "cores": len(psutil.Process().cpu_affinity())
            if hasattr(psutil.Process, "cpu_affinity")
            else psutil.cpu_count(),
            "machine_cores": psutil.cpu_count(),
            "workers": device.num_workers(world, config.workers),
            "device": device_name(parts.engine.device) or parts.engine.device.type.upper(),
            "peak_flops_per_s": peak.flops_per_s,
            "peak_source": peak.source,
            "flops_per_image": PASSES * flops,
        }
        usage = ResourceUsage(of_machine=world.local_rank == 0, **({} if on_cpu else {"gpu": _gpu(parts)}))
        path = run.folder / (f"steps_{start:08d}.json" if start else "steps.json")
        details = StepDetails(path if world.is_main_process else None, about, usage)
    work = StepFlops(flops_of_step, peak.flops_per_s)
    return TimeProfile(phases, CommTimer(phases), work, parts.engine.all_gather, details)


def _peak(run: RunSpec, parts: Parts, on_cpu: bool) -> Peak:
    precision, found = run.ds.precision, None
    if on_cpu:
        # All ranks at once, as they train; what disturbs one of them does not make it a slower machine.
        collectives.barrier()
        found = max(parts.engine.all_gather(peak_of_cpu(precision)))
    if found is None and (name := device_name(parts.engine.device)):
        found = peak_of_gpu(name, precision)
    found = found or Peak(0.0, "not known")
    if run.world.is_main_process:
        print(f"peak of a rank: {found.source}")
    return found


def device_name(device: torch.device) -> str:
    """Of a GPU, as its driver has it; empty for other devices, whatever else the machine has."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _gpu(parts: Parts) -> Any:
    library = load_nvml()
    if library is None or not torch.cuda.is_available():
        return lambda: None
    uuid = getattr(torch.cuda.get_device_properties(parts.engine.device), "uuid", "")
    return Gpu(library, f"GPU-{uuid}").use
