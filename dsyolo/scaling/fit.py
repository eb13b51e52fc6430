"""Fit the growth of a step's time with the number of ranks, and predict the efficiency on more ranks.

Weak scaling (each rank's work stays): t(n) = a + b (n - 1) / n + d log2 n. A ring sends (n - 1) / n of the gradients twice
(Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms"); what goes by steps of a tree, and waiting for the
slowest rank, grows about as log2 n (Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication
operations in MPICH"). Strong scaling (the step's work stays): t(n) = s + p / n + d log2 n, Amdahl's law (1967) with a term
for communication; a ring's (n - 1) / n = 1 - 1 / n is contained in s and p there.

No coefficient is negative. Uncertainty: the measured rounds and the steps in them are drawn again with replacement, 300
times, and fitted again; the band is from the 5th to the 95th percentile. It covers the
noise of the measurement, not what differs at other sizes: slower links between machines, other algorithms.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from dsyolo.scaling.cases import STRONG, WEAK

SIZES = tuple(2**power for power in range(1, 11))
DRAWS, SEED, BAND = 300, 0, (5, 95)
MISFIT = 0.05  # share of a measured time: the report warns beyond it
FAR = 4  # times the largest measured size: a prediction beyond it is called a guess

TERMS: dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    WEAK: {"a": np.ones_like, "b": lambda n: (n - 1) / n, "d": np.log2},
    STRONG: {"s": np.ones_like, "p": lambda n: 1 / n, "d": np.log2},
}
FORMULAS = {WEAK: "t(n) = a + b (n - 1) / n + d log2 n", STRONG: "t(n) = s + p / n + d log2 n"}
# Two sizes determine two terms: each of these pairs explains all of the growth.
PAIRS = {WEAK: (("a", "b"), ("a", "d")), STRONG: (("s", "p"), ("p", "d"))}


class Prediction(NamedTuple):
    """The predicted efficiency at a size; the smallest measured one has 1."""

    ranks: int
    efficiency: float
    low: float
    high: float


class Fit(NamedTuple):
    """The fit of one strategy under one scaling."""

    formula: str
    coefficients: dict[str, float]  # the formula's, in seconds; empty where nothing was fitted
    predictions: list[Prediction]
    reliability: str  # how far to trust the predictions


def fit(scaling: str, measured: Mapping[int, Sequence[Sequence[float]]]) -> Fit:
    """Return the fit of what was measured: by number of ranks the rounds, each the seconds of its steps."""
    sizes, formula = sorted(measured), FORMULAS[scaling]
    if len(sizes) < 2:
        return Fit(formula, {}, [], "One measured size gives no prediction.")
    models = [tuple(TERMS[scaling])] if len(sizes) > 2 else list(PAIRS[scaling])
    n, wanted = np.array(sizes, float), np.array(SIZES, float)
    medians = np.array([np.median(np.concatenate(measured[size])) for size in sizes])
    rng = np.random.default_rng(SEED)
    drawn = np.array([[np.median(_resample(measured[size], rng)) for size in sizes] for _ in range(DRAWS)])
    central = [solve(scaling, names, n, medians) for names in models]
    clouds = [solve(scaling, names, n, seconds) for names in models for seconds in drawn]
    middles = np.mean([efficiency(scaling, one, wanted, sizes[0]) for one in central], axis=0)
    lows, highs = np.percentile([efficiency(scaling, one, wanted, sizes[0]) for one in clouds], BAND, axis=0)
    band = zip(middles, np.minimum(lows, middles), np.maximum(highs, middles), strict=True)
    predictions = [Prediction(size, *map(float, one)) for size, one in zip(SIZES, band, strict=True)]
    text = _reliability(sizes, scaling)
    misfit = max(float(np.abs(step_seconds(scaling, one, n) / medians - 1).max()) for one in central)
    if misfit > MISFIT:
        text += f" The formula misses the measured times by {misfit:.0%}."
    return Fit(formula, central[0] if len(models) == 1 else {}, predictions, text)


def solve(scaling: str, names: Sequence[str], n: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """Return non-negative coefficients of least squared relative errors: the best over all subsets of the terms."""
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
    """Return the formula's seconds for each number of ranks in n."""
    return sum((value * TERMS[scaling][name](n) for name, value in coefficients.items()), np.zeros_like(n))


def efficiency(scaling: str, coefficients: Mapping[str, float], n: np.ndarray, smallest: int) -> np.ndarray:
    """Return the efficiency on n ranks relative to the smallest measured size."""
    first = step_seconds(scaling, coefficients, np.array([float(smallest)]))[0]
    ratio = first / step_seconds(scaling, coefficients, n)
    return ratio if scaling == WEAK else ratio * smallest / n


def _resample(rounds: Sequence[Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    chosen = rng.integers(len(rounds), size=len(rounds))
    return np.concatenate([rng.choice(rounds[i], size=len(rounds[i])) for i in chosen])


def _reliability(sizes: Sequence[int], scaling: str) -> str:
    limit = FAR * sizes[-1]
    if len(sizes) == 2:
        first = "(n - 1) / n, as a ring's bytes do" if scaling == WEAK else "Amdahl's law says"
        return (
            f"From two sizes a step's time may grow as {first}, or as log2 n, as latency and waiting do: the band "
            f"holds both, the figure is their mean. Beyond {limit} ranks it is a guess: measure a third size."
        )
    spare = len(sizes) - len(TERMS[scaling])
    tested = f"{spare} more size{'s' if spare > 1 else ''} than coefficients."
    if spare == 0:
        tested = "There are as many coefficients as sizes, so the formula itself is not tested."
    return f"{tested} Beyond {limit} ranks it is a guess, as no such size was measured."
