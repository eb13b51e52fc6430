"""The options `--batch` and `--global_batch`: they go before the batch sizes of the DeepSpeed JSON, once, before it is checked."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsyolo.config.deepspeed.batch_sizes import BATCH_KEYS, dp_size_of, fitted, recipe_batch, whole_of
from dsyolo.config.deepspeed.json_reader import JsonSource
from dsyolo.config.messages import counted
from dsyolo.config.run_config import RunConfig

PLANNED = -1  # --batch: plan the micro-batch for the machine
TOTAL, MICRO, STEPS = BATCH_KEYS


def with_batch_options(
    source: JsonSource, run: RunConfig, ranks: int, saved_batch: int | None = None
) -> tuple[JsonSource, tuple[str, ...]]:
    """Return the JSON with the batch that the options ask for, and a line that says so.

    The micro-batch of `--batch` and the images in a step of `--global_batch` replace the JSON's. What they leave of
    its other sizes stays where the three agree; else the accumulation follows, or the micro-batch is left open, to be
    planned. The global batch of a run that is resumed stays. Contradictions are added to the JSON's problems.

    Args:
        ranks: of the run, all hosts together.
        saved_batch: the global batch of the resumed run.
    """
    if source.content is None or (run.batch is None and run.global_batch is None):
        return source, ()
    dp_size = dp_size_of(source.content, ranks)
    if problem := contradiction(run, dp_size, saved_batch):
        return replace(source, problems=(*source.problems, problem)), ()
    total, micro, steps = _sizes(source.content, run, dp_size, ranks, saved_batch)
    if total and micro and saved_batch:
        micro, steps = fitted(total, micro, None, dp_size).micro, None
    sizes = {TOTAL: total, MICRO: micro, STEPS: steps}
    # A size that breaks the rule of its key stays, to be refused.
    content = {
        key: value
        for key, value in source.content.items()
        if key not in BATCH_KEYS or (value is not None and whole_of(value) is None)
    }
    content = {**{key: value for key, value in sizes.items() if value}, **content}
    left_open = [path for path in source.left_open if path not in [(key,) for key in BATCH_KEYS]]
    if micro is None and steps is None:
        left_open.append((MICRO,))
    return replace(source, content=content, left_open=tuple(left_open)), (_line(run, source, sizes),)


def contradiction(run: RunConfig, dp_size: int, saved_batch: int | None = None) -> str | None:
    """Return what is wrong with the two options on so many data-parallel ranks; None where nothing is."""
    total, micro = run.global_batch, run.batch
    if total and saved_batch and total != saved_batch:
        rule = f"the run has {saved_batch} images in a step, which stay"
        return f"--global_batch: {total} given, but {rule}. Leave it out, or start another run with --name."
    if not total or saved_batch:
        return None
    unit = dp_size * (micro if micro and micro != PLANNED else 1)
    if total % unit == 0:
        return None
    each = f"--batch {micro} x " if unit != dp_size else ""
    nearest = sorted({max(total // unit, 1) * unit, -(-total // unit) * unit})
    rule = f"it must be a multiple of {each}{counted(dp_size, 'rank')} = {unit}"
    return f"--global_batch: {total} given, but {rule}. Set it to {' or '.join(map(str, nearest))}."


def images_in_step(run: RunConfig, ranks: int, saved_batch: int | None = None) -> int:
    """Return the images in a step of a run whose JSON says nothing of them: the option's, or else the recipe's."""
    micro = run.batch if run.batch and run.batch != PLANNED else 1
    return saved_batch or run.global_batch or recipe_batch(ranks * micro)


def per_rank(images: int, ranks: int) -> int:
    """Return the micro-batch of each rank for YOLOv5's `--batch-size`, which is of all GPUs together.

    Raises ValueError with the rule where they cannot share it.
    """
    if images == PLANNED or images % ranks == 0:
        return images if images == PLANNED else images // ranks
    below, above = max(images // ranks, 1) * ranks, -(-images // ranks) * ranks
    numbers = " or ".join(str(number) for number in sorted({below, above}))
    rule = f"as in YOLOv5 it is shared by all GPUs, and {ranks} ranks cannot share it"
    raise ValueError(f"{images} given, but {rule}. Set it to {numbers}, or give --batch, images of each GPU.")


def _sizes(
    content: Mapping[str, Any], run: RunConfig, dp_size: int, ranks: int, saved_batch: int | None
) -> tuple[int | None, int | None, int | None]:
    """Return (global batch, micro-batch, accumulation) to write into the JSON; None: left out."""
    total, micro, steps = (whole_of(content.get(key)) for key in BATCH_KEYS)
    wanted = run.global_batch or saved_batch
    if run.batch == PLANNED:
        return wanted or total or images_in_step(run, ranks), None, None
    if run.batch is None:  # so --global_batch is given
        assert wanted
        if micro and wanted % (micro * dp_size) == 0:
            return wanted, micro, None
        return wanted, None, steps if steps and wanted % (steps * dp_size) == 0 and not micro else None
    if wanted is None and total is None and (micro or steps):
        return None, run.batch, steps  # as the JSON has it: the accumulation is given, or 1
    unit = run.batch * dp_size
    if wanted is None:
        wanted = -(-total // unit) * unit if total else images_in_step(run, ranks)
    return wanted, run.batch, None


def _line(run: RunConfig, source: JsonSource, sizes: Mapping[str, int | None]) -> str:
    """Return what the options change, for the start of the run."""
    assert source.content is not None
    given = [f"--batch {run.batch}"] if run.batch else []
    given += [f"--global_batch {run.global_batch}"] if run.global_batch else []
    shown = [
        f"{key} {value or 'planned' if key == MICRO else value}"
        for key, value in sizes.items()
        if value or key == MICRO
    ]
    before = [
        f"{key} {source.content[key]}"
        for key in BATCH_KEYS
        if source.content.get(key) not in (None, sizes[key])
    ]
    instead = f" instead of {', '.join(before)}" if before else ""
    return f"{' '.join(given)}: {', '.join(shown)}{instead}"
