"""Bootstrap confidence intervals: how far a mean over images would move with other images of the same kind."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
N_RESAMPLES = 2000
FEW = 10
"""Of fewer values the percentile interval is much too narrow: of 2 it covers the mean half the time, of 5 four times in
five."""
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


def means(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the mean of each key over the rows where it is there and finite, and what goes with it.

    Args:
        rows: one per image.
        keys: of numbers, or None, in the rows.

    Returns:
        key -> mean, None where no row has it; and {"intervals": key -> (low, high) or None, "n_values": key -> rows
        that count}.
    """
    values = {key: [row[key] for row in rows if row[key] is not None and math.isfinite(row[key])] for key in keys}
    return (
        {key: statistics.fmean(found) if found else None for key, found in values.items()},
        {
            "intervals": {key: interval(found) for key, found in values.items()},
            "n_values": {key: len(found) for key, found in values.items()},
        },
    )
