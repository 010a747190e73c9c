"""Bootstrap confidence intervals: how far a mean over images would move with other images of the same kind."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
N_RESAMPLES = 2000
SETTINGS = f"percentile bootstrap of the mean over images, {N_RESAMPLES} resamples, level {LEVEL}, seed 0"


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the confidence interval of a mean (Efron 1979, percentile method); see SETTINGS.

    Args:
        values: one per image, finite.

    Returns:
        (low, high); None below two values, which say nothing about their spread.
    """
    if len(values) < 2:
        return None
    data = np.asarray(values, np.float64)
    rng = np.random.default_rng(0)  # the same resamples for every codec: their differences are paired
    means = data[rng.integers(0, len(data), (N_RESAMPLES, len(data)))].mean(axis=1) if len(data) <= 5000 else None
    if means is None:  # the matrix above would not fit
        means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(N_RESAMPLES)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
