"""Bytes that a rank sends in a step, and receives as many: the ZeRO paper's formulas with what DeepSpeed adds to them.

Rajbhandari et al. 2020 (arXiv:1910.02054), section 7: an all-reduce moves 2 (N - 1) / N of the gradients, as a
reduce-scatter and an all-gather of (N - 1) / N each; ZeRO 1 and 2 gather weights instead of gradients; ZeRO 3 gathers
weights for the forward and again for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def comm_bytes(
    zero: Mapping[str, Any],
    numels: Sequence[int],
    ranks: int,
    accumulation: int,
    *,
    gradient_bytes: int = 4,
    weight_bytes: int = 4,
) -> float:
    """Of one rank, among `ranks` that hold the same parameters.

    Args:
        zero: the block `zero_optimization` that DeepSpeed gets: `DeepSpeedConfig.deepspeed_json`.
        numels: elements of each parameter, in the order of the forward pass.
        accumulation: micro-batches of a step. ZeRO 2 sends the gradients of each, ZeRO 3 the weights for each too.
    """
    stage = zero["stage"]
    elements = sum(numels)
    share = (ranks - 1) / ranks
    if stage == 0:
        return share * elements * 2 * gradient_bytes
    if stage < 3:
        # Summed for its owner alone, or on all ranks where shares are small: config/deepspeed/config.py
        gradients = gradient_bytes * (2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1)
        return share * elements * (gradients * (accumulation if stage == 2 else 1) + weight_bytes)
    filled = [math.ceil(numel / ranks) * ranks for numel in numels]  # ranks send parts of one size
    is_gathered = [numel > int(zero.get("stage3_param_persistence_threshold", 0)) for numel in numels]
    live = int(
        zero.get("stage3_max_live_parameters", 0)
    )  # of the last layers, whole from forward to backward
    twice = kept = 0
    for numel, size, gathered in zip(reversed(numels), reversed(filled), reversed(is_gathered), strict=True):
        if gathered:
            is_kept = kept + numel <= live
            kept = kept + numel if is_kept else math.inf
            twice += size if is_kept else 2 * size
    whole_again = sum(size for size, gathered in zip(filled, is_gathered, strict=True) if not gathered)
    each = weight_bytes * twice + gradient_bytes * sum(filled)
    return share * (accumulation * each + weight_bytes * whole_again)  # small ones once, after the step


def num_messages(zero: Mapping[str, Any], numels: Sequence[int], accumulation: int) -> int:
    """Collectives of a step, each of which costs its latency: of buckets, and of ZeRO 3's parameters one by one, twice."""
    buckets = math.ceil(sum(numels) / max(1, int(zero.get("reduce_bucket_size", sum(numels)))))
    if zero["stage"] < 2:
        return buckets + zero["stage"]
    if zero["stage"] == 2:
        return accumulation * buckets + 1
    gathered = sum(numel > int(zero.get("stage3_param_persistence_threshold", 0)) for numel in numels)
    return accumulation * (buckets + 2 * gathered) + 1


def boundary_bytes(elements: int, images: int, each: int) -> int:
    """Of activations that cross a border between two stages; their gradients come back, as many."""
    return elements * images * each
