"""Goes on with a saved run: where it is, whether anything is left to do, and for how long it is extended."""

import logging
import math
from pathlib import Path
from typing import Any

from dsyolo.base.errors import UserError
from dsyolo.checkpoint.train_state import TrainState
from dsyolo.cluster.world import World
from dsyolo.config.recipe import NOMINAL_BATCH
from dsyolo.config.resolve import RunSpec
from dsyolo.config.spec import SchedulerSpec
from dsyolo.trainer.hooks.base import StopTraining

DECAY = "optimizer.params.weight_decay"
UNSCALED = "optimizer.weight_decay_is_not_scaled"  # a setting of Adam's kinds
log = logging.getLogger(__name__)


def settings_of(spec: RunSpec) -> dict[str, Any]:
    """Return what a resumed run must repeat, by the names that users know."""
    return {
        "optimizer.type": spec.ds.optimizer.type,
        **{f"optimizer.params.{key}": value for key, value in spec.ds.optimizer.params.items()},
        **({UNSCALED: True} if spec.ds.optimizer.is_adam else {}),
        **_scheduler_settings(spec.ds.scheduler),
        "gradient_clipping": spec.ds.gradient_clipping,
        "names": list(spec.data.names),
    }


def _scheduler_settings(scheduler: SchedulerSpec | None) -> dict[str, Any]:
    if scheduler is None:
        return {}
    params = {f"scheduler.params.{key}": value for key, value in scheduler.params.items()}
    return {"scheduler.type": scheduler.type, **params}


def check_settings(spec: RunSpec, saved: TrainState, checkpoint: Path, num_images: int | None = None) -> None:
    """Raise UserError for a checkpoint of a run with other settings. `num_images`: of the data set, once it is read."""
    now = {**settings_of(spec), "global_batch": spec.ds.global_batch, "seed": spec.config.seed}
    before = {**saved.settings, "global_batch": saved.global_batch, "seed": saved.seed}
    if spec.config.epochs < saved.epochs:  # more are an extension: config/resume.py
        now["epochs"], before["epochs"] = spec.config.epochs, saved.epochs
    if num_images is not None:
        now["num_images"], before["num_images"] = num_images, saved.num_images
    remedies: dict[str, str] = {}
    if UNSCALED in now and UNSCALED not in before and DECAY in before:
        # Older versions scaled the weight decay of Adam's kinds too, and took 0.01 where none was given.
        ran = before[DECAY] * saved.global_batch / NOMINAL_BATCH
        same = math.isclose(ran, now[DECAY], rel_tol=1e-9)
        before |= {DECAY: now[DECAY] if same else ran, UNSCALED: True}
        remedies[DECAY] = f"Set {DECAY} to {ran:.10g} in the JSON, which is what has run."
    changed = [
        f"{key}: {now.get(key)} now, but {before.get(key)} when it was saved. "
        + remedies.get(key, "Give what was given then.")
        for key in {**before, **now}
        if now.get(key) != before.get(key)
    ]
    if changed:
        raise UserError(f"{checkpoint} cannot be resumed from", changed)


def raise_if_finished(spec: RunSpec, saved: TrainState, world: World) -> None:
    """Log one line, and raise StopTraining with status 0, where a resumed run has nothing left to train."""
    if (text := _finished(spec, saved)) and world.is_main_process:
        log.info("%s", text)
    if text:
        raise StopTraining(0, "")


def _finished(spec: RunSpec, saved: TrainState) -> str:
    folder, epochs = spec.folder, spec.config.epochs
    anew = f"start another run with --name NEW --weights {folder}/weights/last.safetensors"
    if _stays_stopped(spec, saved):
        what = f"{folder} is finished: it stopped early after epoch {saved.epoch} of {epochs}"
        return f"{what}. Raise --patience (now {spec.config.patience}) to go on, or {anew}."
    num_steps = saved.epoch_start_step(epochs)
    if saved.epochs <= saved.epoch < epochs and saved.step >= num_steps:
        what = f"{epochs} epochs of {saved.num_images:,} images are {num_steps:,} steps of {saved.global_batch:,}"
        return (
            f"{folder} is finished: {what}, and all of them are trained. Raise --epochs further, or {anew}."
        )
    if saved.epoch < epochs:
        return ""
    longer = "To train more,"
    if not spec.ends_at_zero:
        longer += f" give --epochs {2 * epochs}, which goes on at the last lr, or"
    return f"{folder} is finished: all of its {epochs} epochs are trained. {longer} {anew}."


def _stays_stopped(spec: RunSpec, saved: TrainState) -> bool:
    """Return whether a run that stopped early still has to: unless another patience has been given since."""
    assert spec.resume is not None
    patience = spec.config.patience
    if not saved.stopped_early or saved.epoch >= saved.epochs:
        return False
    return patience == spec.resume.config.patience or saved.is_out_of_patience(patience, saved.epoch - 1)


def resumed_state(spec: RunSpec, saved: TrainState, new: TrainState) -> TrainState:
    """Return the saved state for the epochs of this run, of which it may have more than before."""
    saved.epochs, saved.total_steps = new.epochs, new.total_steps
    saved.schedule_epochs = spec.schedule_epochs if spec.schedule_epochs < new.epochs else 0
    saved.stopped_early = False  # `raise_if_finished` has ended those that stay so
    return saved


def resumes_at(state: TrainState, checkpoint: Path) -> str:
    """Return the line that says where a resumed run goes on."""
    epoch, step = (
        f"epoch {state.epoch + 1} of {state.epochs}",
        f"step {state.step + 1} of {state.total_steps}",
    )
    return f"resumes at {epoch}, {step}, from {checkpoint}"
