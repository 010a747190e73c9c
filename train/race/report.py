"""What a race says: a Markdown table, the sentences below it, and the curves.

Imports neither torch nor diffusers.
"""

import io
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from eval.jackknife import beyond, difference
from eval.plots import MODEL_STYLES, PLAIN_TEXT

MEANINGS = {
    "unexplained": "squared error of the predicted velocity on held-out latents, t uniform, as a share of that of the "
    "best prediction from each element of z_t alone (which knows each channel's mean and deviation, no structure)",
    "loss": "the squared error itself, mean over D, h, w and t",
    "samples": "drawn images against held-out real ones",
    "ceiling": "the autoencoder's reconstructions of as many other real images (of the training), of the same classes, "
    "against the held-out ones: what a perfect denoiser would reach with it",
    "own": "drawn images against the autoencoder's reconstructions of the held-out images: the denoiser's shortfall",
    "control": "these other real images themselves against the held-out ones: nothing can be expected to do better at "
    "this number of images",
}
COMPARABLE = {
    "FID, KID, precision, recall of samples": "yes: same real images, same features, same number of images",
    "unexplained": "yes, as a share: scale and number of channels cancel; but it says how predictable latents are, "
    "not how good images get: latents that keep less of the image can win",
    "loss": "no with --normalize model: it depends on each autoencoder's scaling; with channels it is unexplained "
    "times a constant that all share, up to the draws",
    "own": "no: each entrant has reconstructions of its own as reference",
}
_NORMALIZED = {
    "model": "latents normalized by each model's config: loss may not be compared",
    "channels": "each channel of the latents brought to mean 0 and deviation 1 on the training images",
}
_HEADINGS = (
    *("VAE", "f", "D", "unexplained", "loss", "FID samples", "FID ceiling", "FID own", "KID x 1000"),
    *("precision", "recall", "train s"),
)


def markdown(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of a race.json, and what must be known to read it."""
    lines = [_line(_HEADINGS), _line(["---", *["---:"] * (len(_HEADINGS) - 1)])]
    for entrant in result["entrants"]:
        lines.append(_line(_cells(entrant)))
    control = result["control"]
    if control is not None:
        cells = ["other real images", "", "", "", "", _scored(control["fid"], 2), "", ""]
        cells += [_scored(control["kid"], 2, 1000), _scored(control["precision"], 3), _scored(control["recall"], 3), ""]
        lines.append(_line(cells))
    return [*lines, "", *result["notes"]]


def _cells(entrant: Mapping[str, Any]) -> list[str]:
    loss, scores, model = entrant["loss"], entrant["scores"], entrant["model"]
    cells = [entrant["name"], str(model["f"]), str(model["latent_channels"])]
    cells += [_scored(loss["unexplained"], 3), f"{loss['loss']:.3f}"]
    if scores is None:
        cells += ["n/a"] * 6
    else:
        cells += [_scored(scores[which]["fid"], 2) for which in ("samples", "ceiling", "own")]
        samples = scores["samples"]
        cells += [_scored(samples["kid"], 2, 1000), _scored(samples["precision"], 3), _scored(samples["recall"], 3)]
    return [*cells, f"{entrant['times_s']['train']:.0f}"]


def _scored(score: Mapping[str, Any], digits: int, factor: float = 1) -> str:
    """Return value and half the width of its interval."""
    low, high = score["interval"]
    width = "n/a" if low is None or high is None else f"{factor * (high - low) / 2:.{digits}f}"
    return f"{factor * score['value']:.{digits}f} ± {width}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table must know, a sentence or two each."""
    settings, data, features = result["settings"], result["settings"]["data"], result["settings"]["features"]
    lines = [
        f"{settings['n_images']} images seen by each denoiser ({settings['n_tokens']} tokens an image, width "
        f"{settings['width']}, depth {settings['depth']}; equal but for the first and last projection); "
        f"{data['n_training']} training and {data['n_held_out']} held-out images, {len(data['classes'])} classes, "
        f"{settings['size']} x {settings['size']} pixels; {_NORMALIZED[settings['normalization']]}.",
        f"unexplained: {MEANINGS['unexplained']}. It may be compared as a share; it says how predictable latents are, "
        "not how good images get: latents that keep less of the image can win.",
    ]
    if features is None:
        lines.append("No features, or too few images: nothing says how good the samples are; look at samples.png.")
        return lines
    lines += [
        f"FID samples: {MEANINGS['samples']}. ceiling: {MEANINGS['ceiling']}. own: {MEANINGS['own']}; not comparable. "
        f"Last row: {MEANINGS['control']}.",
        f"Features: {features['name']}, {features['dimension']} numbers, {settings['n_samples']} samples. ± spans 95 % "
        "over images (jackknife), not over training runs: another --seed moves the numbers too."
        + _few(features["dimension"], min(settings["n_samples"], data["n_held_out"])),
        *_verdicts(result["entrants"]),
    ]
    return lines


def _few(dimension: int, n_images: int) -> str:
    if n_images > dimension:
        return ""
    return f" With {n_images} images of {dimension} features FID is biased upwards: read it against the last row."


def _verdicts(entrants: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each pair: which is better, by more than chance or not."""
    lines = []
    for a, b in combinations([entrant for entrant in entrants if entrant["scores"] is not None], 2):
        parts = []
        for what, one, other in (
            ("unexplained", a["loss"]["unexplained"], b["loss"]["unexplained"]),
            ("FID of samples", a["scores"]["samples"]["fid"], b["scores"]["samples"]["fid"]),
            ("KID of samples", a["scores"]["samples"]["kid"], b["scores"]["samples"]["kid"]),
        ):
            if (found := difference(one, other)) is None:
                continue
            digits = 2 if what.startswith("FID") else 4
            chance = f"{b['name'] if found['value'] > 0 else a['name']} is lower" if beyond(found) else "within chance"
            parts.append(f"{what} {_scored(found, digits)} ({chance})")
        lines.append(f"{a['name']} minus {b['name']}: {', '.join(parts)}.")
    return lines


def curves(result: Mapping[str, Any]) -> bytes:
    """Return a PNG: the unexplained share over training, and by time t at the end, for each entrant."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(PLAIN_TEXT):
        figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
        over, by = figure.subplots(1, 2)
        for n, entrant in enumerate(result["entrants"]):
            color, marker = MODEL_STYLES[n % len(MODEL_STYLES)]
            style = {"color": color, "marker": marker, "label": entrant["name"]}
            points = entrant["curve"]
            over.plot([point["images"] for point in points], [point["unexplained"] for point in points], **style)
            bins = entrant["loss"]["bins"]
            middle = [sum(part["t"]) / 2 for part in bins]
            by.plot(middle, [part["unexplained"]["value"] for part in bins], **style)
        over.set_xlabel("images seen")
        over.set_title("while training, some held-out images", fontsize=10)
        by.set_xlabel("t (0 = latents, 1 = noise)")
        by.set_title("at the end, all held-out images", fontsize=10)
        for axes in (over, by):
            axes.set_ylabel("unexplained share of the loss (lower is better)")
            axes.grid(color="#DDDDDD", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()
