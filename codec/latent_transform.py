"""Scales and quarter turns that act alike on latents and on images: for training and for measuring equivariance."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch.nn import functional as F

_SCALE_STEPS = 32  # drawn scales are s / 32
_LEAST_SCALE = 8


@dataclass(frozen=True)
class LatentTransform:
    """A scale and quarter turns that act alike on latents and on images.

    EQ-VAE, Kouzelis et al. 2025, arXiv:2502.09509: decode(T(z)) is trained against T(x). We filter before
    shrinking, which their code does not: at a scale of 1/4 bilinear interpolation alone would read a quarter of the
    latents, and ask the decoder for an aliased image.

    Attributes:
        height: rows of the latent grid after scaling, before the turn.
        width: its columns.
        turns: quarter turns anticlockwise, 0..3; odd ones exchange rows and columns.
    """

    height: int
    width: int
    turns: int

    @classmethod
    def draw(cls, rng: np.random.Generator, h: int, w: int, f: int, min_pixels: int = 1) -> Self:
        """Draw a scale s / 32, s uniform in 8..31, and one to three quarter turns.

        Args:
            rng: consumed by two draws, whatever comes out.
            h: rows of the latent grid.
            w: its columns.
            f: downsampling factor.
            min_pixels: shortest side that the image may have afterwards; smaller scales are not drawn, and grids that
                have no smaller scale left are turned only.
        """
        needed = math.ceil(min_pixels / f)
        least = max(_LEAST_SCALE, math.ceil(_SCALE_STEPS * needed / min(h, w)))
        u, turns = rng.random(), int(rng.integers(1, 4))
        scale = least + int(u * (_SCALE_STEPS - least)) if least < _SCALE_STEPS else _SCALE_STEPS
        height, width = (max(1, round(side * scale / _SCALE_STEPS)) for side in (h, w))
        return cls(height, width, turns)

    def latents(self, z: torch.Tensor) -> torch.Tensor:
        """Transform latents (B, D, h, w), raw or normalized: (B, D, height, width), turned; float32."""
        # Resizing as two matrix products: torch's own has a gradient that sums in random order on GPUs.
        rows, columns = (
            _resizing(old, new).to(z.device) for old, new in zip(z.shape[-2:], (self.height, self.width), strict=True)
        )
        with torch.autocast(z.device.type, enabled=False):
            return torch.rot90(rows @ z.float() @ columns.T, self.turns, (-2, -1))

    def image(self, x: torch.Tensor, f: int) -> torch.Tensor:
        """Transform images (B, 3, H, W): (B, 3, height * f, width * f), turned; float32, no gradient passes."""
        with torch.no_grad():
            return torch.rot90(resize(x.float(), self.height * f, self.width * f), self.turns, (-2, -1))


def resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (B, C, H, W) bilinearly, filtered when it shrinks; the same tensor when the size is right."""
    if x.shape[-2:] == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False, antialias=True)


def _resizing(old: int, new: int) -> torch.Tensor:
    """Return the matrix, (new, old) float32 on the CPU, by which `resize` maps one axis: what it makes of the unit."""
    return resize(torch.eye(old)[None, None], new, old)[0, 0]
