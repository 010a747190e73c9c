"""Rate-distortion plots of a result of `eval.rd`: one PNG per metric, nothing drawn for a metric without values."""

import io
import math
from pathlib import Path
from typing import Any

from codec.files import write_atomic
from eval.metrics import METRICS, Metric

# Okabe & Ito's colour-blind safe palette: strong colours for models, the others for the classical codecs.
MODEL_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#000000", "D"))
BASELINE_STYLES = {
    "jpeg": ("#8C8C8C", "v"),
    "webp": ("#E69F00", "P"),
    "avif": ("#CC79A7", "X"),
    "jxl": ("#56B4E9", "d"),
}


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw bpp against every metric that has values.

    Args:
        result: the content of rd.json.
        folder: gets rd_<metric>.png, overwritten atomically; that of a metric without values is removed.

    Returns:
        The files written; none if the result has no points.
    """
    written = []
    for metric in METRICS:
        path = folder / f"rd_{metric.key}.png"
        if any(point[metric.key] is not None for codec in result["codecs"] for point in codec["points"]):
            write_atomic(path, _draw(result, metric))
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def _draw(result: dict[str, Any], metric: Metric) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    models = [codec for codec in result["codecs"] if codec["kind"] == "model"]
    for codec in result["codecs"]:
        is_model = codec["kind"] == "model"
        if is_model:
            color, marker = MODEL_STYLES[models.index(codec) % len(MODEL_STYLES)]
        else:
            color, marker = BASELINE_STYLES[codec["name"]]
        points = [(p["bpp"], _shown(p[metric.key], metric)) for p in codec["points"] if p[metric.key] is not None]
        axes.plot(
            *zip(*sorted(points), strict=True) if points else ((), ()),
            color=color,
            marker=marker,
            linestyle="-" if is_model else "--",
            linewidth=2.4 if is_model else 1.5,
            markersize=7 if is_model else 5.5,
            label=codec["label"],
            zorder=3 if is_model else 2,
        )
        if codec["ceiling"] and codec["ceiling"][metric.key] is not None:
            label = f"{codec['label']}, not quantised"
            value = _shown(codec["ceiling"][metric.key], metric)
            axes.axhline(value, color=color, linestyle=(0, (6, 4)), linewidth=1, label=label, zorder=1)
    direction = "higher is better" if metric.higher_is_better else "lower is better"
    unit = "dB, −10 log10(1 − mean)" if metric.key == "ms_ssim" else metric.unit
    axes.set_ylabel(f"{metric.label} [{unit}]   ({direction})" if unit else f"{metric.label}   ({direction})")
    axes.set_xlabel("rate [bits per pixel, whole file]")
    dataset = result["dataset"]
    n_images = dataset["n_images"]
    axes.set_title(f"{metric.label}: {dataset['name']}, mean of {n_images} image{'s' if n_images != 1 else ''}")
    axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", handlelength=3.2)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _shown(value: float, metric: Metric) -> float:
    """MS-SSIM crowds at 1, so plots show it in dB, of the mean as in the literature; nan where it is 1."""
    if metric.key != "ms_ssim":
        return value
    return -10 * math.log10(1 - value) if value < 1 else math.nan
