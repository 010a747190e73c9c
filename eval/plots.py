"""Rate-distortion plots of a result of `eval.rd`: one PNG per metric, nothing drawn for a metric without values."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codec.files import write_atomic
from eval.curves import shown, shown_unit
from eval.metrics import METRICS, Metric

# Okabe & Ito's colour-blind safe palette: strong colours for models, the others for the classical codecs.
MODEL_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#000000", "D"))
BASELINE_STYLES = {
    "jpeg": ("#8C8C8C", "v"),
    "webp": ("#E69F00", "P"),
    "avif": ("#CC79A7", "X"),
    "jxl": ("#56B4E9", "d"),
}
FILE_STYLES = (("#7B5EA7", "<"), ("#A0522D", ">"), ("#4F7942", "h"), ("#B8860B", "p"))
PLAIN_TEXT = {"text.parse_math": False}
"""matplotlib settings: a dollar in a file's name is a dollar."""


@dataclass(frozen=True)
class Style:
    """How a codec is drawn.

    Attributes:
        color: as matplotlib takes it.
        marker: as matplotlib takes it.
        line: matplotlib's line style: models solid, classical codecs dashed, curves read from files dotted.
        strong: whether it stands out: a model's.
    """

    color: str
    marker: str
    line: str
    strong: bool


def styles(codecs: Sequence[Mapping[str, Any]]) -> list[Style]:
    """Return a style for each codec of rd.json: the same in every plot of a result."""
    found = []
    for index, codec in enumerate(codecs):
        earlier = sum(other["kind"] == codec["kind"] for other in codecs[:index])
        if codec["kind"] == "model":
            color, marker = MODEL_STYLES[earlier % len(MODEL_STYLES)]
        elif codec["kind"] == "baseline":
            color, marker = BASELINE_STYLES[codec["name"]]
        else:
            color, marker = FILE_STYLES[earlier % len(FILE_STYLES)]
        line = {"model": "-", "baseline": "--"}.get(codec["kind"], ":")
        found.append(Style(color, marker, line, codec["kind"] == "model"))
    return found


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
        if any(point.get(metric.key) is not None for codec in result["codecs"] for point in codec["points"]):
            write_atomic(path, _draw(result, metric))
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


def _draw(result: dict[str, Any], metric: Metric) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLAIN_TEXT):
        figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        draw_curves(axes, result, metric)
        direction = "higher is better" if metric.higher_is_better else "lower is better"
        unit = shown_as(metric)
        axes.set_ylabel(f"{metric.label} [{unit}]   ({direction})" if unit else f"{metric.label}   ({direction})")
        axes.set_xlabel("rate [bits per pixel, whole file]")
        axes.set_title(f"{metric.label}: {result['dataset']['name']}, {_images(result, metric)}")
        axes.legend(frameon=True, framealpha=0.9, edgecolor="none", handlelength=3.2)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _images(result: Mapping[str, Any], metric: Metric) -> str:
    """Say of how many images the means are: the fewest, where some have no value."""
    n_images = result["dataset"]["n_images"]
    points = [point for codec in result["codecs"] for point in codec["points"] if point.get(metric.key) is not None]
    fewest = min(point.get("n_values", {}).get(metric.key, n_images) for point in points)
    whole = f"{n_images} image{'s' if n_images != 1 else ''}"
    return f"mean of {whole}" if fewest == n_images else f"means of {fewest} to {whole}"


def shown_as(metric: Metric) -> str:
    """Return the unit of a metric's axis; "" without one."""
    return "dB, −10 log10(1 − mean)" if metric.key == "ms_ssim" else shown_unit(metric)


def draw_curves(axes: Any, result: Mapping[str, Any], metric: Metric, scale: float = 1.0) -> None:
    """Draw bpp against a metric for all codecs, and the ceilings of models, on a grid.

    Args:
        axes: of matplotlib.
        result: the content of rd.json.
        metric: one of its metrics.
        scale: of lines and markers; 1 = for a picture of its own.
    """
    for codec, style in zip(result["codecs"], styles(result["codecs"]), strict=True):
        there = [point for point in codec["points"] if point.get(metric.key) is not None]
        points = sorted((point["bpp"], shown(point[metric.key], metric)) for point in there)
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True),
            color=style.color,
            marker=style.marker,
            linestyle=style.line,
            linewidth=scale * (2.4 if style.strong else 1.5),
            markersize=scale * (7 if style.strong else 5.5),
            label=codec["label"],
            zorder=3 if style.strong else 2,
        )
        if codec.get("ceiling") and codec["ceiling"].get(metric.key) is not None:
            label = f"{codec['label']}, not quantised"
            value = shown(codec["ceiling"][metric.key], metric)
            axes.axhline(value, color=style.color, linestyle=(0, (6, 4)), linewidth=scale, label=label, zorder=1)
    axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
