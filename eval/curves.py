"""Rate-distortion curves against each other: BD-rate, the rate at equal metric, the metric at equal rate.

    codecs of rd.json -> Curve of each and metric -> compare -> "comparisons" of rd.json

Curves are interpolated by Akima splines between the metric and the logarithm of the rate, and never extrapolated.
Entry: `compare`. Must not import torch.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from codec.errors import UsageError
from eval.metrics import Metric

MIN_OVERLAP = 0.75  # of the two curves' range; below it a BD figure says little, as in the package `bjontegaard`
BPP_LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_N_LEVELS = 5  # about as many levels of a metric

SETTINGS = {
    "curves": "points sorted by bpp; Akima spline of log10(bpp) over the metric, never extrapolated",
    "bd_rate_percent": "bjontegaard bd_rate, akima: mean difference of rate at equal metric; negative saves bits",
    "bd_metric": "bjontegaard bd_psnr, akima: mean difference of the metric at equal rate, in the metric's unit",
    "overlap": "shared part of the range of both curves (of the metric for BD-rate, of log10 bpp for the metric)",
    "min_overlap": MIN_OVERLAP,
    "ms_ssim": "-10 log10(1 - mean), dB",
    "left_out": "points where the metric is not there, or infinite, for some of the images",
}


@dataclass(frozen=True)
class Curve:
    """One codec under one metric.

    Attributes:
        name: of the codec.
        bpp: (N,) rising.
        value: (N,) of the metric as it is shown, see `shown`.
        sign: 1 where higher is better, else -1.
        problem: why there is no rate for a value of the metric; "" where there is.
        rate_problem: why there is no value of the metric for a rate; "" where there is.
    """

    name: str
    bpp: np.ndarray
    value: np.ndarray
    sign: int
    problem: str
    rate_problem: str

    @classmethod
    def of(cls, codec: Mapping[str, Any], metric: Metric) -> "Curve":
        """Take the points of a codec of rd.json that have both a rate and this metric, of the same images."""
        pairs = [
            (point["bpp"], shown(point[metric.key], metric))
            for point in codec["points"]
            if point["bpp"] and point.get(metric.key) is not None and _of_all(point, metric.key)
        ]
        pairs = sorted(pair for pair in pairs if math.isfinite(pair[1]))
        bpp, value = (np.array(column) for column in zip(*pairs, strict=True)) if pairs else (np.empty(0), np.empty(0))
        sign = 1 if metric.higher_is_better else -1
        rate_problem = _rate_problem(bpp)
        return cls(codec["name"], bpp, value, sign, rate_problem or _problem(bpp, sign * value), rate_problem)

    @property
    def score(self) -> np.ndarray:
        """(N,) rising with quality: lower-is-better metrics negated."""
        return self.sign * self.value

    def bpp_at(self, value: float) -> float | None:
        """Return the rate at which the metric has this value; None outside what was measured."""
        found = _interpolated(self.score, np.log10(self.bpp), self.sign * value) if not self.problem else None
        return None if found is None else 10**found

    def value_at(self, bpp: float) -> float | None:
        """Return the metric at this rate; None outside what was measured."""
        return _interpolated(np.log10(self.bpp), self.value, float(np.log10(bpp))) if not self.rate_problem else None


def shown(value: float, metric: Metric) -> float:
    """Return a mean as plots and comparisons show it: MS-SSIM, which crowds at 1, in dB (nan where it is 1)."""
    if metric.key != "ms_ssim":
        return value
    return -10 * math.log10(1 - value) if value < 1 else math.nan


def shown_unit(metric: Metric) -> str:
    """Return the unit that goes with `shown`; "" without one."""
    return "dB" if metric.key == "ms_ssim" else metric.unit


def shown_digits(metric: Metric) -> int:
    """Return the digits after the decimal point that go with `shown`."""
    return 2 if metric.key == "ms_ssim" else metric.digits


def pick_anchor(codecs: Sequence[tuple[str, str]], asked: str | None) -> str | None:
    """Return the name of the codec that others are compared with.

    Args:
        codecs: name and kind ("model", "baseline", "file") of each.
        asked: by the user; None = "jpeg", else the first baseline, else the first codec.

    Returns:
        None where there is no codec.

    Raises:
        UsageError: no codec has the name that was asked for; the message gives the nearest.
    """
    names = [name for name, _ in codecs]
    if asked is not None:
        if asked not in names:
            near = difflib.get_close_matches(asked, names, n=1, cutoff=0)
            raise UsageError(f"--anchor: no codec {asked!r}, did you mean {near[0]!r}? Known: {', '.join(names)}")
        return asked
    baselines = [name for name, kind in codecs if kind == "baseline"]
    return "jpeg" if "jpeg" in baselines else next(iter([*baselines, *names]), None)


def compare(codecs: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], anchor: str | None) -> dict[str, Any]:
    """Compare every codec with every other.

    Args:
        codecs: of rd.json: "name" and "points".
        metrics: those to compare by; one that fewer than two codecs have is left out.
        anchor: the codec that the printed table compares with, see `pick_anchor`.

    Returns:
        {"anchor", "settings", "metrics": {key: {"bd": rows, "bpp_at_metric": table, "metric_at_bpp": table}}}; a row
        has codec, anchor, bd_rate_percent, overlap, bd_metric, overlap_bpp and reason (None where all is well); a table
        has levels and, for each codec, a value or None for each of them.
    """
    found = {}
    for metric in metrics:
        curves = [Curve.of(codec, metric) for codec in codecs]
        if sum(curve.bpp.size > 0 for curve in curves) < 2:
            continue
        rows = [bd(one, other) for one in curves for other in curves if one is not other]
        levels = metric_levels([_range(curve.value) for curve in curves if not curve.problem])
        rates = bpp_levels([_range(curve.bpp) for curve in curves if not curve.rate_problem])
        found[metric.key] = {
            "bd": rows,
            "bpp_at_metric": {
                "levels": levels,
                "codecs": {curve.name: [curve.bpp_at(level) for level in levels] for curve in curves},
            },
            "metric_at_bpp": {
                "levels": rates,
                "codecs": {curve.name: [curve.value_at(rate) for rate in rates] for curve in curves},
            },
        }
    return {"anchor": anchor, "settings": SETTINGS, "metrics": found}


def bd(anchor: Curve, test: Curve) -> dict[str, Any]:
    """Return the Bjontegaard differences of a codec against an anchor; see `compare` for the keys."""
    row: dict[str, Any] = {"codec": test.name, "anchor": anchor.name}
    row |= dict.fromkeys(("bd_rate_percent", "overlap", "bd_metric", "overlap_bpp", "reason"))
    for curve, prefix in ((anchor, f"{anchor.name}: "), (test, "")):
        if curve.rate_problem:
            return row | {"reason": prefix + curve.rate_problem}
    from bjontegaard import bd_psnr, bd_rate  # type: ignore[import-untyped]  # imports matplotlib

    row["overlap_bpp"] = overlap(np.log10(anchor.bpp), np.log10(test.bpp))
    how = {"method": "akima", "require_matching_points": False, "min_overlap": 0}  # the overlap is stated, see above
    points = (anchor.bpp, anchor.score, test.bpp, test.score)
    if row["overlap_bpp"]:
        row["bd_metric"] = test.sign * float(bd_psnr(*points, **how))
    for curve, prefix in ((anchor, f"{anchor.name}: "), (test, "")):
        if curve.problem:
            return row | {"reason": prefix + curve.problem}
    row["overlap"] = overlap(anchor.score, test.score)
    if row["overlap"]:
        row["bd_rate_percent"] = float(bd_rate(*points, **how))
    else:
        row["reason"] = "no value of the metric that both reach"
    if 0 < row["overlap"] < MIN_OVERLAP:
        row["reason"] = f"only {100 * row['overlap']:.0f} % of the metric's range is shared"
    return row


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of the range of both sets of values that both cover, 0 to 1."""
    shared = min(one.max(), other.max()) - max(one.min(), other.min())
    return max(0.0, float(shared / (max(one.max(), other.max()) - min(one.min(), other.min()))))


def metric_levels(ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Return about five round values of a metric between those that at least two curves reach.

    Args:
        ranges: lowest and highest value of each curve.
    """
    low, high = _shared(ranges)
    if not low < high:
        return []
    rough = (high - low) / _N_LEVELS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.99)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def bpp_levels(ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Return the levels of BPP_LEVELS between the rates that at least two curves reach; see `metric_levels`."""
    low, high = _shared(ranges)
    return [level for level in BPP_LEVELS if low <= level <= high]


def _shared(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the range outside of which at most one curve has values; that of a single curve as it is."""
    if not ranges:
        return math.inf, -math.inf
    lows, highs = sorted(low for low, _ in ranges), sorted((high for _, high in ranges), reverse=True)
    nth = min(1, len(ranges) - 1)
    return lows[nth], highs[nth]


def _of_all(point: Mapping[str, Any], key: str) -> bool:
    """Whether the metric is the mean of the images that the rate is of; a curve from a file does not say."""
    n_values = point.get("n_values")
    return n_values is None or n_values[key] == n_values["bpp"]


def _range(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _rate_problem(bpp: np.ndarray) -> str:
    if bpp.size < 2:
        return f"{bpp.size} point{'s' * (bpp.size != 1)}, expected at least 2"
    same = [rate for rate, following in pairwise(bpp) if not rate < following]
    return f"two points at {same[0]:.3f} bpp" if same else ""


def _problem(bpp: np.ndarray, score: np.ndarray) -> str:
    for k in range(bpp.size - 1):
        if not score[k] < score[k + 1]:
            return f"the metric is no better at {bpp[k + 1]:.3f} than at {bpp[k]:.3f} bpp"
    return ""


def _interpolated(x: np.ndarray, y: np.ndarray, at: float) -> float | None:
    """Return y at `at` of the curve through (x, y), x rising; None outside of it."""
    from scipy.interpolate import Akima1DInterpolator  # type: ignore[import-untyped]

    if not x[0] <= at <= x[-1]:
        return None
    if x.size == 2:
        return float(np.interp(at, x, y))
    return float(Akima1DInterpolator(x, y)(at))
