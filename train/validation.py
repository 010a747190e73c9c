"""What an autoencoder does to the held-out images: mode reconstructions, never a sample, in float32."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import console, model_folder
from codec.adapters import CodebookModel, ConditionalKLModel
from codec.latent_model import latent_model
from codec.pixels import to_float, to_uint8
from codec.shards import SampleRef
from eval.metrics import ms_ssim
from train.config import DataConfig
from train.cvae.measure import HeldClasses
from train.data import whole_images
from train.export import STATISTICS_SIDE
from train.losses import ReconstructionLoss, kl_nats
from train.module import AutoencoderModule
from train.rate import RateModel
from train.vq.usage import CodeCounts

QUALITIES = (0, 25, 50, 75, 100)  # at which the estimated rate is measured
_GRID = 6  # pictures in the grid


def measure(
    parts: AutoencoderModule,
    samples: Sequence[SampleRef],
    loss: ReconstructionLoss,
    data: DataConfig,
    device: torch.device,
    held: HeldClasses | None = None,
) -> tuple[list[dict[str, Any]], np.ndarray | None]:
    """Reconstruct images and measure each of them.

    Args:
        parts: the network and, where there is one, its rate model.
        samples: what to measure; those that cannot be read are named and left out.
        loss: the reconstruction terms, which know the images' channels.
        data: how images become what is measured.
        device: where the network lies.
        held: the classes that the network is told; None = it is told nothing.

    Returns:
        Rows of loss (the weighted reconstruction terms), psnr (dB, 8 bit) and what else `Channels.measured` gives,
        ms_ssim (sides > 160 only), perceptual (unweighted), kl_bits_per_pixel, and with a rate model bpp_q0 ...
        bpp_q100: the estimated rate of the rounded latents; with a codebook codes, how often each vector was chosen;
        with classes what `HeldClasses.compared` gives. And a picture, originals above their reconstructions, or None.
    """
    model, channels = latent_model(parts.network), loss.channels
    rows: list[dict[str, Any]] = []
    columns: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    with torch.inference_mode():
        for sample, image in _held_out(samples, data, model.f, bad, channels.count):
            x = to_float(image)[None].to(device)
            told = model.under(sample.label) if isinstance(model, ConditionalKLModel) else model
            posterior = told.encode(x)
            decoded = told.decode(posterior.mean).float()
            x_hat = to_uint8(decoded[0])
            row: dict[str, Any] = {**channels.measured(image, x_hat), **_losses(loss, x, decoded)}
            column = [channels.picture(image), channels.picture(x_hat)]
            if isinstance(model, ConditionalKLModel) and held is not None:
                row |= held.compared(model, sample, image, x, posterior.mean, channels)
                if len(columns) < _GRID:
                    column += held.under_each(model, posterior.mean, channels)
            if posterior.logvar is not None:
                nats = kl_nats(posterior.mean, posterior.logvar).sum() / model.f**2
                row["kl_bits_per_pixel"] = float(nats) / float(np.log(2))
            if isinstance(model, CodebookModel) and parts.is_quantised:
                for counts in CodeCounts.by_map(model, model.quantise(posterior.mean)):
                    row[f"{counts.prefix}codes"] = counts
            if parts.rate is not None:
                row |= {f"bpp_q{q}": estimated_bpp(parts.rate, posterior.mean, model.f, q) for q in QUALITIES}
            similarity = ms_ssim(*column[:2])
            rows.append(row if similarity is None else {**row, "ms_ssim": similarity})
            if len(columns) < _GRID:
                columns.append(np.concatenate(column))
        if isinstance(model, ConditionalKLModel) and held is not None and columns:
            columns += held.drawn(model, data.crop, channels)
    for key, reason in bad:
        console.error(f"sample {key}: {reason} (left out of validation)")
    return rows, _side_by_side(columns) if columns else None


def _held_out(
    samples: Sequence[SampleRef], data: DataConfig, f: int, bad: list[tuple[str, str]], channels: int
) -> Iterator[tuple[SampleRef, np.ndarray]]:
    """Yield samples with their images as validation sees them."""
    for sample in samples:
        for _, image in whole_images([sample], data.validation_crop, f, bad, channels, data.cover):
            yield sample, image


def _losses(loss: ReconstructionLoss, x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, float]:
    if min(x.shape[-2:]) < loss.min_side:
        return {}
    terms = loss(x, x_hat)
    out = {"loss": float(torch.stack(list(terms.values())).sum())}
    if "perceptual" in terms:
        out["perceptual"] = float(terms["perceptual"]) / loss.perceptual_weight
    return out


def estimated_bpp(rate: RateModel, z: torch.Tensor, f: int, quality: float, mean: torch.Tensor | None = None) -> float:
    """Return the estimated bits per pixel of raw latents (1, D, h, w), rounded as the codec rounds them.

    Args:
        rate: steps and densities.
        z: raw latents.
        f: downsampling factor.
        quality: 0..100.
        mean: (D,) where index 0 lies; None = the mean of the density.
    """
    at = torch.full((1,), float(quality), device=z.device)
    rounded = rate.quantised(z, at, mean)
    return float(rate.bits(rounded, at)) / (z.shape[-2] * z.shape[-1] * f**2)


def estimated_rates(
    parts: AutoencoderModule, samples: Sequence[SampleRef], folder: Path, qualities: Iterable[int], device: torch.device
) -> dict[int, float]:
    """Return the estimated bits per pixel of whole images at each quality in STATIC mode, mean over the images.

    Args:
        parts: network and rate model.
        samples: the images that the model folder's real rates were measured on.
        folder: the exported model, for its mean.
        qualities: 0..100.
        device: where the network lies.
    """
    model = latent_model(parts.network)
    mean = torch.from_numpy(model_folder.read(folder).mean)
    found: dict[int, list[float]] = {quality: [] for quality in qualities}
    assert parts.rate is not None
    with torch.inference_mode():
        for _, image in whole_images(samples, STATISTICS_SIDE, model.f, bad=[]):
            z = model.encode(to_float(image)[None].to(device)).mean
            for quality, rates in found.items():
                rates.append(estimated_bpp(parts.rate, z, model.f, quality, mean))
    return {quality: float(np.mean(rates)) for quality, rates in found.items()}


def _side_by_side(columns: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Place (H, W, 3) pictures in a row on white, tops aligned."""
    height = max(column.shape[0] for column in columns)
    padded = [
        np.pad(column, ((0, height - column.shape[0]), (0, gap), (0, 0)), constant_values=255) for column in columns
    ]
    return np.concatenate(padded, axis=1)
