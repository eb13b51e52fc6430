"""The bytes that a rank sends in a step, and receives as many: the ZeRO paper's formulas, and what DeepSpeed adds.

Rajbhandari et al. 2020 (arXiv:1910.02054), section 7: an all-reduce moves 2 (N - 1) / N of the gradients, as a
reduce-scatter and an all-gather of (N - 1) / N each. ZeRO 1 and 2 gather weights instead of gradients; ZeRO 3 gathers
weights for the forward and again for the backward pass.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def comm_bytes(
    zero: Mapping[str, Any],
    numels: Sequence[int],
    ranks: int,
    accumulation: int,
    number_bytes: int = 4,
) -> float:
    """Return the bytes that one of `ranks` ranks with the same parameters sends in a step.

    Args:
        zero: the block `zero_optimization` that DeepSpeed gets: `DeepSpeedConfig.deepspeed_json`.
        numels: elements of each parameter, in the order of the forward pass.
        accumulation: micro-batches of a step. ZeRO 2 sends the gradients of each, ZeRO 3 the weights for each too.
        number_bytes: of a gradient or weight that is sent.
    """
    stage = zero["stage"]
    elements = sum(numels)
    share = (ranks - 1) / ranks
    if stage == 0:
        return share * elements * 2 * number_bytes
    if stage < 3:
        # Reduced to the owner alone, or all-reduced where shares are small: config/deepspeed/config.py
        reductions = 2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1
        return share * elements * number_bytes * (reductions * (accumulation if stage == 2 else 1) + 1)
    padded = [math.ceil(numel / ranks) * ranks for numel in numels]  # all ranks send parts of one size
    threshold = int(zero.get("stage3_param_persistence_threshold", 0))
    live = int(zero.get("stage3_max_live_parameters", 0))  # the last layers stay whole until backward
    gathered = persistent = kept = 0
    for numel, size in zip(reversed(numels), reversed(padded), strict=True):
        if numel <= threshold:
            persistent += size
        elif kept + numel <= live:
            kept += numel
            gathered += size
        else:
            live = 0
            gathered += 2 * size
    # Persistent ones are gathered once, after the step.
    return share * number_bytes * (accumulation * (gathered + sum(padded)) + persistent)


def num_messages(zero: Mapping[str, Any], numels: Sequence[int], accumulation: int) -> int:
    """Return the collectives of a step: one a bucket, and under ZeRO 3 two a gathered parameter."""
    buckets = math.ceil(sum(numels) / max(1, int(zero.get("reduce_bucket_size", sum(numels)))))
    if zero["stage"] < 2:
        return buckets + zero["stage"]
    if zero["stage"] == 2:
        return accumulation * buckets + 1
    gathered = sum(numel > int(zero.get("stage3_param_persistence_threshold", 0)) for numel in numels)
    return accumulation * (buckets + 2 * gathered) + 1
