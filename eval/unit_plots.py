"""Pictures of the units of a head, or of a codec's latents, and of their priors, as PNGs. Must not import torch."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.plots import MODEL_STYLES, PLAIN_TEXT

_SHOWN = 2000  # points of a kind
_NAMED = 64  # units whose number stands below their bar, at most
_GREY = "#8C8C8C"


def bars(levels: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> bytes:
    """Return a PNG: a value of each unit as a bar, the largest first, of collapsed units in grey.

    Args:
        levels: of each a title, what is drawn, (U,) values, and (U,) bool: collapsed.
    """

    def draw(figure: Any) -> None:
        of = figure.subplots(len(levels), 1, squeeze=False)[:, 0]
        for axes, (title, what, values, collapsed) in zip(of, levels, strict=True):
            order = np.argsort(-values, kind="stable")
            colours = [_GREY if collapsed[n] else MODEL_STYLES[0][0] for n in order]
            axes.bar(np.arange(len(order)), values[order], color=colours, width=0.9)
            few = len(order) <= _NAMED
            axes.set_xticks(np.arange(len(order)) if few else [], [str(n) for n in order] if few else [], fontsize=7)
            axes.set_xlabel("unit" if few else "units, the largest first")
            axes.set_ylabel(what)
            _finish(axes, title)

    return _png(draw, (7.5, 3.2 * len(levels)))


def clouds(held_out: np.ndarray, drawn: Sequence[tuple[str, np.ndarray]], what: str) -> bytes:
    """Return a PNG: what is held out and what priors draw, in the plane of the two directions of most variance.

    Args:
        held_out: (N, d) draws of the aggregate posterior, d >= 2; the plane is theirs.
        drawn: of each prior a name and draws (M, d).
        what: vectors are: "units", "latents".
    """
    mean = held_out.mean(0)
    axes_of = np.linalg.svd(held_out - mean, full_matrices=False)[2][:2]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        kinds = [("held out", held_out, _GREY, 3)]
        kinds += [(name, points, MODEL_STYLES[n][0], 2) for n, (name, points) in enumerate(drawn)]
        for name, points, colour, order in kinds:
            flat = (points[:_SHOWN] - mean) @ axes_of.T
            axes.scatter(*flat.T, s=6, color=colour, alpha=0.5, linewidths=0, label=name, zorder=order)
        axes.set_xlabel(f"first principal component of the {what}")
        axes.set_ylabel("second")
        axes.legend(frameon=False, markerscale=3)
        _finish(axes, f"{what}, and what priors draw")

    return _png(draw, (6, 5))


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _png(draw: Any, size: tuple[float, float]) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLAIN_TEXT):
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()
