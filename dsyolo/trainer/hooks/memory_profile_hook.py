"""Reports the memory that each rank is estimated to need, and measures it in a step, term by term."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dsyolo.engine import device
from dsyolo.engine.ema import Ema
from dsyolo.engine.memory_profile import MemoryEstimate, MemoryMeasurement, MemoryProfiler
from dsyolo.engine.partitions import Partitions
from dsyolo.planner.local_hardware import host_bytes
from dsyolo.planner.memory_estimate import RankLoad, large_buckets, predict, shortage, table, verdict
from dsyolo.tracking.artifacts import RunArtifacts
from dsyolo.trainer.hooks.base import Hook, Part
from dsyolo.trainer.hooks.time_profile_hook import TimeProfileHook

log = logging.getLogger(__name__)


class MemoryProfileHook(Hook):
    """Reports and measures memory, on all ranks.

    Args:
        load: what this rank trains.
        measure: "start" measures the second step, "epochs" the first of every later epoch too, "off" none.
        artifacts: gets memory.json; None off the main process.
        times: gets the peaks for the rows of epochs.
    """

    def __init__(
        self,
        load: RankLoad,
        partitions: Partitions,
        ema: Ema,
        measure: str,
        artifacts: RunArtifacts | None,
        times: TimeProfileHook | None,
    ) -> None:
        self._load, self._parts, self._measure = load, (partitions, ema), measure
        self._artifacts, self._times = artifacts, times
        self._profiler: MemoryProfiler | None = None
        self._has_shown = False  # the table of a measured step

    def open(self) -> None:
        trainer, ds = self.trainer, self.trainer.spec.ds
        zero = trainer.engine.deepspeed_json["zero_optimization"]
        loads: list[RankLoad] = trainer.engine.all_gather(self._load)
        self._predicted = [predict(load, ds, zero) for load in loads]
        shown = range(0, len(loads), ds.dp_size)  # a rank of each stage
        # Without a pipeline all ranks hold as much.
        self._titles = {rank: f"rank {rank} of {len(loads)}, " if len(shown) > 1 else "" for rank in shown}
        if trainer.world.is_main_process:
            largest = max(shown, key=lambda rank: self._predicted[rank].combined.total)
            log.info("%s", verdict(loads[largest], ds, zero, self._on_one_rank(loads)))
            # The table comes once: with what is measured in the second step, or now where nothing will be.
            will_measure = self._measure != "off" and trainer.state.total_steps - trainer.state.step > 1
            rows = [
                (f"{title}predicted", self._predicted[rank].combined) for rank, title in self._titles.items()
            ]
            log.log(logging.DEBUG if will_measure else logging.INFO, "memory of a rank:\n%s", table(rows))
            for warning in (*large_buckets(loads[largest], ds, zero), self._shortage()):
                if warning:
                    log.warning("%s", warning)
        if self._measure != "off":
            again = self._measure == "epochs"
            self._profiler = MemoryProfiler(trainer.engine, *self._parts, self._report, again=again)

    def before_epoch(self) -> None:
        if self._profiler:
            self._profiler.begin_epoch()

    def around(self, part: Part) -> AbstractContextManager[Any]:
        return self._profiler.step() if part == "step" and self._profiler else nullcontext()

    def _on_one_rank(self, loads: list[RankLoad]) -> RankLoad:
        """Return what each rank would hold if the whole network were on it, to judge the strategy by."""
        spec = self.trainer.spec
        counted = spec.activations.counted
        plain, least = counted.peak_bytes(), counted.peak_bytes(counted.blocks)
        groups = tuple(sizes for load in loads[:: spec.ds.dp_size] for sizes in load.groups)
        return RankLoad(groups, plain, plain, least, 0, self.trainer.world.size, spec.config.ema)

    def _shortage(self) -> str:
        trainer = self.trainer
        estimates = self._predicted[: trainer.world.local_size]
        if "nvme" in trainer.spec.ds.parallelism.offload.devices:
            # the page cache keeps what fits of the host's part
            estimates = [MemoryEstimate(one.device) for one in estimates]
        on_cpu = trainer.engine.device.type == "cpu"
        device_bytes = None if on_cpu else device.total_memory(trainer.world.local_rank)
        return shortage(estimates, device_bytes, host_bytes())

    def _report(self, measured: list[MemoryMeasurement]) -> None:
        """Log and keep what was measured; called on all ranks after the step."""
        if self._times:
            self._times.memory_measured(measured)
        if self._artifacts is None:
            return
        rows = []
        for rank, title in self._titles.items():
            rows.append((f"{title}predicted", self._predicted[rank].combined))
            rows.append((f"{title}measured", measured[rank].terms.combined))
        peaks = [one.peak for one in measured if one.peak is not None]
        most = (
            f"most at once: {max(peaks) / 2**20:.1f} MiB" if peaks else "activations cannot be measured here"
        )
        log.log(
            logging.DEBUG if self._has_shown else logging.INFO, "memory of a rank:\n%s\n%s", table(rows), most
        )
        self._has_shown = True  # the later ones are in the log file and in memory.json
        self._artifacts.write_json(
            "memory.json",
            [
                {
                    "rank": rank,
                    "predicted": wanted.to_json(),
                    "measured": found.terms.to_json(),
                    "peak": found.peak,
                }
                for rank, (wanted, found) in enumerate(zip(self._predicted, measured, strict=True))
            ],
        )
