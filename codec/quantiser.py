"""Raw latents to integer latents and back; FORMAT.md section 1.

    z (raw, D channels) -> round((z - mean_c) / (step_c * 2^(-q/16))) = indices -> mean_c + index * step_c * 2^(-q/16)

Must not import torch.
"""

import numpy as np

QUALITIES = 101  # q = 0 (coarsest) .. 100 (finest)
QUALITY_PER_OCTAVE = 16  # the step halves every 16 units of q
INDEX_LIMIT = 1 << 20  # |index| <= this; latents beyond it are clamped by the encoder


def step_scale(quality: int) -> float:
    """Return 2^(-q/16), which multiplies the per-channel steps (1 at q = 0, 0.0131 at q = 100)."""
    return float(2.0 ** (-quality / QUALITY_PER_OCTAVE))


def to_steps(z: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> np.ndarray:
    """Return (z - mean_c) / (step_c * 2^(-q/16)), (D, ...) float64: raw latents in units of the step, not rounded.

    Args:
        z: (D, ...) float raw latents.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.
        quality: 0..100.

    Raises:
        ValueError: z holds a value that is not finite.
    """
    if not np.isfinite(z).all():
        raise ValueError("latents are not finite")
    shape = (-1,) + (1,) * (z.ndim - 1)
    scaled: np.ndarray = (z.astype(np.float64) - mean.reshape(shape)) / (
        step.astype(np.float64).reshape(shape) * step_scale(quality)
    )
    return scaled


def to_indices(z: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> np.ndarray:
    """Quantise raw latents: (D, ...) -> int32, half to even, clamped to +-INDEX_LIMIT. See `to_steps`."""
    return round_steps(to_steps(z, mean, step, quality))


def round_steps(scaled: np.ndarray) -> np.ndarray:
    """Round latents in units of the step to int32 indices, half to even, clamped to +-INDEX_LIMIT."""
    indices: np.ndarray = np.clip(np.rint(scaled), -INDEX_LIMIT, INDEX_LIMIT).astype(np.int32)
    return indices


def from_steps(scaled: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> np.ndarray:
    """Return the raw latents, (D, ...) float32, of latents in units of the step: the inverse of `to_steps`."""
    shape = (-1,) + (1,) * (scaled.ndim - 1)
    scale = step.astype(np.float64).reshape(shape) * step_scale(quality)
    z: np.ndarray = (scaled * scale + mean.reshape(shape)).astype(np.float32)
    return z


def entropy_bits(z: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> float:
    """Return the order-0 entropy of quantised (D, N) latents in bits per column: sum over channels, mean over N."""
    total = 0.0
    for plane in to_indices(z, mean, step, quality):
        counts = np.unique(plane, return_counts=True)[1].astype(np.float64)
        total -= float((counts / plane.size * np.log2(counts / plane.size)).sum())
    return total
