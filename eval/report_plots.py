"""Small rate-distortion plots for a page: SVG whose text can be read on a phone."""

import io
from collections.abc import Mapping
from typing import Any

from eval.curves import shown, shown_unit
from eval.metrics import METRICS, Metric
from eval.plots import styles
from eval.report_pages import data_uri

_SIZE_INCHES = (4.3, 4.0)
_POINTS_PER_INCH = 72


def plots(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one plot for each metric that has values: uri, alt, width and height in CSS pixels.

    Args:
        result: the content of rd.json; others have no plots.
    """
    codecs = result.get("codecs", [])
    found = [
        metric
        for metric in METRICS
        if any(point.get(metric.key) is not None for codec in codecs for point in codec["points"])
    ]
    name = result["dataset"]["name"]
    width, height = (round(96 * inches) for inches in _SIZE_INCHES)
    return [
        {
            "uri": data_uri(_draw(result, metric), "image/svg+xml"),
            "alt": f"{metric.label} against bits per pixel, {name}; the numbers are in the table below",
            "width": width,
            "height": height,
        }
        for metric in found
    ]


def _draw(result: Mapping[str, Any], metric: Metric) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "latent-codec", "font.size": 9.5, "text.parse_math": False}):
        figure = Figure(figsize=_SIZE_INCHES, dpi=_POINTS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
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
                linewidth=2.2 if style.strong else 1.3,
                markersize=6 if style.strong else 4.5,
                label=codec["label"],
                zorder=3 if style.strong else 2,
            )
            if codec.get("ceiling") and codec["ceiling"].get(metric.key) is not None:
                label, value = f"{codec['label']}, not quantised", shown(codec["ceiling"][metric.key], metric)
                axes.axhline(value, color=style.color, linestyle=(0, (6, 4)), linewidth=1, label=label, zorder=1)
        unit = "dB, −10 log10(1 − mean)" if metric.key == "ms_ssim" else shown_unit(metric)
        axes.set_title(f"{metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)", fontsize=10.5)
        axes.set_ylabel(unit)
        axes.set_xlabel("bits per pixel")
        axes.set_xlim(left=0)
        axes.grid(color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=2.8, fontsize=8.5)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()
