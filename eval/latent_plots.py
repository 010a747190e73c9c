"""Pictures of a result of `eval.latents`: one PNG per question."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codec.files import write_atomic

if TYPE_CHECKING:
    from eval.latent_measure import Example

# Okabe & Ito's colour-blind safe palette.
_BLUE, _RED, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
_MAX_CHANNELS_SHOWN = 16


def plot(result: dict[str, Any], example: "Example | None", folder: Path) -> list[Path]:
    """Draw every picture.

    Args:
        result: of `eval.latents.run_latents`, with its sections.
        example: the first image; None draws no picture of latents.
        folder: gets latents_<name>.png, overwritten atomically.

    Returns:
        The files written.
    """
    drawers: dict[str, Callable[[dict[str, Any], Any], None]] = {
        "channels": _channels,
        "pca": _pca,
        "correlation": _correlation,
        "spectrum": _spectrum,
        "noise": _noise,
        "equivariance": _equivariance,
        "locality": _locality,
        "drift": _drift,
        "grid": _grid,
        "fp16": _fp16,
    }
    written = []
    for name, draw in drawers.items():
        written.append(_write(folder / f"latents_{name}.png", partial(draw, result)))
    if example is not None:
        written.append(_write(folder / "latents_example.png", partial(_example, example), _example_size(example)))
    return written


def _write(path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7.5, 5)) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_atomic(path, file.getvalue())
    return path


def _axes(figure: Any, title: str, x: str, y: str, place: tuple[int, int, int] = (1, 1, 1)) -> Any:
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _numbers(values: Any) -> np.ndarray:
    """Turn a list of numbers and None into an array with NaN, which matplotlib leaves out."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _channels(result: dict[str, Any], figure: Any) -> None:
    rows = result["channels"]
    channel = np.arange(len(rows))
    has_kl = rows[0]["kl_nats"] is not None
    of = figure.subplots(2 if has_kl else 1, 1, squeeze=False)[:, 0]
    mean, std = _numbers(row["mean"] for row in rows), _numbers(row["std"] for row in rows)
    of[0].errorbar(channel, mean, yerr=std, fmt="o", color=_BLUE, capsize=3, label="mean ± std over data")
    if has_kl:
        noise = _numbers(row["posterior_std"] for row in rows)
        of[0].errorbar(channel + 0.2, mean, yerr=noise, fmt="none", ecolor=_RED, capsize=3, label="± posterior std")
        colours = [_GREY if row["collapsed"] else _GREEN for row in rows]
        of[1].bar(channel, _numbers(row["kl_nats"] for row in rows), color=colours)
        of[1].set_ylabel("KL [nats / position]")
        of[1].set_title(f"{result['posterior']['verdict']}; collapsed channels in grey", fontsize=10)
    of[0].set_ylabel("raw latent")
    of[0].legend(fontsize=8)
    of[-1].set_xlabel("channel")
    for axes in of:
        axes.set_xticks(channel[:: max(1, len(channel) // 16)])
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)


def _pca(result: dict[str, Any], figure: Any) -> None:
    found = result["aggregate"]["pca"]
    points = np.array(found["points"], dtype=float)
    if points.shape[1] < 2:  # one channel: against nothing
        points = np.column_stack([points[:, 0], np.zeros(len(points))])
    explained = [*found["explained"], 0.0]
    title = "Positions of all images against N(0, I): two first principal components, normalized latents"
    axes = _axes(figure, title, f"first ({explained[0]:.0%} of variance)", f"second ({explained[1]:.0%})")
    prior = np.random.default_rng(0).standard_normal((len(points), 2))
    axes.scatter(*prior.T, s=5, color=_GREY, alpha=0.5, linewidths=0, label="prior N(0, I)")
    axes.scatter(*points.T, s=5, color=_BLUE, alpha=0.5, linewidths=0, label="aggregate posterior")
    angle = np.linspace(0, 2 * np.pi, 200)
    axes.plot(
        2 * np.cos(angle), 2 * np.sin(angle), color="black", linewidth=1, linestyle="--", label="2 σ of the prior"
    )
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=8, loc="upper right", markerscale=3)


def _correlation(result: dict[str, Any], figure: Any) -> None:
    found = result["correlation"]
    matrix = np.array(found["matrix"], dtype=float)
    axes = figure.add_subplot()
    shown = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(shown, ax=axes, label="correlation")
    largest = (
        "" if found["largest"] is None else f"largest beside the diagonal {found['largest']:+.2f} {found['pair']}, "
    )
    axes.set_title(f"{largest}effective rank {found['effective_rank']:.2f} of {len(matrix)}", fontsize=10)
    axes.set_xlabel("channel")
    axes.set_ylabel("channel")
    if len(matrix) <= 10:
        for row, column in np.ndindex(*matrix.shape):
            colour = "white" if abs(matrix[row, column]) > 0.6 else "black"
            axes.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _spectrum(result: dict[str, Any], figure: Any) -> None:
    found, f = result["spectrum"], result["model"]["f"]
    title = "Power spectrum, radially averaged, each scaled to the same energy on the latent grid"
    axes = _axes(figure, title, "frequency [cycles per latent cell]", "power")
    n = len(found["latent"]["power"])
    for name, label, colour, style in (
        ("image", "image, all its pixels", _GREY, ":"),
        ("image_on_grid", "image averaged onto the latent grid", "black", "--"),
        ("latent", "latents", _BLUE, "-"),
    ):
        power = np.array(found[name]["power"], dtype=float)
        frequency = np.arange(1, len(power) + 1) / (2 * len(power)) * (f if name == "image" else 1)
        seen = frequency <= 0.5
        energy = (power * frequency)[seen].sum() / n if power.any() else 1.0
        # Sums over rings of equal width in cycles per cell: the full image has the same rings.
        slope = "n/a" if found[name]["slope"] is None else f"{found[name]['slope']:.2f}"
        axes.loglog(frequency, power / energy, color=colour, linestyle=style, label=f"{label}: slope {slope}")
    axes.axvline(0.25, color=_GREY, linewidth=0.7)
    axes.legend(fontsize=8)


def _noise(result: dict[str, Any], figure: Any) -> None:
    rows = result["noise"]
    axes = _axes(figure, "Decoding noisy latents", "noise on normalized latents, sigma", "PSNR [dB]")
    axes.plot([row["sigma"] for row in rows], _numbers(row["psnr_db"] for row in rows), "o-", color=_BLUE)
    for row in rows:
        if row["psnr_db"] is not None:
            axes.annotate(
                f"{row['psnr_db']:.1f}", (row["sigma"], row["psnr_db"]), xytext=(5, 5), textcoords="offset points"
            )


def _equivariance(result: dict[str, Any], figure: Any) -> None:
    found = result["equivariance"]
    names = [name.replace("_", " ") for name in found]
    of = figure.subplots(1, 2)
    for axes, key, title in (
        (of[0], "drop_db", "decoder: PSNR lost [dB]"),
        (of[1], "latent_error", "encoder: relative latent error"),
    ):
        values = _numbers(row[key] for row in found.values())
        axes.barh(names, values, color=_BLUE)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
    of[1].set_yticklabels([])


def _locality(result: dict[str, Any], figure: Any) -> None:
    f = result["model"]["f"]
    axes = _axes(
        figure, "Effect of one latent cell", "distance from the cell's pixels [px]", "share of the effect within"
    )
    for name, label, colour in (("random", "random cells", _BLUE), ("largest_norm", "cells of largest norm", _RED)):
        curve = result["locality"][name]["curve"]
        axes.plot(np.arange(len(curve)), curve, color=colour, label=f"{label} ({result['locality'][name]['n_cells']})")
    for distance in (f, 2 * f, 4 * f):
        axes.axvline(distance, color=_GREY, linewidth=0.7, linestyle="--")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 12 * f)
    axes.legend(fontsize=8)


def _drift(result: dict[str, Any], figure: Any) -> None:
    found = result["drift"]
    trips = np.arange(1, len(found["original_db"]) + 1)
    axes = _axes(figure, "Round trips with 8-bit rounding", "trip", "PSNR [dB]", (1, 2, 1))
    axes.plot(trips, _numbers(found["original_db"]), "o-", color=_BLUE, label="against the original")
    axes.plot(trips[1:], _numbers(found["first_db"]), "s--", color=_GREEN, label="against the first trip")
    axes.legend(fontsize=8)
    axes = _axes(figure, "Colour", "trip", "mean shift [8-bit levels]", (1, 2, 2))
    shift = np.array(found["rgb_shift"], dtype=float)
    for channel, colour in enumerate(("#C00000", "#008000", "#0000C0")):
        axes.plot(trips, shift[:, channel], color=colour, label="RGB"[channel])
    axes.axhline(0, color="black", linewidth=0.7)
    axes.legend(fontsize=8)


def _grid(result: dict[str, Any], figure: Any) -> None:
    rows = [row for row in result["grid"]["colours"] if "failed" not in row]
    axes = _axes(figure, "Constant colours: error after one round trip", "", "RMS error [8-bit levels]")
    at = np.arange(len(rows))
    for n, (key, label, colour) in enumerate(
        (("border_rms", "border", _RED), ("centre_rms", "centre", _BLUE), ("grid_rms", "grid (period f)", _GREEN))
    ):
        axes.bar(at + 0.27 * (n - 1), [row[key] for row in rows], width=0.25, color=colour, label=label)
    axes.axhline(0.5, color="black", linewidth=0.7, linestyle="--")
    axes.set_xticks(at, [",".join(map(str, row["colour"])) for row in rows], rotation=60, fontsize=7, ha="right")
    axes.legend(fontsize=8)


def _fp16(result: dict[str, Any], figure: Any) -> None:
    found = result["fp16"]
    blocks = found["blocks"]
    values = [1e9 if block["largest"] is None else max(block["largest"], 1e-3) for block in blocks]
    axes = _axes(figure, f"Largest activation per block: {found['verdict']} in float16", "largest |activation|", "")
    colours = [_RED if value >= 65504 else _BLUE for value in values]
    axes.barh([block["block"] for block in blocks], values, color=colours)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(65504, color="black", linestyle="--", linewidth=1)
    axes.tick_params(axis="y", labelsize=7)


def _example_size(example: "Example") -> tuple[float, float]:
    """Return the size in inches for six pictures a row."""
    n_pictures = 2 + min(len(example.z), _MAX_CHANNELS_SHOWN)
    return 10, 2.0 * -(-n_pictures // 6)


def _example(example: "Example", figure: Any) -> None:
    channels = example.z[:_MAX_CHANNELS_SHOWN]
    columns = min(6, 2 + len(channels))
    grid = figure.subplots(-(-(2 + len(channels)) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, picture, title in zip(grid, (example.image, example.x_hat), ("image", "reconstruction"), strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=9)
    for n, (axes, plane) in enumerate(zip(grid[2:], channels, strict=False)):
        axes.imshow(plane, cmap="gray", vmin=-3, vmax=3)
        axes.set_title(f"channel {n}, ±3 σ", fontsize=9)
