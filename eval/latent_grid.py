"""Constant colours through an autoencoder: what is not constant afterwards is the network's own grid or border.

constant colour -> encode -> decode -> error -> FFT of its inside: energy of patterns that repeat every f pixels
"""

from math import gcd, lcm
from typing import Any

import numpy as np
import torch

from codec.latent_model import LatentModel
from eval.latent_probes import decode, encode

COLOURS = (
    *((r, g, b) for r in (32, 224) for g in (32, 224) for b in (32, 224)),
    *((v, v, v) for v in (0, 64, 128, 192, 255)),
)
"""Corners of the colour cube, a little inside, and greys; 8-bit sRGB."""


def measure_colour(
    model: LatentModel, colour: tuple[int, int, int], size: int, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Return the error on one constant colour, in 8-bit levels.

    The decoder's output is clamped but not rounded: rounding would hide a grid that shows in a smooth sky.

    Args:
        size: side of the image in pixels, a multiple of f, at least 8 f. The outermost 2 f pixels are the border.

    Returns:
        rms, border_rms and centre_rms of the error; mean (3,), the colour shift of the centre; grid_rms and
        ripple_rms of the part of the centre's error that repeats every f pixels, and of all that is not its mean;
        energy, {period: its share of ripple_rms^2} for the divisors of f.
    """
    value = torch.tensor(colour, dtype=torch.float32, device=device).reshape(1, 3, 1, 1) / 127.5 - 1.0
    x = value.expand(1, 3, size, size).contiguous()
    x_hat = decode(model, encode(model, x).mean).clamp(-1, 1)
    error = (x_hat - x)[0].double().cpu().numpy() * 127.5
    border = 2 * model.f
    inside = np.zeros((size, size), bool)
    inside[border:-border, border:-border] = True
    centre = error[:, border:-border, border:-border]
    ripple = float(np.sqrt(np.mean((centre - centre.mean(axis=(1, 2), keepdims=True)) ** 2)))
    shares = period_shares(centre, model.f)
    return {
        "colour": list(colour),
        "rms": _rms(error),
        "border_rms": _rms(error[:, ~inside]),
        "centre_rms": _rms(centre),
        "mean": centre.mean(axis=(1, 2)).tolist(),
        "ripple_rms": ripple,
        "grid_rms": ripple * float(np.sqrt(min(1.0, sum(shares.values())))),
        "energy": {str(period): share for period, share in shares.items()},
    }


def period_shares(error: np.ndarray, f: int) -> dict[int, float]:
    """Return which share of the energy, without the mean, belongs to patterns of each period that divides f.

    Args:
        error: (C, N, N), N a multiple of f.

    Returns:
        {period: share} for the divisors of f above 1. Each frequency counts once, for the shortest period that holds
        it. Zeros where the error is constant.
    """
    side = error.shape[-1]
    periods = [period for period in range(2, f + 1) if f % period == 0]
    power = (np.abs(np.fft.fft2(error - error.mean(axis=(1, 2), keepdims=True))) ** 2).sum(axis=0)
    total = float(power.sum())
    found = dict.fromkeys(periods, 0.0)
    if total <= 1e-9 * error.size**2:  # an RMS of some 1e-4 levels: rounding errors have no pattern to speak of
        return found
    step = side // f  # only these frequencies repeat every f pixels
    for row in range(0, side, step):
        for column in range(0, side, step):
            period = lcm(side // gcd(row, side), side // gcd(column, side))
            if period > 1:
                found[period] += float(power[row, column]) / total
    return found


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))
