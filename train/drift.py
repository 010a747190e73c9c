"""How far a fine-tuned autoencoder's latents have moved from its base's, and whether it can take the base's place.

    image -> base encoder, new encoder -> latents, each normalized by its own model -> cosine, deviations, means, errors
          -> either decoder on either's latents -> PSNR of the pictures                                     -> verdict

Normalized latents are compared because they are what a diffusion model sees: where the new model has other raw latents
and another scaling_factor, the two may still agree. Entries: `measure_drift`, `drift_of`, `drift_lines`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import console
from codec.errors import ModelError, UsageError
from codec.latent_model import LatentModel, Posterior, load_latent_model
from codec.model_folder import resolve
from codec.pixels import to_float, to_uint8
from codec.shards import SampleRef
from codec.statistics import LatentStatistics
from eval.metrics import psnr
from eval.results import finite
from train.config import Config
from train.data import whole_images
from train.inflate import image_channels_of

SIDE = 512  # pixels; images are cropped to this
MAX_IMAGES = 32
MAX_DECODED = 8
DECODER = ("decoder.", "post_quant_conv.")  # beginnings of names; everything else makes latents

LIMITS = {"relative_error": 0.1, "mean_shift": 0.05, "std_change": 0.05, "picture_db": 6.0}
REASONS = {
    "relative_error": "of the latents' deviation: what noise is left at step 10 of the 1000 that Stable Diffusion is "
    "trained on, and less than a sampler of 50 steps takes away in its last one",
    "mean_shift": "of a channel's deviation, in every channel: a shift is in all images alike, so that no sampler "
    "averages it out, and it shows as a cast",
    "std_change": "of a channel's deviation, in every channel: a change of scale is in all images alike too, and shows "
    "as contrast",
    "picture_db": "dB above the base's own PSNR, for either decoder on either's latents: what the move changes in a "
    "picture then has at most a quarter of the power of what the autoencoder loses anyway",
}
_LEAST_UNIT = 0.1  # of the mean deviation: channels that are nearly constant are judged in this unit


def export_drift(
    config: Config, out: Path, held_out: Sequence[SampleRef], training: Sequence[SampleRef], device: torch.device
) -> dict[str, Any]:
    """Measure the drift of a model folder that a run has just written, against what its latents should be.

    Args:
        config: the run's recipe; names a teacher, an anchor or a base.
        out: the folder.
        held_out: images to measure on, the first 32.
        training: taken where none are held out.
        device: where both models run.

    Returns:
        `drift`, see `drift_of`; nothing for a run from random weights that has neither teacher nor anchor, and where it
        cannot be measured, which is said and costs a finished run nothing else.
    """
    anchor = config.latents.anchor if config.latents.anchor_weight > 0 else ""
    base = config.model.teacher or anchor or config.model.init_from
    if not base:
        return {}
    new = load_latent_model(out, device, image_channels=None)
    samples = list(held_out or training)[:MAX_IMAGES]
    found = whole_images(samples, SIDE, new.f, bad=[], channels=image_channels_of(new.network))
    what = "held-out images" if held_out else "training images"
    try:
        return {"drift": drift_of(resolve(base), out, (image for _, image in found), device, what)}
    except (ModelError, UsageError) as exception:  # the base has gone away; no image can be read
        console.error(f"drift: not measured: {exception}")
        return {}


def drift_of(
    base: Path, new: Path, images: Iterable[np.ndarray], device: torch.device | str = "cpu", what: str = "images"
) -> dict[str, Any]:
    """Measure the drift between two diffusers folders; see `measure_drift`.

    Args:
        base: the model that others rely on; or a pipeline's folder with it in `vae/`.
        new: the one that is to take its place.
        images: (H, W, C) uint8, sides multiples of f; C as many as the model that takes more.
        device: where both run, in float32.
        what: the images are called, in the report.

    Raises:
        ModelError: one of them cannot be loaded.
        UsageError: their latents have other shapes; no image.
    """
    ours, theirs = (load_latent_model(folder, device, image_channels=None) for folder in (base, new))
    check_comparable(ours, theirs, str(base), str(new))
    figures = measure_drift(ours, theirs, images)
    return {"base": "/".join(base.resolve().parts[-2:]), "images": what, **figures}


def check_comparable(base: LatentModel, new: LatentModel, base_name: str, new_name: str) -> None:
    """Raise UsageError where latents of the two have other shapes: there is nothing to compare."""
    if (base.f, base.channels) != (new.f, new.channels):
        raise UsageError(
            f"{new_name}: f {new.f}, {new.channels} latent channels; {base_name}: f {base.f}, {base.channels}: latents "
            "of other shapes are not comparable, and the one model never takes the other's place"
        )


def measure_drift(
    base: LatentModel, new: LatentModel, images: Iterable[np.ndarray], n_decoded: int = MAX_DECODED
) -> dict[str, Any]:
    """Compare the latents of two models of one shape, and the pictures that either decoder makes of them.

    Args:
        base: frozen, in evaluation mode, on the same device as `new`.
        new: likewise.
        images: (H, W, C) uint8, sides multiples of f. A model of fewer image channels sees the first ones.
        n_decoded: how many are decoded too, by both, from either's latents.

    Returns:
        Figures, plain numbers; None for a PSNR of equal pictures. Latents are normalized, each by its own model:
        `cosine` (over D, h, w of an image, mean over images), `relative_error` (root mean square of the difference in
        units of the base's deviation, over all channels), `channels` (for each: std_ratio, and std_change, mean_shift
        and relative_error in units of the base's deviation), `posterior_std_ratio` where both have a variance; what is
        equal bit for bit; `psnr` of pictures, dB; `compatible` and `reasons`, see `LIMITS`.

    Raises:
        UsageError: there was no image.
    """
    latents = _Latents(base, new)
    pictures: list[dict[str, float]] = []
    for n, image in enumerate(images):
        z_base, z_new = latents.update(image)
        if n < n_decoded:
            pictures.append(_decoded(base, new, image, z_base, z_new))
    if not latents.n_images:
        raise UsageError("no image to measure the drift on")
    figures = latents.figures() | {
        "encoder_identical": same_encoder(base.network, new.network),
        "normalisation_identical": _same_normalisation(base, new),
        "n_decoded": len(pictures),
        "psnr": {name: float(np.mean([row[name] for row in pictures])) for name in (pictures[0] if pictures else {})},
        "limits": LIMITS,
    }
    reasons = failures(figures)
    stated: dict[str, Any] = finite(figures | {"compatible": not reasons, "reasons": reasons})
    return stated


def same_encoder(base: torch.nn.Module, new: torch.nn.Module) -> bool:
    """Whether all tensors that make latents are equal bit for bit (in the type that they were loaded in)."""
    ours, theirs = (
        {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(DECODER)}
        for network in (base, new)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def _same_normalisation(base: LatentModel, new: LatentModel) -> bool:
    ours, theirs = (
        [
            torch.as_tensor(part, dtype=torch.float64).cpu()
            for part in (model.normalisation.shift, model.normalisation.scale)
        ]
        for model in (base, new)
    )
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class _Latents:
    """Statistics of the latents of two models, image by image, in float64."""

    def __init__(self, base: LatentModel, new: LatentModel) -> None:
        self._models = (base, new)
        self._statistics = [LatentStatistics(base.channels) for _ in self._models]
        self._squares = np.zeros(base.channels)  # of the differences, summed
        self._posterior_squares = np.zeros(2)  # of the deviations, summed
        self._n_positions = 0
        self._cosines: list[float] = []
        self._identical = True
        self.n_images = 0

    @torch.inference_mode()
    def update(self, image: np.ndarray) -> list[torch.Tensor]:
        """Add an image; return the raw latents of both models."""
        device = next(self._models[0].network.parameters()).device
        x = to_float(image)[None].to(device)
        found = [model.encode(x[:, : image_channels_of(model.network)]) for model in self._models]
        base, new = found
        self._identical &= torch.equal(base.mean, new.mean) and _equal(base.logvar, new.logvar)
        normalized = [model.normalize(each.mean).double() for model, each in zip(self._models, found, strict=True)]
        for statistics, z in zip(self._statistics, normalized, strict=True):
            statistics.update(Posterior(z, None))
        self._squares += (normalized[1] - normalized[0]).square().sum((0, 2, 3)).cpu().numpy()
        self._n_positions += normalized[0].shape[-2] * normalized[0].shape[-1]
        self._cosines.append(float(torch.cosine_similarity(normalized[0].flatten(), normalized[1].flatten(), dim=0)))
        for n, (model, each) in enumerate(zip(self._models, found, strict=True)):
            if each.logvar is not None:
                unit = model.normalisation.deviation(each.mean)
                self._posterior_squares[n] += float((torch.exp(0.5 * each.logvar.double()) / unit).square().sum())
        self.n_images += 1
        return [base.mean, new.mean]

    def figures(self) -> dict[str, Any]:
        """Return the statistics so far; see `measure_drift`."""
        base, new = (statistics.summary() for statistics in self._statistics)
        power = np.maximum((base.std**2).mean(), 1e-24)
        unit = np.maximum(base.std, _LEAST_UNIT * np.sqrt(power))
        errors = self._squares / self._n_positions
        columns = {
            "std_ratio": new.std / np.maximum(base.std, 1e-12),
            "std_change": (new.std - base.std) / unit,
            "mean_shift": (new.mean - base.mean) / unit,
            "relative_error": np.sqrt(errors) / unit,
        }
        names = range(len(unit))
        out: dict[str, Any] = {
            "n_images": self.n_images,
            "n_positions": self._n_positions,
            "latents_identical": self._identical,
            "cosine": float(np.mean(self._cosines)),
            "relative_error": float(np.sqrt(errors.mean() / power)),
            "channels": [{"channel": c} | {name: float(values[c]) for name, values in columns.items()} for c in names],
        }
        if self._posterior_squares.all():
            out["posterior_std_ratio"] = math.sqrt(self._posterior_squares[1] / self._posterior_squares[0])
        return out


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@torch.inference_mode()
def _decoded(
    base: LatentModel, new: LatentModel, image: np.ndarray, z_base: torch.Tensor, z_new: torch.Tensor
) -> dict[str, float]:
    """Decode both latents by both decoders; return PSNRs of the pictures in dB, of the first three channels."""
    same = _same_normalisation(base, new)  # then raw latents are each other's, without a rounding in between
    new_for_base = z_new if same else base.denormalize(new.normalize(z_new))
    base_for_new = z_base if same else new.denormalize(base.normalize(z_base))
    pairs = {
        "base": base.decode(z_base),
        "base_on_new": base.decode(new_for_base),
        "new": new.decode(z_new),
        "new_on_base": new.decode(base_for_new),
    }
    shown = {name: to_uint8(x_hat[0, :3]) for name, x_hat in pairs.items()}
    original = np.ascontiguousarray(image[..., :3])
    return {name: psnr(original, x_hat) for name, x_hat in shown.items()} | {
        "base_decoder_moved": psnr(shown["base"], shown["base_on_new"]),
        "new_decoder_moved": psnr(shown["new"], shown["new_on_base"]),
    }


def failures(figures: Mapping[str, Any]) -> list[str]:
    """Say why a model cannot take its base's place; empty where it can. See `LIMITS` and `REASONS`."""
    if figures["latents_identical"] and figures["normalisation_identical"]:
        return []
    reasons = []
    if figures["relative_error"] > LIMITS["relative_error"]:
        reasons.append(f"relative error {figures['relative_error']:.3g}, at most {LIMITS['relative_error']:g}")
    for name, words in (("mean_shift", "mean moved by"), ("std_change", "deviation changed by")):
        worst = max(figures["channels"], key=lambda row: abs(row[name]))
        if abs(worst[name]) > LIMITS[name]:
            reasons.append(
                f"channel {worst['channel']}: {words} {worst[name]:+.3g} deviations, at most {LIMITS[name]:g}"
            )
    pictures = figures["psnr"]
    least = pictures.get("base", 0.0) + LIMITS["picture_db"]
    for name, words in (
        ("base_decoder_moved", "the base's decoder on the new latents"),
        ("new_decoder_moved", "the new decoder on the base's latents"),
    ):
        if pictures and not pictures[name] >= least:
            reasons.append(f"{words}: {pictures[name]:.2f} dB to the picture of its own ones, at least {least:.2f}")
    return reasons


def drift_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the report as lines of Markdown, for the model card and for the command."""
    verdict = "yes" if figures["compatible"] else "no"
    lines = [f"- drop-in compatible: **{verdict}**{_because(figures)}"]
    lines += [f"- base: {figures['base']}"] if "base" in figures else []
    if figures["encoder_identical"] and not figures["latents_identical"]:
        lines.append("- the encoder's tensors are equal bit for bit, its latents to the rounding of this device")
    if not figures["normalisation_identical"]:
        lines.append(
            "- scaling_factor or shift_factor differ from the base's: each latent is normalized by its own model's"
        )
    if not figures["latents_identical"]:
        ratio = figures.get("posterior_std_ratio")
        lines.append(
            f"- normalized latents: cosine {figures['cosine']:.5f}, relative error {figures['relative_error']:.4g} of "
            "the base's deviation" + ("" if ratio is None else f", posterior's deviation x {ratio:.3g}")
        )
    pictures = figures["psnr"]
    if pictures:
        lines += _picture_lines(pictures, figures["n_decoded"], identical=figures["latents_identical"])
    if figures["latents_identical"]:
        return lines
    rows = [
        f"| {row['channel']} | {row['std_ratio']:.4f} | {row['mean_shift']:+.4f} | {row['relative_error']:.4f} |"
        for row in figures["channels"]
    ]
    reasons = [f"- {_LIMIT_NAMES[name]} {LIMITS[name]:g} {why}" for name, why in REASONS.items()]
    return [
        *lines,
        "",
        "| channel | deviation, of the base's | mean shift, deviations | error, deviations |",
        "|---|---|---|---|",
        *rows,
        "",
        "Compatible means:",
        "",
        *reasons,
    ]


_LIMIT_NAMES = {
    "relative_error": "relative error at most",
    "mean_shift": "mean shift at most",
    "std_change": "change of deviation at most",
    "picture_db": "pictures at least",
}


def _because(figures: Mapping[str, Any]) -> str:
    where = f"{figures['n_images']} {figures.get('images', 'images')}"
    if not figures["compatible"]:
        return f", on {where}: " + "; ".join(figures["reasons"])
    if figures["latents_identical"] and figures["encoder_identical"]:
        return f": latents unchanged bit for bit (encoder tensors, and latents of {where})"
    if figures["latents_identical"]:
        return f": latents of {where} unchanged bit for bit, though the encoder's tensors differ"
    return f", on {where}"


def _picture_lines(pictures: Mapping[str, float | None], n: int, *, identical: bool) -> list[str]:
    def text(name: str) -> str:
        value = pictures[name]
        return "equal" if value is None else f"{value:.2f} dB"

    own = f"- PSNR of {n} images: base {text('base')}, new {text('new')}"
    if identical:
        return [own]
    return [
        f"{own}; crossed: base's decoder on new latents {text('base_on_new')}, new decoder on the base's "
        f"{text('new_on_base')}",
        f"- what the other's latents change in a decoder's pictures: base's {text('base_decoder_moved')}, new "
        f"{text('new_decoder_moved')}",
    ]
