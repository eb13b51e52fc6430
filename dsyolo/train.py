"""Trains a YOLOv5 detector under DeepSpeed: parse, resolve, build, fit.

deepspeed dsyolo/train.py --deepspeed_config ds_configs/zero2.json --data data.yaml
Installed: deepspeed --module dsyolo.train, or alone dsyolo train.
"""

import os
import sys

if __name__ == "__main__":
    if sys.path[:1] == [os.path.dirname(os.path.abspath(__file__))]:
        del sys.path[0]  # put there for a script: our folders would hide packages of the same names
    from dsyolo.base.environment import restart_in_utf8
    from dsyolo.base.start import prepare_training

    restart_in_utf8()
    prepare_training()  # before torch is imported

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from dsyolo.base.environment import choose_cpu, read_environment
from dsyolo.base.errors import UserError, path_error
from dsyolo.base.out_of_memory import is_out_of_memory
from dsyolo.base.resume_words import way_on
from dsyolo.base.stdio import outlive_readers
from dsyolo.checkpoint.manifest import saved_progress
from dsyolo.cluster import preemption
from dsyolo.cluster.preemption import Preempted
from dsyolo.cluster.still_saving import wait_for_others
from dsyolo.cluster.world import World, world_from_environment
from dsyolo.config.cli_args import wants_cpu
from dsyolo.config.resolve import RunSpec, resolve
from dsyolo.planner.auto import plan_config
from dsyolo.planner.local_hardware import hardware_here
from dsyolo.tracking.log_setup import FILE_ONLY, RunLog
from dsyolo.trainer.build import build
from dsyolo.trainer.hooks.base import StopTraining
from dsyolo.trainer.oom_restart import restart_with_less
from dsyolo.trainer.run_folder import check_folder
from dsyolo.trainer.session import Session

# The launcher kills all ranks once one has failed: the others leave the main process time to log why.
GRACE_S = 10
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run the command line of `program`; return the exit status.

    0; 2 for a mistake of the user's; 65 where the training diverges; 66 where its images vanish; 74 where its end
    could not be saved; 75 after SIGTERM, with all saved, and where another run is in its folder; 130 after Ctrl-C, with
    all saved too. A rank that is lost ends all of them with 70 (cluster/watchdog.py).
    """
    if wants_cpu(argv):
        choose_cpu()  # before anything asks for the accelerator
    try:
        world = world_from_environment()
    except UserError as error:
        RunLog(rank=0)
        log.error("%s", error)
        return error.status
    run_log = RunLog(world.rank)
    session = None
    try:
        with preemption.ends_at_once(world):
            wait_for_others(logs=world.local_rank == 0)
            spec = read(argv, world, program)
            session = Session(spec, world, run_log)
        return train(spec, world, session)
    except UserError as error:
        log.error("%s", error, extra={} if world.is_main_process else FILE_ONLY)
        if not world.is_main_process:
            if session is None:
                time.sleep(GRACE_S)
            elif not session.watchdog.main_process_ends(GRACE_S):
                log.error("%s", error)  # the main process did not meet it
        return error.status
    except KeyboardInterrupt:
        if world.is_main_process:
            log.error(
                "Interrupted. %s continues from the last checkpoint, if there is one.", way_on().capitalize()
            )
        return preemption.INTERRUPTED
    except Exception:
        log.exception("The run ends with this error:", extra=FILE_ONLY)  # Python prints it on the terminal
        raise


def read(argv: Sequence[str] | None, world: World, program: str = "train.py") -> RunSpec:
    """Resolve the run, with what it needs to know of this machine and of the run's folder.

    Raises:
        UserError: something that the user gave cannot be used.
    """
    accelerator = read_environment().accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return resolve(
            argv,
            program,
            world_size=world.size,
            accelerator=accelerator,
            plan=lambda config, source, *rest: plan_config(
                config, source, hardware_here(world, accelerator), *rest
            ),
            saved_state=saved_progress,
            check_folder=check_folder,
        )
    except OSError as error:
        raise path_error(error) or error from None


def train(spec: RunSpec, world: World, session: Session) -> int:
    """Build and train; return the exit status. Whatever is raised, all that was opened is closed."""
    end, status = None, 0
    with session, ExitStack() as closing:
        try:
            end = build(spec, world, session, closing).fit()
        except Preempted as request:  # before the first step
            status = request.status
        except StopTraining as stop:  # nothing is left to train
            end = stop.end
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                restart_with_less(spec, session.watchdog)
            session.watchdog.wait_for_verdict()  # most likely a collective failed because another rank is lost
            raise
    if end is None:
        preemption.leave_at_once(world, status)
    if end.message and world.is_main_process:
        log.error("%s", end.message)
    return end.status


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
