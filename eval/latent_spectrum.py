"""Radially averaged power spectra of latents and images, their slope and their share of high frequencies.

A diffusion model makes coarse structure first; latents with much more fine structure than images are harder to
generate and decode (Skorokhodov et al. 2025, arXiv:2502.14831). Imports no torch.
"""

import numpy as np

HIGH_FREQUENCY = 0.25
"""Cycles per sample, half of the highest along an axis: from here on frequencies count as high."""


def radial_power(planes: np.ndarray) -> np.ndarray:
    """Return the mean power at each radial frequency k / N.

    The mean is taken off each plane, and a Hann window laid over it: without one the jump between opposite borders,
    which the transform sees as neighbours, hides every slope steeper than -2.

    Args:
        planes: (n, N, N) channels of one image.

    Returns:
        (N // 2,) float64 for k = 1 .. N // 2, mean over planes and over the frequencies of a ring. White noise of
        variance 1 has a power of 1 everywhere.
    """
    side = planes.shape[-1]
    window = np.hanning(side + 2)[1:-1]  # without the zeros at both ends
    weight = np.outer(window, window)
    planes = planes.astype(np.float64)
    # Without its weighted mean a constant plane has no power at all.
    planes = planes - (planes * weight).sum(axis=(-2, -1), keepdims=True) / weight.sum()
    power = np.abs(np.fft.fft2(planes * weight)) ** 2 / (weight**2).sum()
    frequency = np.fft.fftfreq(side) * side
    ring = np.rint(np.hypot(frequency[:, None], frequency[None, :])).astype(int).ravel()
    counts = np.bincount(ring)
    sums = np.bincount(ring, weights=power.mean(axis=0).ravel())
    mean: np.ndarray = (sums / counts)[1 : side // 2 + 1]
    return mean


def slope(power: np.ndarray) -> float | None:
    """Return a of power ~ frequency^a, a line through the logarithms at k = 2 .. N / 2; None without power.

    The lowest frequency is left out: the window blurs it with the mean. Each octave counts alike.
    """
    k = np.arange(1, len(power) + 1)
    used = (k >= 2) & (power > 0)
    if used.sum() < 2:
        return None
    x, y = np.log(k[used]), np.log(power[used])
    weight = 1 / k[used]  # as many rings to an octave as there are frequencies in it
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    return float((weight * x * y).sum() / (weight * x**2).sum())


def high_share(power: np.ndarray) -> float | None:
    """Return the share of the energy at and above HIGH_FREQUENCY, of rings up to 0.5 cycles; None without energy."""
    k = np.arange(1, len(power) + 1)
    energy = power * k  # a ring holds as many frequencies as it is long
    total = energy.sum()
    if total <= 0:
        return None
    return float(energy[k / (2 * len(power)) >= HIGH_FREQUENCY].sum() / total)


def shrink(planes: np.ndarray, f: int) -> np.ndarray:
    """Average f x f pixels of (n, H, W): the image on the latent grid, (n, h, w)."""
    n, height, width = planes.shape
    means: np.ndarray = planes.reshape(n, height // f, f, width // f, f).mean(axis=(2, 4))
    return means
