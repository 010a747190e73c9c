"""Intervals of statistics of sets of images, and of their differences. Imports neither torch nor diffusers.

A jackknife leaves out one group of images at a time: a bootstrap would draw images twice, which a distance of sets and
neighbourhoods take for a property of the set. Two statistics with the same groups are compared by their differences
group by group, so that what both have in common cancels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

N_GROUPS = 20
SETTINGS = (
    f"interval: 1.96 standard errors of a jackknife over {N_GROUPS} groups of images (every {N_GROUPS}th), left out of "
    "all sets at once; of the images alone, not of another training run"
)

Score = dict[str, Any]
"""{"value": float, "interval": (low, high), "groups": the values without each group}."""


def jackknife(
    statistics: Callable[..., Mapping[str, float]], sets: Sequence[np.ndarray], n_groups: int = N_GROUPS
) -> dict[str, Score]:
    """Return statistics of sets, with intervals by leaving out groups of members (Quenouille 1956, Tukey 1958).

    Args:
        statistics: of one array per set, whose first axis is its members.
        sets: group g holds the members g, g + n_groups, ... of each.
        n_groups: at most as many as the smallest set has members.
    """
    n_groups = min(n_groups, *map(len, sets))
    whole = statistics(*sets)
    without: dict[str, list[float]] = {key: [] for key in whole}
    for group in range(n_groups):
        kept = [members[np.arange(len(members)) % n_groups != group] for members in sets]
        for key, value in statistics(*kept).items():
            without[key].append(value)
    return {key: _scored(value, without[key]) for key, value in whole.items()}


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Score | None:
    """Return a - b of two scores of the same groups, as a score; None where a result does not hold all groups."""
    if len(a["groups"]) != len(b["groups"]) or None in [*a["groups"], *b["groups"], a["value"], b["value"]]:
        return None
    groups = [one - other for one, other in zip(a["groups"], b["groups"], strict=True)]
    return _scored(a["value"] - b["value"], groups)


def beyond(found: Mapping[str, Any]) -> bool:
    """Whether a difference's interval leaves out 0."""
    low, high = found["interval"]
    return bool(low > 0 or high < 0)


def _scored(value: float, groups: Sequence[float]) -> Score:
    n = len(groups)
    error = float(np.sqrt((n - 1) * np.var(groups))) if n > 1 else float("nan")
    return {"value": value, "interval": (value - 1.96 * error, value + 1.96 * error), "groups": list(groups)}
