"""A linear preview of latents: what an image in the making looks like, at the size of its latents, for next to nothing.

    z, normalized (D, h, w) -> weight (D, 3), bias (3,) -> the image, averaged over f x f pixels, uint8 (h, w, 3)

Fitted by least squares to training images. Normalized latents, because those are what a sampler has; ComfyUI's and
InvokeAI's factors are for the same. Stored as `preview` in codec.json. Imports neither torch nor diffusers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codec import facts
from codec.errors import ModelError

SPACE = "normalized"
_FEWEST_ROWS = 4  # positions for each unknown of one colour; fewer would fit anything
_RANK_TOLERANCE = 1e-8  # directions of the latents that vary less than this share of the widest one say nothing


@dataclass(frozen=True, eq=False)
class Preview:
    """A fitted preview.

    Attributes:
        weight: (D, 3) float32.
        bias: (3,) float32.
        r2: (3,) float32, share of the variance of each colour, R, G, B, that it explains on the images that it was
            fitted to; 0 where they do not vary.
    """

    weight: np.ndarray
    bias: np.ndarray
    r2: np.ndarray

    def apply(self, z: np.ndarray) -> np.ndarray:
        """Return the preview of normalized latents: (D, h, w) float -> (h, w, 3) uint8.

        Raises:
            ValueError: another rank or number of channels.
        """
        if z.ndim != 3 or z.shape[0] != len(self.weight):
            raise ValueError(f"expected latents ({len(self.weight)}, h, w), got {z.shape}")
        x = np.einsum("dhw,dc->hwc", z.astype(np.float32), self.weight) + self.bias
        pixels: np.ndarray = np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)
        return pixels

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "weight": self.weight.tolist(),
            "bias": self.bias.tolist(),
            "r2": self.r2.tolist(),
            "space": SPACE,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Preview":
        """Return what `to_json` described.

        Raises:
            ModelError: damaged, or for latents of another space.
        """
        try:
            weight, bias, r2 = (np.asarray(document[name], np.float32) for name in ("weight", "bias", "r2"))
            space = document["space"]
        except (KeyError, TypeError, ValueError) as exception:
            raise ModelError(f"damaged preview: {type(exception).__name__}: {exception}") from exception
        if weight.ndim != 2 or weight.shape[1:] != (3,) or bias.shape != (3,) or r2.shape != (3,):
            raise ModelError(f"damaged preview: weight {weight.shape}, bias {bias.shape}, expected (D, 3) and (3,)")
        if space != SPACE:
            raise ModelError(f"a preview of {space} latents, expected {SPACE} ones")
        return cls(weight, bias, r2)


class PreviewFit:
    """Gathers latents and images, in any number, and fits a preview to them; it keeps nothing but moments."""

    def __init__(self, channels: int) -> None:
        self._channels = channels
        self._n = 0
        self._mean = np.zeros(channels + 3)
        self._scatter = np.zeros((channels + 3, channels + 3))  # sum of outer products of deviations

    def update(self, z: np.ndarray, image: np.ndarray) -> None:
        """Add an image.

        Args:
            z: (D, h, w), its latents: all images' raw, or all normalized by one factor and shift.
            image: (h * f, w * f, C) uint8; of more than three channels the first three are taken.

        Raises:
            ValueError: the image's sides are no multiples of the latents' (the same for both).
        """
        _, h, w = z.shape
        height, width = image.shape[:2]
        f = height // h
        if (h * f, w * f) != (height, width):
            raise ValueError(f"an image of {height} x {width} pixels does not fit latents of {h} x {w}")
        mean = image[..., :3].reshape(h, f, w, f, 3).mean(axis=(1, 3)) / 127.5 - 1
        rows = np.concatenate([np.moveaxis(z, 0, -1).reshape(h * w, -1), mean.reshape(h * w, 3)], axis=1)
        own = rows.mean(axis=0, dtype=np.float64)
        deviations = rows - own
        # Pairwise update of moments, Chan, Golub and LeVeque 1979.
        total, delta = self._n + h * w, own - self._mean
        self._scatter += deviations.T @ deviations + np.outer(delta, delta) * (self._n * h * w / total)
        self._mean += delta * (h * w / total)
        self._n = total

    def solve(self, scale: float | np.ndarray = 1.0, shift: float | np.ndarray = 0.0) -> Preview | None:
        """Return the least-squares fit, for latents that are (z - shift) * scale of those given; (D,) or a number.

        None where there were too few positions to fit it to, or values that are not finite.
        """
        n = self._channels
        covariance = self._scatter / max(self._n, 1)
        if self._n < _FEWEST_ROWS * (n + 1) or not np.isfinite(covariance).all():
            return None
        deviation = np.sqrt(np.diag(covariance)[:n])
        deviation = np.where(deviation > 0, deviation, 1.0)  # a channel that is constant gets weight 0 below
        correlation = covariance[:n, :n] / np.outer(deviation, deviation)
        with_image = covariance[:n, n:] / deviation[:, None]
        weight = (np.linalg.pinv(correlation, rcond=_RANK_TOLERANCE, hermitian=True) @ with_image) / deviation[:, None]
        bias = self._mean[n:] - self._mean[:n] @ weight
        variance = np.diag(covariance)[n:]
        explained = (weight * covariance[:n, n:]).sum(axis=0)
        r2 = np.where(variance > 0, explained / np.where(variance > 0, variance, 1.0), 0.0)
        scales, shifts = (np.broadcast_to(value, n).reshape(n, 1) for value in (scale, shift))
        parts = weight / scales, bias + (shifts * weight).sum(axis=0), r2
        return Preview(*(part.astype(np.float32) for part in parts))


def read(folder: Path) -> Preview | None:
    """Return the preview that is stored in a model folder; None where there is none.

    Raises:
        ModelError: it is damaged.
    """
    stored = facts.read(folder).get("preview")
    try:
        return None if stored is None else Preview.from_json(stored)
    except ModelError as exception:
        raise ModelError(f"{folder}: {exception}") from exception


def write(folder: Path, preview: Preview) -> None:
    """Store a preview in a model folder, in place of an older one."""
    facts.update(folder, preview=preview.to_json())
