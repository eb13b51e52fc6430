"""What all ranks do after one of them ran out of memory: go on with less, or end with a remedy."""

from typing import NoReturn

from dsyolo.cluster.watchdog import Watchdog
from dsyolo.config.resolve import RunSpec
from dsyolo.config.run_config import AUTO
from dsyolo.trainer.hooks.heartbeat_hook import VALIDATING


def restart_with_less(spec: RunSpec, watchdog: Watchdog) -> NoReturn:
    """Start all ranks again with half the micro-batch and the same global batch; once, then end the run.

    Where it validated under ZeRO 3 they go on with half as many images at a time there, as often as they have to.
    """
    if watchdog.where == VALIDATING:
        _validate_with_less(spec, watchdog)
    ds, again = spec.ds, spec.config.halve_micro_batch
    what = f"ran out of memory with {ds.micro_batch} images in a micro-batch"
    is_planned = spec.config.deepspeed_config == AUTO
    if again or (ds.micro_batch % 2 and not is_planned):
        rule = "which was halved once already" if again else "which cannot be halved"
        remedy = "Lower train_micro_batch_size_per_gpu, or save memory by --recompute blocks or a higher ZeRO stage"
        if is_planned:
            remedy = (
                "Save memory by a smaller --imgsz or --model, or by a JSON of your own with a smaller batch"
            )
        watchdog.end_all(f"{what}, {rule}. {remedy}.")
    halved = f"{ds.micro_batch // 2} and {2 * ds.accumulation} accumulation steps"
    if is_planned:
        halved = "another plan, for less memory"
    watchdog.end_all(
        f"{what}: from now on {halved}; the global batch stays {ds.global_batch}.",
        again=("--halve_micro_batch", "--resume", "auto"),
    )


def _validate_with_less(spec: RunSpec, watchdog: Watchdog) -> NoReturn:
    size = spec.config.val_batch_size
    if size > 1 and spec.ds.zero_stage == 3:
        watchdog.end_all(
            f"ran out of memory with {size} images to validate at a time: from now on {size // 2}. What was trained since "
            "the last checkpoint is trained again.",
            again=("--val_batch_size", str(size // 2), "--resume", "auto"),
        )
    watchdog.end_all("ran out of memory in validation. Take a smaller --val_batch_size, --imgsz or --model.")
