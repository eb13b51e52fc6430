"""A few rows of the table of strategies, for a few steps; `make parity` has all of them."""

from __future__ import annotations

import parity
import pytest

STEPS = 3
NAMES = (
    "2 ranks, ZeRO 3, optimizer and parameters in a folder",
    "pipeline of 2 stages, ZeRO 1, recompute by block",
    "2 ranks, ZeRO 2, bf16 autocast",
)
ROWS = tuple(row for row in parity.ROWS if row.name in NAMES)


@pytest.fixture(scope="module")
def found():
    return parity.compare(ROWS, STEPS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_strategy_computes_the_training_of_the_plain_loop(found, row):
    assert not parity.breaks(row, found[row.name]), found[row.name]


def test_a_broken_row_would_be_seen():
    row = ROWS[0]
    fine = {"losses": 0.0, "weights": 0.0, "ema": 0.0, "buffers": 0.0}
    assert not parity.breaks(row, fine)
    assert all(parity.breaks(row, {**fine, kind: 2e-4}) for kind in fine)
