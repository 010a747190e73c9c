"""Up to which quality the encoder's search for cheaper integers serves a model: measured on its own decoder.

    training images -> z -> nearest indices, searched indices -> bits and PSNR of both, quality by quality

The search trades error of latents for bits. What an error costs in the image is the decoder's affair: where it is the
autoencoder that limits an image, or where the decoder was trained to bear noise but not a pull towards what is likely,
the same quality has fewer bits without the search.
"""

from collections.abc import Sequence

import numpy as np
import torch

from codec import effort
from codec.coding import DEFAULT_EFFORT
from codec.latent_model import LatentModel
from codec.pixels import middle, to_float
from codec.tables import QUALITIES, Mode, TableSet

N_IMAGES = 6
_SIDE = 256  # pixels of the middle of an image
_STRIDE = 8  # qualities between two points of a curve: half an octave of the step

Point = tuple[float, float]
"""PSNR in dB and bits, means over images."""


def search_below(
    model: LatentModel, images: Sequence[np.ndarray], table_set: TableSet, mean: np.ndarray, step: np.ndarray
) -> int:
    """Return the quality from which on the search no longer saves bits at equal PSNR of decoded images.

    Args:
        model: the network, in float32, wherever it lies.
        images: (H, W, 3) uint8 each, training images; the first N_IMAGES are used.
        table_set: what latents are coded with.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.

    Returns:
        0 (never search) .. 101 (at every quality).
    """
    middles = [part for image in images[:N_IMAGES] if (part := middle(image, model.f, _SIDE)).size]
    if not middles:
        return 0
    device = next(model.network.parameters()).device
    with torch.inference_mode():
        grids = [model.encode(to_float(x)[None].to(device)).mean[0].cpu().numpy() for x in middles]

    def point(quality: int, level: int) -> Point:
        rows = []
        for image, z in zip(middles, grids, strict=True):
            indices = effort.search(z, mean, step, table_set, quality, level)
            bits = min(table_set.bits(indices, quality, mode) for mode in Mode)
            z_q = torch.from_numpy(table_set.dequantise(indices, quality, mean, step))[None]
            with torch.inference_mode():
                x_hat = model.decode(z_q.to(device)).float().cpu()[0].clamp(-1, 1)
            error = float((x_hat - to_float(image)).square().mean()) / 4  # of pixels in [0, 1]
            rows.append((-10 * np.log10(max(error, 1e-10)), bits))
        psnr, bits = np.mean(rows, axis=0)
        return float(psnr), float(bits)

    plain, savings = [point(0, 0)], [1.0]
    for quality in range(_STRIDE, QUALITIES, _STRIDE):
        plain.append(point(quality, 0))
        savings.append(_saving(point(quality, DEFAULT_EFFORT), plain))
        if savings[-1] <= 0:  # between the last quality that it serves and this one, in a straight line
            before = min(savings[-2], 1.0) if quality > _STRIDE else 0.0
            return round(quality - _STRIDE * savings[-1] / (savings[-1] - before)) if before > 0 else 0
    return QUALITIES


def _saving(searched: Point, plain: Sequence[Point]) -> float:
    """Return the share of the bits that the search saves against plain rounding of equal PSNR."""
    psnr, bits = np.array(plain).T
    order = np.argsort(psnr)  # beyond the curve's ends the nearest end counts
    return 1 - searched[1] / float(np.exp(np.interp(searched[0], psnr[order], np.log(bits[order]))))
