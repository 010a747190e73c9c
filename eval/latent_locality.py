"""How far one latent cell reaches: cells that steer a whole image are what diffusion models get wrong ("black holes").

z, z + one cell's change -> decode both -> squared difference by distance from the cell
"""

from dataclasses import dataclass

import numpy as np
import torch

from codec.latent_model import LatentModel
from eval.latent_probes import decode

VISIBLE = 1 / 127.5
"""Of a pixel in [-1, 1]: one 8-bit level."""
_NUMERICAL = 1e-6  # smaller differences are the order of a sum, not the cell's influence


@dataclass(frozen=True)
class CellReach:
    """What one changed cell did.

    Attributes:
        row: of the cell in the latent grid.
        column: the same.
        largest: whether it was chosen as the image's cell of largest norm, else at random.
        energy: (max(H, W),) squared difference summed over pixels at each distance. The distance of a pixel is 0
            inside the cell's f x f pixels, else the larger of the rows and the columns to them.
        reach_px: farthest distance of any change.
        visible_px: farthest distance of a change by an 8-bit level or more.
    """

    row: int
    column: int
    largest: bool
    energy: np.ndarray
    reach_px: int
    visible_px: int

    def share_within(self, distance: int) -> float | None:
        """Return the share of the squared difference up to a distance in pixels; None if nothing changed."""
        total = float(self.energy.sum())
        return float(self.energy[: distance + 1].sum()) / total if total > 0 else None


def cell_reaches(model: LatentModel, z: torch.Tensor, n_random: int, rng: np.random.Generator) -> list[CellReach]:
    """Change cells of an image one at a time: the one of largest norm, and others at random.

    Args:
        z: (1, D, h, w) raw. A cell is changed by one deviation of normalized latents in every channel, up or down at
            random.
        n_random: cells besides that of the largest norm.
    """
    _, channels, h, w = z.shape
    norm = (z[0] - z[0].mean(dim=(1, 2), keepdim=True)).square().sum(dim=0)
    largest = int(norm.argmax())
    others = [int(cell) for cell in rng.permutation(h * w) if cell != largest][:n_random]
    cells = [largest, *others]
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (len(cells), channels)).astype(np.float32)).to(z.device)
    changed = z.repeat(1 + len(cells), 1, 1, 1)
    for n, cell in enumerate(cells):
        changed[1 + n, :, cell // w, cell % w] += signs[n] / model.scaling_factor
    base, *images = decode(model, changed)
    found = []
    for n, (cell, image) in enumerate(zip(cells, images, strict=True)):
        difference = (image - base).abs().double().cpu().numpy()
        found.append(_reach(difference, *divmod(cell, w), model.f, largest=n == 0))
    return found


def _reach(difference: np.ndarray, row: int, column: int, f: int, *, largest: bool) -> CellReach:
    """Return what a cell did, from the absolute difference of the two images, (3, H, W)."""
    height, width = difference.shape[1:]
    distance = np.maximum(_distances(height, row, f)[:, None], _distances(width, column, f)[None, :])
    energy = np.bincount(distance.ravel(), weights=(difference**2).sum(axis=0).ravel(), minlength=max(height, width))
    peak = difference.max(axis=0)
    reach, visible = (int(distance[peak >= least].max(initial=0)) for least in (_NUMERICAL, VISIBLE))
    return CellReach(row, column, largest, energy, reach, visible)


def _distances(side: int, cell: int, f: int) -> np.ndarray:
    """Return for each pixel of an axis how far it is from the pixels cell * f .. cell * f + f - 1."""
    pixel = np.arange(side)
    return np.maximum(0, np.maximum(cell * f - pixel, pixel - (cell * f + f - 1)))
