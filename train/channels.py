"""What an image's channels mean to the losses: three are RGB, the fourth of an image file is alpha, others are bands.

    x (B, C, H, W) in [-1, 1] -> compared: what the pixel term compares      RGB, bands: x; RGBA: composite, alpha
                              -> seen (B, 3, H, W): what features look at    RGBA: composite; bands: the first three
                              -> judged: what the discriminator judges       RGBA: composite; bands: all

Colours of an RGBA image are straight, not multiplied by alpha. Where it is transparent they mean nothing, so they count
only as far as they show: on a background that is drawn for each image anew, so that no colour of it can be relied on
(AlphaVAE, arXiv:2507.09308, and LayerDiffuse, arXiv:2402.17113, compare what is composited too).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval.metrics import psnr
from train import draws

_WHITE = 1.0


@dataclass(frozen=True)
class Channels:
    """The channels of a run's images.

    Attributes:
        count: C.
        alpha: whether the fourth of four is alpha.
    """

    count: int = 3
    alpha: bool = False

    @classmethod
    def of(cls, count: int, samples: str) -> "Channels":
        """Return what `model.image_channels` and `data.samples` say."""
        return cls(count, alpha=count == 4 and samples == "image")

    @property
    def plain(self) -> bool:
        """Whether these are ordinary pictures, RGB."""
        return self.count == 3

    @property
    def judged_count(self) -> int:
        """Channels of what the discriminator judges."""
        return 3 if self.alpha else self.count

    def describe(self) -> str:
        """Name them."""
        if self.plain:
            return "RGB"
        return "RGBA (straight colours, alpha last)" if self.alpha else f"{self.count} bands"

    def draw_background(self, seed: int, positions: Sequence[int]) -> torch.Tensor | None:
        """Return the colour behind each image, (B, 3, 1, 1) uniform in [-1, 1); None where nothing is transparent."""
        if not self.alpha:
            return None
        return 2.0 * draws.uniform(seed, draws.BACKGROUND, positions, (3,))[:, :, None, None] - 1.0

    def compared(self, x: torch.Tensor, background: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the pixel term compares, (B, C, H, W); a background of None is white."""
        return torch.cat([composite(x, background), x[:, 3:]], dim=1) if self.alpha else x

    def seen(self, x: torch.Tensor, background: torch.Tensor | None = None) -> torch.Tensor:
        """Return what features of RGB images look at, (B, 3, H, W); a background of None is white."""
        return composite(x, background) if self.alpha else x[:, :3]

    def judged(self, x: torch.Tensor, background: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the discriminator judges, (B, judged_count, H, W); a background of None is white."""
        return composite(x, background) if self.alpha else x

    def picture(self, image: np.ndarray) -> np.ndarray:
        """Return (H, W, 3) uint8 to look at, of (H, W, C) uint8: RGBA on white, the first three bands."""
        if not self.alpha:
            return np.ascontiguousarray(image[..., :3])
        weight = image[..., 3:].astype(np.float64) / 255
        on_white: np.ndarray = (image[..., :3] * weight + 255 * (1 - weight)).round().astype(np.uint8)
        return on_white

    def measured(self, image: np.ndarray, x_hat: np.ndarray) -> dict[str, float]:
        """Return metrics of a reconstruction.

        Args:
            image: (H, W, C) uint8.
            x_hat: the same shape.

        Returns:
            psnr: dB, of RGB, of RGBA on white, or over all bands. alpha_error: mean absolute error of alpha in levels,
            0..255 (RGBA only).
        """
        if self.plain:
            return {"psnr": psnr(image, x_hat)}
        if self.alpha:
            error = np.abs(image[..., 3].astype(np.float64) - x_hat[..., 3]).mean()
            return {"psnr": psnr(self.picture(image), self.picture(x_hat)), "alpha_error": float(error)}
        mse = float(np.mean((image.astype(np.float64) - x_hat) ** 2))
        return {"psnr": 10 * math.log10(255**2 / mse) if mse else math.inf}


def composite(x: torch.Tensor, background: torch.Tensor | None) -> torch.Tensor:
    """Lay RGBA images over a colour.

    Args:
        x: (B, 4, H, W) in [-1, 1], alpha last, 1 = opaque; values outside (of a reconstruction) are not clamped.
        background: (B, 3, 1, 1) in [-1, 1]; None = white.

    Returns:
        (B, 3, H, W), with a gradient to x.
    """
    alpha = (x[:, 3:] + 1.0) / 2.0
    behind = x.new_tensor(_WHITE) if background is None else background.to(x)
    return alpha * x[:, :3] + (1.0 - alpha) * behind
