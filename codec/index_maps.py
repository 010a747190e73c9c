"""The maps of indices that a model with codebooks makes of an image, and the planes that one array holds them in.

    grids [(h, w), (2h, 2w)] <-> planes (1 + 4, h, w)      a finer map is cut into one plane for each place (dy, dx)

Must not import torch: the coder works with these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class IndexMap:
    """One map of indices.

    Attributes:
        codebook_size: K.
        scale: how many of its positions stand on one of the coarsest map's, along each axis: 1, 2, ...
    """

    codebook_size: int
    scale: int


def planes(maps: Sequence[IndexMap]) -> int:
    """Return the number of planes, C, that maps take up together."""
    return sum(each.scale**2 for each in maps)


def to_planes(grids: Sequence[np.ndarray]) -> np.ndarray:
    """Cut grids into planes of the size of the first: plane (dy, dx) of a grid holds its [dy::s, dx::s], row-major.

    Args:
        grids: (h*s, w*s) integers each, coarsest first, which has s = 1.

    Returns:
        (C, h, w) of the first grid's type: the planes of the first grid, then those of the second, ...

    Raises:
        ValueError: grids whose sides are not one multiple of the first's.
    """
    h, w = grids[0].shape
    parts = []
    for grid in grids:
        scale = grid.shape[0] // h
        if grid.shape != (h * scale, w * scale) or not scale:
            raise ValueError(f"a grid of {grid.shape} beside one of {(h, w)}: expected the same multiple of both sides")
        cut = grid.reshape(h, scale, w, scale).transpose(1, 3, 0, 2)  # (dy, dx, h, w)
        parts.append(cut.reshape(scale**2, h, w))
    return np.concatenate(parts).astype(grids[0].dtype, copy=False)


def to_grids(cut: np.ndarray, maps: Sequence[IndexMap]) -> list[np.ndarray]:
    """Put planes together to the grids that they are of; the inverse of `to_planes`.

    Args:
        cut: (C, h, w) integers.
        maps: as many as there are grids.

    Returns:
        (h*s, w*s) each, C-contiguous.

    Raises:
        ValueError: another number of planes than the maps take up.
    """
    if cut.ndim != 3 or len(cut) != planes(maps):
        raise ValueError(f"indices of shape {cut.shape}, expected ({planes(maps)}, h, w)")
    h, w = cut.shape[1:]
    grids, first = [], 0
    for each in maps:
        scale = each.scale
        part = cut[first : first + scale**2].reshape(scale, scale, h, w).transpose(2, 0, 3, 1)  # (h, dy, w, dx)
        grids.append(np.ascontiguousarray(part.reshape(h * scale, w * scale)))
        first += scale**2
    return grids
