"""Order and neighbours of the context coder: where the causes of every index of a grid lie; FORMAT.md section 5.3.

The order is that of a wavefront, t = x + 2 * y + c: all causes of an index lie on earlier fronts. Must not
import torch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

N_NEIGHBOURS = 9  # W, N, NW, NE, WW, NN, and those beside NW, NN on the left and NN on the right
N_PREVIOUS = 4  # channels c - 1 .. c - 4 at the same position
N_CAUSES = N_NEIGHBOURS + N_PREVIOUS
_CACHED_SYMBOLS = 1 << 18  # grids up to this size keep their geometry


@dataclass(frozen=True)
class Geometry:
    """Order and neighbours of a grid.

    Attributes:
        shape: (D, h, w).
        neighbours: (9, h*w) int64, where each neighbour is in its plane; h*w = an empty cell, whose value is 0.
        order: (D*h*w,) int64, flat (D, h, w) positions in the order of coding.
        ends: where each front begins in `order`, and at last its length.
    """

    shape: tuple[int, int, int]
    neighbours: np.ndarray
    order: np.ndarray
    ends: list[int]

    def causes(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (n,) cells, (26, n) cells of causes in the state of a `Wavefront`, and (n,) channels."""
        plane = self.shape[1] * self.shape[2]
        channels, within = np.divmod(positions, plane)
        cells = channels * (plane + 1) + within
        total = self.shape[0] * (plane + 1)
        causes = np.empty((2 * N_CAUSES, positions.size), np.int64)
        np.add(self.neighbours[:, within], channels * (plane + 1), out=causes[:N_NEIGHBOURS])
        for k in range(1, N_PREVIOUS + 1):
            earlier = np.where(channels >= k, cells - k * (plane + 1), plane)
            causes[N_NEIGHBOURS + k - 1] = earlier + total
        causes[N_CAUSES : N_CAUSES + N_NEIGHBOURS] = causes[:N_NEIGHBOURS] + total
        causes[N_CAUSES + N_NEIGHBOURS :] = causes[N_NEIGHBOURS:N_CAUSES]
        return cells, causes, channels


def geometry(shape: tuple[int, int, int]) -> Geometry:
    """Return order and neighbours of a (D, h, w) grid."""
    found: Geometry = (_cached_geometry if np.prod(shape) <= _CACHED_SYMBOLS else _geometry)(shape)
    return found


def _geometry(shape: tuple[int, int, int]) -> Geometry:
    channels, height, width = shape
    y, x = np.divmod(np.arange(height * width), width)
    front = (np.arange(channels)[:, None] + (x + 2 * y)).reshape(-1)  # (D * h * w,)
    order = np.argsort(front, kind="stable")
    ends = np.concatenate([[0], np.cumsum(np.bincount(front))])
    return Geometry(shape, neighbour_cells(height, width), order, np.unique(ends).tolist())


_cached_geometry = lru_cache(maxsize=8)(_geometry)


def neighbour_cells(height: int, width: int) -> np.ndarray:
    """Return where the nine neighbours of every cell lie in its plane, (9, h*w) int64.

    What lies outside is replaced: W and N by each other, the first cell's by the empty cell h*w; WW by W; the others
    of the row above by N; those of the row above that by NN, which itself is replaced by N.
    """
    here = np.arange(height * width)
    y, x = np.divmod(here, width)
    left, above = x > 0, y > 0
    west = np.where(left, here - 1, np.where(above, here - width, here.size))
    north = np.where(above, here - width, west)
    above_that = np.where(y > 1, here - 2 * width, north)
    return np.stack(
        [
            west,
            north,
            np.where(left & above, here - width - 1, north),
            np.where((x < width - 1) & above, here - width + 1, north),
            np.where(x > 1, here - 2, west),
            above_that,
            np.where((x > 1) & above, here - width - 2, north),
            np.where(left & (y > 1), here - 2 * width - 1, above_that),
            np.where((x < width - 1) & (y > 1), here - 2 * width + 1, above_that),
        ]
    )
