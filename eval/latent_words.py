"""Every number of `codec-eval latents` in one line: its value, its unit, and what it means for a diffusion model.

Imports neither torch nor numpy.
"""

from collections.abc import Mapping
from typing import Any

CHANNEL_COLUMNS = (
    # key, heading, format, meaning
    (
        "mean",
        "mean",
        "{:.3f}",
        "of the raw posterior mean: far from 0 beside its std, it calls for a shift per channel",
    ),
    ("std", "std", "{:.3f}", "of the raw posterior mean: channels of very different std are learned at different pace"),
    ("normalized_std", "normalized", "{:.3f}", "std after scaling_factor: noise schedules expect about 1"),
    ("largest", "largest", "{:.1f}", "|mean|: far beyond 5 std, single cells carry something else than the picture"),
    ("posterior_std", "noise std", "{:.4f}", "of the posterior: detail finer than this the decoder never relied on"),
    (
        "kl_nats",
        "KL nats",
        "{:.2f}",
        "per position, to N(0, 1): what the channel may carry; 0 is a dead channel to model",
    ),
    ("active", "active", "{}", "variance of the mean over the data above 0.01 (Burda et al. 2015)"),
    (
        "clamped_low_share",
        "at -30",
        "{:.1%}",
        "positions whose log-variance sits at the lower clamp: smuggled exact values",
    ),
    ("clamped_high_share", "at +20", "{:.1%}", "positions whose log-variance sits at the upper clamp: pure noise"),
    (
        "spectrum_slope",
        "slope",
        "{:.2f}",
        "of its power spectrum: near the image's the channel is a picture, near 0 noise",
    ),
    ("spectrum_high_share", "high", "{:.1%}", "its energy in high frequencies, which a diffusion model makes last"),
)
_VERDICTS = {
    "collapsed": "the latents say nothing about the image: nothing can be trained on them",
    "partly collapsed": "some channels are noise that a diffusion model learns to make and the decoder ignores",
    "healthy": "every channel says something about the image, with noise that the decoder bears",
    "nearly deterministic": "usual for KL weights of 1e-6: sample or mode is all one, and its noise taught little",
    "no posterior": "the encoder gives no variance: check below how the decoder bears noise",
}


def summary_lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry per number, for tables and reports.

    Args:
        result: of `eval.latents.run_latents`, with its sections; None stands for what does not exist.

    Returns:
        Dicts of section, label, value (the number or word), text (the value as people read it) and meaning.
    """
    parts = (_posterior, _aggregate, _channels, _spectrum, _noise, _equivariance, _locality, _drift, _grid, _fp16)
    return [line for part in parts for line in part(result)]


def _line(section: str, label: str, value: Any, form: str, meaning: str) -> dict[str, Any]:
    text = "n/a" if value is None else form.format(value)
    return {"section": section, "label": label, "value": value, "text": text, "meaning": meaning}


def _posterior(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, name = result["posterior"], "posterior"
    n = result["model"]["channels"]
    lines = [
        _line(name, "verdict", found["verdict"], "{}", _VERDICTS[found["verdict"]]),
        _line(
            name,
            "active units",
            found["active_units"],
            f"{{}} of {n}",
            f"their mean has a variance above {found['active_threshold']}; the rest is dead, or only small in scale",
        ),
    ]
    if found["kl_nats_per_position"] is None:
        return lines
    information = found["mutual_information"]
    limit = information["lower_limit_nats"]
    return [
        *lines,
        _line(
            name,
            "KL per position",
            found["kl_nats_per_position"],
            "{:.2f} nats",
            "all channels: how far the encoder leaves N(0, I); the price of what the latents carry",
        ),
        _line(name, "KL per image", found["kl_nats_per_image"], "{:.0f} nats", "the same for the whole crop"),
        _line(name, "KL rate", found["kl_bpp"], "{:.3f} bpp", "the same as a rate: what a bits-back coder would need"),
        _line(
            name,
            "information, at least",
            information["lower_nats"],
            "{:.2f} nats",
            f"about the image, per position; {information['n_positions']} positions can show {limit:.2f} at most",
        ),
        _line(
            name,
            "information, at most",
            information["upper_nats"],
            "{:.2f} nats",
            "KL less its Gaussian mismatch to N(0, I): what the diffusion model must produce",
        ),
        _line(
            name,
            "noise / data, median channel",
            found["noise_share"],
            "{:.4f}",
            "posterior std over latent std: smaller errors of the diffusion model do no harm",
        ),
        _line(
            name,
            "log-variance at a clamp",
            found["clamped_share"],
            "{:.2%}",
            "of all values: at -30 the encoder hides exact numbers, which no sampler reproduces",
        ),
    ]


def _aggregate(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, name = result["aggregate"], "aggregate"
    factor = found["measured_scaling_factor"]
    shown = "n/a" if factor is None else f"{factor:.4f}"
    return [
        _line(
            name,
            "normalized std",
            found["normalized_std"],
            "{:.3f}",
            f"should be 1, or noise schedules are off; these images ask for scaling_factor {shown}",
        ),
        _line(
            name,
            "normalized mean",
            found["normalized_mean"],
            "{:.3f}",
            f"should be 0; these images ask for shift_factor {found['measured_shift_factor']:.4f}",
        ),
        _line(
            name,
            "KL to the prior, raw",
            found["raw"]["kl_nats"],
            "{:.2f} nats",
            "per position: why decoding draws of N(0, I) gives no pictures; in latent diffusion no fault",
        ),
        _line(
            name,
            "KL to N(0, I), normalized",
            found["normalized"]["kl_nats"],
            "{:.2f} nats",
            "how far, in mean and covariance, the diffusion model must carry its noise",
        ),
        _line(
            name,
            "Frechet to N(0, I), normalized",
            found["normalized"]["frechet"],
            "{:.3f}",
            "the same as a squared distance: 0 only for uncorrelated channels of mean 0 and std 1",
        ),
        _line(
            name,
            "sliced Wasserstein, normalized",
            found["sliced_wasserstein"],
            "{:.3f}",
            "the same for whole distributions: heavy tails and clusters count too",
        ),
    ]


def _channels(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, name = result["correlation"], "channels"
    pair = found["pair"]
    label = "largest correlation" + (f" ({pair[0]}, {pair[1]})" if pair else "")
    return [
        _line(
            name,
            label,
            found["largest"],
            "{:+.2f}",
            "near +-1 two channels say the same, and must agree when generated",
        ),
        _line(
            name,
            "effective rank",
            found["effective_rank"],
            f"{{:.2f}} of {found['channels']}",
            "directions that hold the variance: far fewer than channels wastes capacity",
        ),
    ]


def _spectrum(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, name = result["spectrum"], "spectrum"
    image = found["image_on_grid"]
    compare = f"the image on the same grid has {_or(image['slope'], '{:.2f}')}"
    share = f"the image on the same grid has {_or(image['high_share'], '{:.1%}')}"
    return [
        _line(name, "image slope", found["image"]["slope"], "{:.2f}", "natural images: about -2 to -3"),
        _line(
            name,
            "latent slope",
            found["latent"]["slope"],
            "{:.2f}",
            f"{compare}; much flatter is noise-like detail to generate",
        ),
        _line(
            name,
            "latent high-frequency share",
            found["latent"]["high_share"],
            "{:.1%}",
            f"{share}; more hurts: they come last and worst",
        ),
    ]


def _or(value: float | None, form: str) -> str:
    return "n/a" if value is None else form.format(value)


def _noise(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for row in result["noise"]:
        if row["sigma"] == 0:
            line = _line(
                "noise", "PSNR, no noise", row["psnr_db"], "{:.2f} dB", "the reconstruction: a ceiling for samples"
            )
        else:
            drop = "n/a" if row["drop_db"] is None else f"{row['drop_db']:.2f}"
            meaning = f"{drop} dB lost to errors of this size in what the diffusion model generates"
            line = _line("noise", f"PSNR at sigma {row['sigma']:g}", row["psnr_db"], "{:.2f} dB", meaning)
        lines.append(line)
    return lines


def _equivariance(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for key, row in result["equivariance"].items():
        label = key.replace("_", " ")
        meaning = "by transforming latents, not the image: where large, latents are no picture (EQ-VAE)"
        lines.append(_line("equivariance", f"{label}, decoder", row["drop_db"], "{:.2f} dB lost", meaning))
        meaning = "latents of T(image) against T(latents): 0 the same, above 1 unrelated; harder to generate"
        lines.append(_line("equivariance", f"{label}, encoder", row["latent_error"], "{:.3f}", meaning))
    return lines


def _locality(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = []
    for key, label in (("random", "random cells"), ("largest_norm", "cells of largest norm")):
        found = result["locality"][key]
        for distance, share in found["share_within"].items():
            meaning = "of a cell's effect: the rest lands where no diffusion model expects it"
            lines.append(_line("locality", f"{label}: within {distance} px", share, "{:.1%}", meaning))
        meaning = "of a visible change (an 8-bit level): one that reaches everywhere is a black hole"
        lines.append(_line("locality", f"{label}: farthest reach", found["visible_px"], "{} px", meaning))
        worst = found["worst"] or {"share": None, "image": "", "row": 0, "column": 0}
        meaning = f"within 4 f, the worst cell: {worst['image']} ({worst['row']}, {worst['column']})"
        lines.append(_line("locality", f"{label}: worst", worst["share"], "{:.1%}", meaning))
    return lines


def _drift(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = result["drift"]
    last = found["original_db"][-1]
    n = len(found["original_db"])
    shift = max(found["rgb_shift"][-1], key=lambda value: abs(value or 0.0))
    return [
        _line(
            "drift", f"PSNR after {n} trips", last, "{:.2f} dB", "against the original: editing loops lose this much"
        ),
        _line(
            "drift",
            "against the first trip",
            found["first_db"][-1],
            "{:.2f} dB",
            "high means a fixed point: what was decoded once is encoded as itself again",
        ),
        _line(
            "drift",
            "colour shift",
            shift,
            "{:+.2f} levels",
            "largest of mean R, G, B after all trips: a cast that grows with every edit",
        ),
    ]


def _grid(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, name = result["grid"], "constant colours"
    if "grid_rms" not in found:
        return [_line(name, "failed", found["n_failed"], "{} colours", "not finite: the network breaks on flat areas")]
    f = result["model"]["f"]
    lines = [
        _line(
            name,
            f"grid of period {f}, worst colour",
            found["grid_rms_worst"],
            "{:.2f} levels",
            "RMS: above 0.5 a lattice shows in skies, and every sample inherits it",
        ),
        _line(
            name,
            "grid's share",
            found["grid_share"],
            "{:.1%}",
            "of the uneven error's energy: near 100 % it is the up-sampling, not the latents",
        ),
        _line(
            name, "colour shift", found["colour_shift"], "{:.2f} levels", "of the worst channel, mean of the colours"
        ),
        _line(
            name,
            "border / centre",
            found["border_ratio"],
            "{:.2f}",
            "error of the outer 2 f pixels over the inside's: frames, and seams between tiles",
        ),
    ]
    if found["n_failed"]:
        lines.append(_line(name, "failed", found["n_failed"], "{} colours", "not finite: breaks on flat areas"))
    return lines


def _fp16(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, name = result["fp16"], "float16"
    meaning = {
        "overflows": "black images in float16: set force_upcast, use bfloat16, or rescale the weights",
        "at risk": "other images or generated latents may overflow: set force_upcast",
        "safe": "pipelines may run it in float16",
        "not measured": "the first images failed: run it again without them",
    }[found["verdict"]]
    return [
        _line(name, "verdict", found["verdict"], "{}", meaning),
        _line(
            name,
            "largest activation",
            found["largest"],
            "{:.4g}",
            f"of 65504, in {found['worst_block']}: what is not finite there cannot be mended later",
        ),
    ]
