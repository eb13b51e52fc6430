"""The arithmetic of batches: global batch = micro-batch x accumulation x data-parallel ranks. All of it is here."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from dsyolo.config.deepspeed.schema import whole
from dsyolo.config.messages import counted
from dsyolo.config.recipe import NOMINAL_BATCH
from dsyolo.config.spec import BatchPlan

MOST_IMAGES = 2**16  # images in a micro-batch: beyond it not even byte counts can be computed
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def batch_sizes(block: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Return (global batch, micro-batch, accumulation) of a checked JSON, None where it gives none."""
    train, micro, steps = (int(block[key]) if key in block else None for key in BATCH_KEYS)
    return train, micro, steps


def batch_json(batch: BatchPlan) -> dict[str, int]:
    """Return the keys of a DeepSpeed JSON that ask for this batch."""
    return dict(zip(BATCH_KEYS, (batch.global_batch, batch.micro, batch.accumulation), strict=True))


def open_batch(
    content: Mapping[str, Any], ranks: int, left_open: Collection[tuple[str, ...]] = ()
) -> int | None:
    """Return the images in a step for a JSON that leaves them open, None where it does not.

    They are the recipe's, rounded up to a multiple of what the JSON gives.

    Args:
        left_open: paths of values that are "auto". Where no batch size is, one that is given means what it means to
            DeepSpeed, whatever else is "auto".
    """
    train, micro, steps = (content.get(key) for key in BATCH_KEYS)
    if train is not None or (micro is not None and steps is not None):
        return None
    is_auto = any((key,) in left_open for key in BATCH_KEYS)
    if not is_auto and (micro is not None or steps is not None):
        return None
    dp_size = dp_size_of(content, ranks)
    unit = dp_size * next((n for n in map(whole_of, (micro, steps)) if n), 1)
    return recipe_batch(unit)


def recipe_batch(unit: int) -> int:
    """Return the recipe's images in a step, rounded up to a multiple of `unit`."""
    return -(-NOMINAL_BATCH // unit) * unit


def dp_size_of(content: Mapping[str, Any], ranks: int) -> int:
    """Return the data-parallel ranks of a JSON that may hold mistakes; those are refused elsewhere."""
    pipeline = content.get("pipeline", {})
    stages = pipeline.get("stages", 1) if isinstance(pipeline, dict) else 1
    number = whole_of(stages)
    return max(1, ranks // number) if number else ranks


def whole_of(value: Any) -> int | None:
    """Return a value of a JSON that is a whole number of at least 1, as 128.0 is; None for any other."""
    return int(value) if whole(1).keeps(value) else None


def divisors(number: int, most: int | None = None) -> list[int]:
    """Return the divisors of `number`, at most `most`, the smallest first: the micro-batches of a share."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [n for n in sorted({*small, *(number // n for n in small)}) if most is None or n <= most]


def fitted(global_batch: int, micro: int | None, steps: int | None, dp_size: int) -> BatchPlan:
    """Return a plan of a global batch that `dp_size` divides, from the largest micro-batch that fits.

    Args:
        micro: the most images of a micro-batch; None: as `steps` has it, or else the whole share.
        steps: the accumulation that is wanted, where the share can be divided so.
    """
    share = global_batch // dp_size
    if micro is None:
        micro = share // steps if steps and share % steps == 0 else share
    micro = divisors(share, micro)[-1]
    return BatchPlan(micro, share // micro, dp_size)


def halved(batch: BatchPlan, problems: list[str]) -> BatchPlan | None:
    """Return the same global batch from half the micro-batch; None with a problem where it is odd."""
    if batch.micro % 2 == 0:
        return batch.with_micro(batch.micro // 2)
    problems.append(
        f"{BATCH_KEYS[1]}: {batch.micro} given with --halve_micro_batch, but it is odd. "
        "Leave that out: --no-halve_micro_batch."
    )
    return None


def batch_plan(
    source: Mapping[str, Any],
    valid: Mapping[str, Any],
    world_size: int,
    stages: int,
    problems: list[str],
    saved_batch: int | None = None,
) -> BatchPlan | None:
    """Return the batch as DeepSpeed derives it: rounded down, then compared. None with a problem where it is wrong.

    Args:
        source: the JSON as given.
        valid: the part of it with legal keys and types.
        saved_batch: global batch of the resumed run: it stays, and the others are fitted to the ranks.
    """
    if any(key in source and key not in valid for key in BATCH_KEYS):
        return None  # refused itself
    train, micro, steps = batch_sizes(valid)
    dp_size = world_size // stages
    ranks = counted(dp_size, "data-parallel rank" if stages > 1 else "rank")
    if saved_batch and train in (None, saved_batch) and (micro or train):
        if saved_batch % dp_size == 0:
            return fitted(saved_batch, micro, steps, dp_size)
        rule = f"{saved_batch} when it was saved, and {ranks} do not divide it"
        problems.append(f"train_batch_size: {rule}. Use {_dividing(saved_batch, dp_size, stages)}.")
    elif train is None and micro is None:
        rule = "missing, and so is train_micro_batch_size_per_gpu"
        problems.append(
            f"train_batch_size: {rule}. Give one of them; the recipe is made for {NOMINAL_BATCH}."
        )
    elif (micro or 0) > MOST_IMAGES:
        problems.append(f"{BATCH_KEYS[1]}: {micro} given, but it may be {MOST_IMAGES} at most. Set it lower.")
    elif train is None:
        assert micro is not None
        return BatchPlan(micro, steps or 1, dp_size)
    else:
        if micro is None:
            batch = BatchPlan(train // dp_size // (steps or 1), steps or 1, dp_size)
        else:
            batch = BatchPlan(micro, train // micro // dp_size if steps is None else steps, dp_size)
        fault = _fault(train, batch, ranks, stages, given_micro=micro is not None)
        if not fault:
            return batch
        problems.append(f"train_batch_size: {train} given, but {fault}")
    return None


def _fault(train: int, batch: BatchPlan, ranks: str, stages: int, *, given_micro: bool) -> str:
    """Return the rule that a derived batch breaks, and the remedy; empty where it breaks none."""
    micro, steps, dp_size, total = batch.micro, batch.accumulation, batch.dp_size, batch.global_batch
    if total == train:
        if micro <= MOST_IMAGES:
            return ""
        return f"{micro} a rank at once may be {MOST_IMAGES} at most. Give {BATCH_KEYS[1]}, or set it lower."
    if micro == 0:
        least = steps * dp_size
        each = f"{steps} accumulation x {ranks}" if steps > 1 else ranks
        fewer = f", or use {_dividing(train, dp_size, stages, most=dp_size)}" if steps == 1 else ""
        return f"{each} need {least} at least, one image each. Set it to {least}{fewer}."
    if steps == 0:
        least = micro * dp_size
        lower = f"{BATCH_KEYS[1]} to {train // dp_size}"
        if train % dp_size:
            lower = f"use {_dividing(train, dp_size, stages)} with a {BATCH_KEYS[1]} that fits"
        return f"{micro} per GPU x {ranks} = {least} already. Set it to {least}, or {lower}."
    if given_micro:
        remedy = f"Set it to {total}, or leave it out."
    else:
        remedy = f"Set it to {f'{total} or ' if total else ''}{total + steps * dp_size}."
        if train % dp_size:
            remedy += f" Or use {_dividing(train, dp_size, stages)}."
    return f"{micro} per GPU x {steps} accumulation x {ranks} = {total}. {remedy}"


def _dividing(batch: int, dp_size: int, stages: int, most: int | None = None) -> str:
    """Return numbers of ranks near `dp_size` x `stages` that divide a batch, as text."""
    fitting = divisors(batch, most)
    below, above = ([n for n in fitting if (n > dp_size) == up] for up in (False, True))
    *first, last = [str(n * stages) for n in (*below[-4:], *above[:1])]
    return f"{', '.join(first)}{' or ' if first else ''}{last} rank{'s' if last != '1' else ''}"
