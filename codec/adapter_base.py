"""What every adapter gives and does; see `codec.latent_model.LatentModel`. Imports torch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Posterior:
    """q(z|x) of a batch, raw latents.

    Attributes:
        mean: (B, D, h, w) float32.
        logvar: (B, D, h, w) float32, clamped by diffusers to [-30, 20]; None for a family without a variance.
    """

    mean: torch.Tensor
    logvar: torch.Tensor | None


@dataclass(frozen=True)
class Normalisation:
    """What a diffusion model's pipeline does between raw and normalized latents: (z - shift) * scale.

    Attributes:
        shift: one number; or (D, p, p), which repeats over the latent grid, p = 1 or the side of a patch.
        scale: the same.
    """

    shift: float | torch.Tensor
    scale: float | torch.Tensor

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the normalized latents of raw ones; (B, D, h, w), in the type and on the device of z."""
        return (z - _spread(self.shift, z)) * _spread(self.scale, z)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the raw latents of normalized ones; (B, D, h, w), in the type and on the device of z."""
        return z / _spread(self.scale, z) + _spread(self.shift, z)

    def deviation(self, z: torch.Tensor) -> torch.Tensor | float:
        """Return what one unit of normalized latents is in raw ones: a number, or (D, h, w) for z, (B, D, h, w)."""
        return 1 / _spread(self.scale, z)


def _spread(values: float | torch.Tensor, z: torch.Tensor) -> torch.Tensor | float:
    if isinstance(values, float):
        return values
    (h, w), (rows, columns) = z.shape[-2:], values.shape[-2:]
    repeated = values.repeat(1, -(-h // rows), -(-w // columns))
    return repeated[:, :h, :w].to(z)


class Adapter:
    """What all adapters do alike."""

    scaling_factor: float
    shift_factor: float
    receptive_field: int | None = None  # GroupNorm and attention look at the whole image

    @property
    def normalisation(self) -> Normalisation:
        """See `LatentModel.normalisation`."""
        return Normalisation(self.shift_factor, self.scaling_factor)

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.normalize`."""
        return self.normalisation.normalize(z)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """See `LatentModel.denormalize`."""
        return self.normalisation.denormalize(z)
