"""Measures where the time of steps goes: shares by phase, MFU, and on request every step of every rank."""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch

from dsyolo.cluster import collectives
from dsyolo.config.spec import Precision
from dsyolo.engine import device
from dsyolo.engine.comm_timer import CommTimer
from dsyolo.engine.memory_profile import MemoryMeasurement
from dsyolo.engine.step_timer import PHASES, StepTimer, clock_of_device
from dsyolo.models.flops import BACKWARD, node_costs
from dsyolo.models.registry import meta_network
from dsyolo.planner.cpu_peak import Peak, peak_of_cpu
from dsyolo.planner.local_hardware import peak_of_gpu
from dsyolo.tracking.resource_usage import Gpu, ResourceUsage, load_nvml
from dsyolo.tracking.throughput import StepDetails, measured_every, peak_figures, shares
from dsyolo.trainer.hooks.base import Hook, Part

T = TypeVar("T")
# A CPU's peak is measured at the start, after epochs while it is not known, and some times more: the highest one stays.
MOST_PEAK_TRIES, PEAK_EVERY_S, PEAK_GROWS = 4, 60.0, 1.05
PASSES = 1 + BACKWARD  # forward passes that a step's operations count as, without what is computed again
log = logging.getLogger(__name__)


class TimeProfileHook(Hook):
    """Measures steps on all ranks. On an accelerator only some are measured, so that events cost nothing.

    Args:
        in_detail: keep each step of each rank, in steps.json of the run's folder.
    """

    def __init__(self, *, in_detail: bool) -> None:
        self._in_detail = in_detail
        self._details: StepDetails | None = None
        self._memory: dict[str, float] = {}
        self._peak_tries, self._trained_s = 0, 0.0  # the latter since the last try

    def open(self) -> None:
        trainer, engine = self.trainer, self.trainer.engine
        spec = trainer.spec
        on_cpu = engine.device.type == "cpu"
        steps_of_epoch = trainer.data.sampler.epoch_start_step(1)
        every = 1 if on_cpu or self._in_detail else measured_every(spec.config.log_every, steps_of_epoch)
        self._timer = StepTimer(clock_of_device(), every)
        engine.set_timer(self._timer)
        self._comm = CommTimer(self._timer)
        network = meta_network(spec.config.model, spec.data.num_classes)
        size_px = spec.config.imgsz
        self._flops_per_image = PASSES * sum(
            cost.flops for cost in node_costs(network, (1, 3, size_px, size_px))
        )
        self._measure_peak()
        if self._in_detail:
            self._details = self._make_details(on_cpu)

    def _measure_peak(self) -> None:
        """Measure or look up the peak of all ranks. All ranks call it together."""
        trainer, engine = self.trainer, self.trainer.engine
        found = _peak_of_rank(trainer.spec.ds.precision, engine.device, engine.all_gather)
        sum_of_peaks = sum(engine.all_gather(found.flops_per_s))
        self._peak_tries += 1
        self._trained_s = 0.0
        if self._peak_tries > 1 and sum_of_peaks <= PEAK_GROWS * self._peak_flops_per_s:
            return  # as before, or lower in a moment that is busier
        self._peak, self._sum_of_peaks = found, sum_of_peaks
        self._peak_threads = torch.get_num_threads()
        if trainer.world.is_main_process:
            log.info("peak of a rank: %s", found.source)

    @property
    def _peak_flops_per_s(self) -> float:
        """Return the peak of all ranks; on a CPU that of the threads that they have now."""
        on_cpu = self.trainer.engine.device.type == "cpu"
        return self._sum_of_peaks * (torch.get_num_threads() / self._peak_threads if on_cpu else 1)

    def mfu(self, images_per_s: float) -> float | None:
        """Return the share of all ranks' peak FLOP/s that this speed uses; None where the peak is not known."""
        if not self._peak_flops_per_s:
            return None
        return images_per_s * self._flops_per_image / self._peak_flops_per_s

    def steps(self, batches: Iterator[T]) -> Iterator[T]:
        start = self.trainer.state.step
        timed = self._timer.steps(batches, start)
        return timed if self._details is None else self._details.of_each(timed, start, self._comm)

    @contextmanager
    def around(self, part: Part) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._details and part != "step":
            self._details.outside.setdefault(part, []).append(time.perf_counter() - begin)

    def memory_measured(self, measured: Sequence[MemoryMeasurement]) -> None:
        """Take all ranks' memory in a step, for the rows of the epochs from now on."""
        self._memory = peak_figures(measured)

    def after_epoch(self) -> None:
        own = self._timer.take()
        on_cpu = self.trainer.engine.device.type == "cpu"
        if self._details:
            self._details.times += own
        ranks = self.trainer.engine.all_gather({name: sum(s.seconds[name] for s in own) for name in PHASES})
        flops = sum(self._flops_of_step(one.step) for one in own)
        self.trainer.figures |= shares(ranks, flops, self._peak_flops_per_s) | self._memory
        self._trained_s += max(sum(seconds.values()) for seconds in ranks)  # the same on all ranks
        is_due = not self._sum_of_peaks or self._trained_s > PEAK_EVERY_S
        if (
            on_cpu and is_due and self._peak_tries < MOST_PEAK_TRIES
        ):  # the moment before may have been a busy one
            self._measure_peak()

    def finish(self) -> None:
        if self._details:
            self._details.times += self._timer.take()  # the steps of an epoch that was not ended
            self._details.end(self._comm)
            own = self._details.to_json() | {"memory": self._memory}
            self._details.write(self.trainer.engine.all_gather(own))

    def close(self) -> None:
        if hasattr(self, "_comm"):
            self._comm.close()

    def _flops_of_step(self, step: int) -> float:
        """Return the FLOPs of all ranks in a step; multi-scale changes the area of the images."""
        area = (self.trainer.data.train.size_px(step - 1) / self.trainer.spec.config.imgsz) ** 2
        return self._flops_per_image * self.trainer.spec.ds.global_batch * area

    def _make_details(self, on_cpu: bool) -> StepDetails:
        spec, world, engine = self.trainer.spec, self.trainer.world, self.trainer.engine
        process = psutil.Process()
        about: dict[str, Any] = {
            "rank": world.rank,
            "host": socket.gethostname(),
            "started_at": process.create_time(),
            "images_per_step": spec.ds.global_batch,
            "num_images": self.trainer.data.sampler.num_images,
            "threads": torch.get_num_threads(),
            "cores": len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count(),
            "machine_cores": psutil.cpu_count(),
            "workers": device.num_workers(world, spec.config.workers),
            "device": device_name(engine.device) or engine.device.type.upper(),
            "peak_flops_per_s": self._peak.flops_per_s,
            "peak_source": self._peak.source,
            "flops_per_image": self._flops_per_image,
        }
        gpu = {} if on_cpu else {"gpu": _gpu(engine.device)}
        usage = ResourceUsage(of_machine=world.local_rank == 0, **gpu)
        start = self.trainer.state.step  # a resumed run gets a file of its own
        path = spec.folder / (f"steps_{start:08d}.json" if start else "steps.json")
        return StepDetails(path if world.is_main_process else None, about, usage)


def _peak_of_rank(
    precision: Precision, own_device: torch.device, all_gather: Callable[[Any], list[Any]]
) -> Peak:
    found: Peak | None = None
    if own_device.type == "cpu":
        # All ranks at once, as they train; what disturbs one of them does not make it a slower machine.
        collectives.barrier()
        found = max(all_gather(peak_of_cpu(precision)))
    elif name := device_name(own_device):
        found = peak_of_gpu(name, precision)
    return found or Peak(0.0, "not known")


def device_name(own_device: torch.device) -> str:
    """Return a GPU's name as its driver has it; empty for other devices, whatever else the machine has."""
    return torch.cuda.get_device_name(own_device) if own_device.type == "cuda" else ""


def _gpu(own_device: torch.device) -> Any:
    library = load_nvml()
    if library is None or not torch.cuda.is_available():
        return lambda: None
    uuid = getattr(torch.cuda.get_device_properties(own_device), "uuid", "")
    return Gpu(library, f"GPU-{uuid}").use
