"""The pictures of a report: which images, and each through every codec at equal file size.

rows of a result -> worst images of the first codec, and some at even distances -> re-encoded -> Shown
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codec.console import progress, stderr
from eval.baselines import Baseline
from eval.crops import busiest
from eval.equal_size import Coded, at_equal_size
from eval.metrics import KNOWN, METRICS, Metric
from eval.rd import Model

N_WORST = 10
MAX_SIDE = 1024  # pixels; larger images are cut out, so that a report of photographs fits into memory
# What decides which images are worst: the first of these that the result has. No metric that models are trained on.
JUDGES = ("ssimulacra2", "ms_ssim", "ssim", "psnr")


@dataclass(frozen=True)
class Variant:
    """One picture of an image.

    Attributes:
        label: the codec, or "original".
        caption: quality, bytes, bpp, metrics.
        pixels: (H, W, 3) uint8.
    """

    label: str
    caption: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Shown:
    """One image of a report.

    Attributes:
        name: of the image.
        why: it was chosen.
        size: width and height of the whole image, in pixels.
        variants: the original first; all cut out at one place.
    """

    name: str
    why: str
    size: tuple[int, int]
    variants: Sequence[Variant]


@dataclass(frozen=True)
class Worst:
    """The worst images of one codec.

    Attributes:
        codec: its label.
        quality: of the rows; None where there is no quality.
        metric: what they are ordered by.
        rows: of the result, worst first.
    """

    codec: str
    quality: int | None
    metric: Metric
    rows: Sequence[Mapping[str, Any]]


def worst(entry: Mapping[str, Any], bpp: float | None = None, n: int = N_WORST) -> Worst | None:
    """Return the n worst images of one codec of a result, at the quality whose mean rate is nearest to `bpp`.

    Args:
        entry: one of result["codecs"]: label, points, rows.
        bpp: bits per pixel; None where rows have no quality.
        n: images at most.

    Returns:
        None if no row has a value of any metric that judges.
    """
    rows, quality = list(entry["rows"]), None
    if bpp is not None:
        points = [point for point in entry["points"] if point["bpp"] is not None]
        if not points:
            return None
        quality = min(points, key=lambda point: abs(point["bpp"] - bpp))["quality"]
        rows = [row for row in rows if row["quality"] == quality]
    for key in JUDGES:
        valued = [row for row in rows if row.get(key) is not None]
        if valued:
            sign = 1 if KNOWN[key].higher_is_better else -1
            ordered = sorted(valued, key=lambda row: (sign * row[key], row["image"]))
            return Worst(entry["label"], quality, KNOWN[key], ordered[:n])
    return None


def choose(names: Sequence[str], found: Worst | None, n: int) -> dict[str, str]:
    """Return which images to show, at most n, and why: the worst first, then others at even distances.

    Args:
        names: of all images that were measured.
        found: the worst ones; None = only others.
        n: how many; of those beyond ten, the rest are not the worst.
    """
    chosen: dict[str, str] = {}
    for rank, row in enumerate(found.rows[: min(n, N_WORST)] if found else (), 1):
        at = "" if found is None or found.quality is None else f" at quality {found.quality}"
        label, codec = (found.metric.label, found.codec) if found else ("", "")
        chosen[row["image"]] = f"worst no. {rank} of {len(names)} images by {label} of {codec}{at}"
    rest = [name for name in names if name not in chosen]
    count = min(n - len(chosen), len(rest))
    for index in range(count):
        chosen[rest[(2 * index + 1) * len(rest) // (2 * count)]] = "chosen at even distances"
    return chosen


def encode(
    chosen: Mapping[str, str],
    load: Callable[[str], np.ndarray],
    models: Sequence[Model],
    baselines: Sequence[Baseline],
    bpp: float,
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float | None]],
) -> list[Shown]:
    """Re-encode images with every codec at nearly the size that the first codec has near `bpp`.

    Args:
        chosen: name -> why, see `choose`.
        load: name -> (H, W, 3) uint8, the reference.
        models: as in the run.
        baselines: as in the run.
        bpp: bits per pixel to aim at.
        metrics: of the whole image, for the captions.
    """
    shown = []
    with progress(disable=not stderr.is_terminal) as bar:
        for name in bar.track(chosen, description="pictures"):
            x = load(name)
            coded = at_equal_size(x, models, baselines, bpp)
            pairs = [(item.codec, _caption(item, metrics(x, item.pixels)), item.pixels) for item in coded]
            shown.append(of_pairs(name, chosen[name], x, pairs))
    return shown


def of_pairs(name: str, why: str, x: np.ndarray, pairs: Sequence[tuple[str, str, np.ndarray]]) -> Shown:
    """Return one image of a report, cut out where it is large.

    Args:
        name: of the image.
        why: it was chosen.
        x: the reference, (H, W, 3) uint8.
        pairs: label, caption and pixels of each reconstruction.
    """
    height, width = min(MAX_SIDE, x.shape[0]), min(MAX_SIDE, x.shape[1])
    top, left = busiest(x, height, width)
    original = f"{x.shape[1]} x {x.shape[0]} pixels"
    variants = [
        Variant(label, caption, np.ascontiguousarray(pixels[top : top + height, left : left + width]))
        for label, caption, pixels in [("original", original, x), *pairs]
    ]
    return Shown(name, why, (x.shape[1], x.shape[0]), variants)


def numbers(values: Mapping[str, float | None]) -> str:
    """Return the metrics that have a value, as text: `PSNR 27.31 dB, MS-SSIM 0.9512`."""
    parts = []
    for metric in METRICS:
        value = values.get(metric.key)
        if value is not None:
            unit = f" {metric.unit}" if metric.unit and value != float("inf") else ""
            parts.append(f"{metric.label} {value:.{metric.digits}f}{unit}")
    return ", ".join(parts)


def _caption(coded: Coded, values: Mapping[str, float | None]) -> str:
    at = "" if coded.quality is None else f"quality {coded.quality}, "
    size = f"{at}{coded.size_bytes} bytes, {coded.bpp:.3f} bpp"
    return ", ".join(filter(None, (size, numbers(values))))
