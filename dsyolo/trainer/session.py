"""Joins, before anything is built, what a process leaves at the end: process group, watchdog, preemption, run lock."""

from __future__ import annotations

from types import TracebackType

from dsyolo.cluster.collectives import barrier
from dsyolo.cluster.preemption import PreemptionHandler
from dsyolo.cluster.run_lock import RunLock
from dsyolo.cluster.watchdog import Watchdog
from dsyolo.cluster.world import World
from dsyolo.config.resolve import RunSpec
from dsyolo.engine import process_group
from dsyolo.tracking.log_setup import LOGS, RunLog
from dsyolo.tracking.other_load import OtherLoad
from dsyolo.tracking.progress_bar import leave_terminal


class Session:
    """Wait for all ranks; from then on all know when one of them is asked to stop, or is lost.

    As a context manager it leaves: in step with the other ranks after an orderly end, else without waiting for them.

    Raises:
        UserError: not all ranks came.
    """

    def __init__(self, spec: RunSpec, world: World, run_log: RunLog) -> None:
        self.world, self.run_log = world, run_log
        self.other_load = OtherLoad(world)  # first: measured meanwhile
        self.run_lock = RunLock(spec.folder, disposable=LOGS)
        with process_group.started(spec.config.rendezvous_timeout_s):
            self.watchdog = Watchdog(world, late_s=spec.config.hang_timeout_s)
            self.preemption = PreemptionHandler(world, on_interrupt=leave_terminal)
            self.other_load.count_ranks(self.watchdog.pids_here())

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                barrier()  # while the watchdog still names the rank that does not come
                self.preemption.close()
            self.watchdog.close()
            process_group.destroy_process_group(orderly=kind is None)
        finally:
            self.run_lock.leave()
