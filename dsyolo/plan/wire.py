"""Bytes that a rank sends in a step, and receives as many: the ZeRO paper's formulas with what DeepSpeed adds to them.

Rajbhandari et al. 2020 (arXiv:1910.02054), section 7: an all-reduce moves 2 (N - 1) / N of the gradients, as a
reduce-scatter and an all-gather of (N - 1) / N each; ZeRO 1 and 2 gather weights instead of gradients; ZeRO 3 gathers
weights for the forward and again for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

CROSSES_BACK = 2  # an activation goes on, its gradient comes back


def wire_bytes(
    zero_stage: int,
    numels: Sequence[int],
    ranks: int,
    accumulation: int,
    *,
    gradient_bytes: int = 4,
    weight_bytes: int = 4,
    live_elements: int = 0,
    persistent_below: int = 0,
) -> float:
    """Of one rank, among `ranks` that hold the same parameters.

    Args:
        numels: elements of each parameter, in the order of the forward pass.
        accumulation: micro-batches of a step. ZeRO 2 sends the gradients of each, ZeRO 3 the weights for each too.
        live_elements: `stage3_max_live_parameters`: of the last layers so many stay whole from forward to backward.
        persistent_below: `stage3_param_persistence_threshold`: smaller parameters are whole everywhere.
    """
    elements = sum(numels)
    share = (ranks - 1) / ranks
    if zero_stage < 2:
        return share * elements * (gradient_bytes + (weight_bytes if zero_stage else gradient_bytes))
    if zero_stage == 2:
        return share * elements * (gradient_bytes * accumulation + weight_bytes)
    gathered = [numel for numel in numels if numel > persistent_below]
    kept = 0
    for numel in reversed(gathered):
        if kept + numel > live_elements:
            break
        kept += numel
    whole_again = elements - sum(gathered)  # after the step, once
    twice = 2 * sum(gathered) - kept
    return share * (
        accumulation * (weight_bytes * twice + gradient_bytes * elements) + weight_bytes * whole_again
    )


def crossing_bytes(elements: int, images: int, each: int) -> int:
    """Of a border between two stages, in a step: on and back."""
    return CROSSES_BACK * elements * images * each
