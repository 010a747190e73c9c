"""Finite scalar quantisation: a codebook that is a lattice, whose cells tile the latent space (Mentzer et al. 2023).

z (B, D, h, w) -> bounded (B, D, h, w) -> rounded: cells -> index (B, h, w) in [0, K), K = product of the levels
"""

from collections.abc import Sequence

import torch

_SLACK = 1e-3  # the outermost cells are reached before tanh saturates


def bounded(z: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Squash latents so that rounding gives one of `levels` integers in each channel; differentiable.

    Args:
        z: (B, D, ...) raw latents.
        levels: D numbers >= 2.

    Returns:
        (B, D, ...) whose rounding lies in [-(L // 2), (L - 1) // 2].
    """
    # Mentzer et al. 2023 eq. 2 and appendix A.1, arXiv:2309.15505
    half, offset = _halves(z, levels)
    return torch.tanh(centred(z, levels)) * half - offset


def excess(z: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Return how far latents lie beyond the middle of the outermost cells, in units of z; 0 within. Differentiable.

    Out there tanh is flat: latents that wander off have no gradient that would bring them back.

    Args:
        z: (B, D, ...) raw latents.
        levels: D numbers >= 2.

    Returns:
        (B, D, ...) >= 0.
    """
    half, _ = _halves(z, levels)
    middle = torch.atanh((half - 0.25) / half)  # the outermost cell is half a unit wide
    return (centred(z, levels).abs() - middle).clamp(min=0)


def centred(z: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Return latents moved so that 0 is the middle of the lattice, of the same shape."""
    half, offset = _halves(z, levels)
    return z + torch.atanh(offset / half)


def _halves(z: torch.Tensor, levels: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the width of all cells, and what an even number of them is moved by; each (1, D, 1 ...)."""
    count = torch.tensor(levels, dtype=z.dtype, device=z.device).reshape(1, -1, *[1] * (z.ndim - 2))
    return (count - 1) * (1 + _SLACK) / 2, 0.5 * (1 - count % 2)


def cells(z: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Return the integer coordinates of the cells that latents lie in, (B, D, ...) int64, from 0 on; NaN has some."""
    first = torch.tensor([level // 2 for level in levels], device=z.device).reshape(1, -1, *[1] * (z.ndim - 2))
    last = torch.tensor(levels, device=z.device).reshape(first.shape) - 1
    found = bounded(z, levels).round().nan_to_num().long() + first
    return torch.minimum(found.clamp(min=0), last)  # of 1000 levels the slack is half a cell


def to_index(coordinates: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """Number cells: (B, D, ...) int64 -> (B, ...) int64 in [0, K); the first channel counts fastest."""
    index = torch.zeros_like(coordinates[:, 0])
    for n in reversed(range(len(levels))):
        index = index * levels[n] + coordinates[:, n]
    return index


def codebook(levels: Sequence[int]) -> torch.Tensor:
    """Return the vector of each cell, (K, D) float32 in [-1, 1], in the order of `to_index`.

    Each coordinate is the rounded latent divided by half the number of levels, rounded down.
    """
    axes = [(torch.arange(level, dtype=torch.float32) - level // 2) / (level // 2) for level in levels]
    # The last axis varies fastest in cartesian_prod: reversed on the way in and out.
    grid = torch.cartesian_prod(*reversed(axes)).reshape(-1, len(levels))
    return grid.flip(1).contiguous()
