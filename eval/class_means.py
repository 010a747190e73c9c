"""Means over classes of shares, and medians, with bootstrap intervals. Imports neither torch nor diffusers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.bootstrap import LEVEL, N_RESAMPLES

SETTINGS = (
    f"percentile bootstrap, {N_RESAMPLES} resamples, level {LEVEL}, seed 0; of a mean over classes within each class"
)

Counts = Mapping[str, tuple[int, int]]
"""class -> (how many hit, of how many)."""


def class_mean(counts: Counts) -> dict[str, Any]:
    """Return the mean over classes of the shares that hit, as {"value", "interval"}."""
    return {"value": _mean(counts), "interval": _ends(_resampled(counts, 0))}


def class_mean_ratio(counts: Counts, of: Counts) -> dict[str, Any]:
    """Return the ratio of two such means of different images, as {"value", "interval"}; None where the second is 0."""
    below = _mean(of)
    if below == 0:
        return {"value": None, "interval": None}
    ratios = _resampled(counts, 0) / np.maximum(_resampled(of, 1), 1e-12)
    return {"value": _mean(counts) / below, "interval": _ends(ratios)}


def median(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of at least one value, as {"value", "interval"}."""
    return {"value": float(np.median(values)), "interval": _ends(_medians(values, 0))}


def median_ratio(values: Sequence[float], of: Sequence[float]) -> dict[str, Any]:
    """Return the ratio of the medians of two sets, as {"value", "interval"}; None where the second is 0."""
    below = float(np.median(of))
    if below == 0:
        return {"value": None, "interval": None}
    ratios = _medians(values, 0) / np.maximum(_medians(of, 1), 1e-12)
    return {"value": float(np.median(values)) / below, "interval": _ends(ratios)}


def _mean(counts: Counts) -> float:
    return float(np.mean([hit / n for hit, n in counts.values()]))


def _resampled(counts: Counts, seed: int) -> np.ndarray:
    """Return the mean in each resample: drawing n of n with replacement hits as often as a binomial number."""
    rng = np.random.default_rng(seed)
    found: np.ndarray = np.mean([rng.binomial(n, hit / n, N_RESAMPLES) / n for hit, n in counts.values()], axis=0)
    return found


def _medians(values: Sequence[float], seed: int) -> np.ndarray:
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    found: np.ndarray = np.median(data[rng.integers(0, len(data), (N_RESAMPLES, len(data)))], axis=1)
    return found


def _ends(found: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
