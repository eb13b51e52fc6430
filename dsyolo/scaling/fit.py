"""How the time of a step grows with the ranks, fitted to what was measured, and what that says of more ranks.

Weak scaling (each rank's work stays): t(n) = a + b (n - 1) / n + d log2 n. A ring sends (n - 1) / n of the gradients twice
(Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms"); what goes by steps of a tree, and waiting for the
slowest rank, grows about as log2 n (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
operations in MPICH"). Strong scaling (the step's work stays): t(n) = s + p / n + d log2 n, Amdahl's law (1967) with a term
for communication; a ring's (n - 1) / n = 1 - 1 / n cannot be told from s and p there, and is in them.

No coefficient is negative. Uncertainty: the measured rounds and the steps in them are drawn again with replacement, 300
times, and fitted again; the band is from the 5th to the 95th percentile. It holds what the measurement leaves open, not
what is different at sizes that were not measured: slower links between machines, another algorithm of the library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from dsyolo.scaling.cases import STRONG, WEAK

SIZES = tuple(2**power for power in range(1, 11))
DRAWS, SEED, BAND = 300, 0, (5, 95)
MISSED = 0.05  # of a measured time, beyond which the reader is told
FAR = 4  # times the largest measured size: beyond it a prediction is called a guess

TERMS = {
    WEAK: {
        "a": lambda n: np.ones_like(n),
        "b": lambda n: (n - 1) / n,
        "d": np.log2,
    },
    STRONG: {
        "s": lambda n: np.ones_like(n),
        "p": lambda n: 1 / n,
        "d": np.log2,
    },
}
FORMULAS = {WEAK: "t(n) = a + b (n - 1) / n + d log2 n", STRONG: "t(n) = s + p / n + d log2 n"}
# Of two sizes only one term beside the first can be found: each of these explains all of the growth by itself.
PAIRS = {WEAK: (("a", "b"), ("a", "d")), STRONG: (("s", "p"), ("p", "d"))}


class Prediction(NamedTuple):
    """Of the efficiency at a size; 1 is that of the smallest measured one."""

    ranks: int
    efficiency: float
    low: float
    high: float


class Fit(NamedTuple):
    """Of one strategy under one scaling.

    Attributes:
        coefficients: seconds, of the formula; empty where nothing was fitted.
        says: what the fit can tell and what it cannot.
    """

    formula: str
    coefficients: dict[str, float]
    predictions: list[Prediction]
    says: str


def fit(scaling: str, measured: Mapping[int, Sequence[Sequence[float]]]) -> Fit:
    """Args:
    measured: by number of ranks the rounds, each of them the seconds of its steps.
    """
    sizes = sorted(measured)
    formula = FORMULAS[scaling]
    if len(sizes) < 2:
        return Fit(formula, {}, [], "One size was measured: that says nothing of others.")
    models = [tuple(TERMS[scaling])] if len(sizes) > 2 else list(PAIRS[scaling])
    n = np.array(sizes, float)
    medians = np.array([np.median(np.concatenate(measured[size])) for size in sizes])
    rng = np.random.default_rng(SEED)
    drawn = [[np.median(_again(measured[size], rng)) for size in sizes] for _ in range(DRAWS)]
    wanted = np.array(SIZES, float)
    central, clouds = [], []
    for names in models:
        central.append(solve(scaling, names, n, medians))
        clouds += [
            efficiency(scaling, solve(scaling, names, n, np.array(one)), wanted, sizes[0]) for one in drawn
        ]
    lows, highs = np.percentile(np.array(clouds), BAND, axis=0)
    middles = np.mean([efficiency(scaling, one, wanted, sizes[0]) for one in central], axis=0)
    predictions = [
        Prediction(int(size), *map(float, (middle, min(low, middle), max(high, middle))))
        for size, middle, low, high in zip(SIZES, middles, lows, highs, strict=True)
    ]
    missed = max(float(np.abs(step_seconds(scaling, one, n) / medians - 1).max()) for one in central)
    says = _words(sizes, scaling, central) + (
        f" It misses what was measured by {missed:.0%}: no time of this form fits it."
        if missed > MISSED
        else ""
    )
    return Fit(formula, central[0] if len(models) == 1 else {}, predictions, says)


def solve(scaling: str, names: Sequence[str], n: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """Least squares of relative errors with coefficients that are not negative: the best of all subsets of the terms."""
    columns = {name: TERMS[scaling][name](n) / seconds for name in names}
    best: tuple[float, dict[str, float]] = (np.inf, {})
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            matrix = np.stack([columns[name] for name in chosen], 1)
            values, *_ = np.linalg.lstsq(matrix, np.ones(len(n)), rcond=None)
            error = float(np.square(matrix @ values - 1).sum())
            if (values >= 0).all() and error < best[0] - 1e-12:
                best = error, dict(zip(chosen, values.tolist(), strict=True))
    return {name: best[1].get(name, 0.0) for name in names}


def step_seconds(scaling: str, coefficients: Mapping[str, float], n: np.ndarray) -> np.ndarray:
    """What the formula gives."""
    return sum(value * TERMS[scaling][name](n) for name, value in coefficients.items())  # type: ignore[return-value]


def efficiency(scaling: str, coefficients: Mapping[str, float], n: np.ndarray, smallest: int) -> np.ndarray:
    """Of n ranks, against the smallest measured size."""
    first = step_seconds(scaling, coefficients, np.array([float(smallest)]))[0]
    ratio = first / step_seconds(scaling, coefficients, n)
    return ratio if scaling == WEAK else ratio * smallest / n


def _again(rounds: Sequence[Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    chosen = rng.integers(len(rounds), size=len(rounds))
    return np.concatenate([rng.choice(rounds[i], size=len(rounds[i])) for i in chosen])


def _words(sizes: Sequence[int], scaling: str, central: Sequence[Mapping[str, float]]) -> str:
    limit = FAR * sizes[-1]
    if len(sizes) == 2:
        what = (
            "(n - 1) / n, as a ring's bytes do, or as log2 n, as latency and waiting do"
            if scaling == WEAK
            else "Amdahl's serial part does, or as log2 n, as latency and waiting do"
        )
        return (
            f"Two sizes show that a step's time changes, not how: as {what}. The band holds both, "
            f"and the figure is their mean. Beyond {limit} ranks take it for a guess, and measure a third size."
        )
    spare = len(sizes) - len(TERMS[scaling])
    checked = (
        "As many sizes as coefficients: the formula itself is not tested by them. "
        if spare <= 0
        else f"{spare} more size{'s' if spare > 1 else ''} than coefficients. "
    )
    return f"{checked}Beyond {limit} ranks take it for a guess: sizes like these were not measured."
