"""Restarts all ranks with less after one of them ran out of memory, or ends them with a remedy."""

from typing import NoReturn

from dsyolo.cluster.watchdog import Watchdog
from dsyolo.config.resolve import RunSpec
from dsyolo.config.run_config import AUTO
from dsyolo.trainer.hooks.heartbeat_hook import VALIDATING


def restart_with_less(spec: RunSpec, watchdog: Watchdog) -> NoReturn:
    """Restart all ranks with half the micro-batch and the same global batch; once, then end the run.

    After a failure in a ZeRO 3 validation, restart with half as many images per validation batch, as often as needed.
    """
    if watchdog.where == VALIDATING:
        _validate_with_less(spec, watchdog)
    ds, again = spec.ds, spec.config.halve_micro_batch
    what = f"ran out of memory with micro-batch {ds.micro_batch}"
    is_planned = spec.config.deepspeed_config == AUTO
    if again or (ds.micro_batch % 2 and not is_planned):
        rule = "which was halved once already" if again else "which cannot be halved"
        remedy = "Lower train_micro_batch_size_per_gpu, or save memory with --recompute blocks or a higher ZeRO stage"
        if is_planned:
            remedy = (
                "Lower --imgsz, choose a smaller --model, or give a JSON of your own with a smaller batch"
            )
        watchdog.end_all(f"{what}, {rule}. {remedy}.")
    halved = f"micro-batch {ds.micro_batch // 2} and {2 * ds.accumulation} accumulation steps"
    if is_planned:
        halved = "a new plan for less memory"
    watchdog.end_all(
        f"{what}: restarting with {halved}; global batch {ds.global_batch} unchanged.",
        again=("--halve_micro_batch", *_resume(spec)),
    )


def _validate_with_less(spec: RunSpec, watchdog: Watchdog) -> NoReturn:
    size = spec.config.val_batch_size
    if size > 1 and spec.ds.zero_stage == 3:
        watchdog.end_all(
            f"ran out of memory while validating {size} images at a time: {size // 2} from now on. "
            "Steps since the last checkpoint are repeated.",
            again=("--val_batch_size", str(size // 2), *_resume(spec)),
        )
    watchdog.end_all("ran out of memory in validation. Use a smaller --val_batch_size, --imgsz or --model.")


def _resume(spec: RunSpec) -> tuple[str, ...]:
    """Return the arguments that resume this run, whatever --resume stands before them: a path named its folder."""
    return "--resume=auto", f"--project={spec.config.project}", f"--name={spec.config.name}"
