"""Small rate-distortion plots for a page: SVG whose text can be read on a phone."""

import io
from collections.abc import Mapping
from typing import Any

from eval.metrics import METRICS, Metric
from eval.plots import PLAIN_TEXT, draw_curves, shown_as
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

    with mpl.rc_context({**PLAIN_TEXT, "svg.hashsalt": "latent-codec", "font.size": 9.5}):
        figure = Figure(figsize=_SIZE_INCHES, dpi=_POINTS_PER_INCH, layout="constrained")
        axes = figure.add_subplot()
        draw_curves(axes, result, metric, scale=0.88)
        axes.set_title(f"{metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)", fontsize=10.5)
        axes.set_ylabel(shown_as(metric))
        axes.set_xlabel("bits per pixel")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=2.8, fontsize=8.5)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()
