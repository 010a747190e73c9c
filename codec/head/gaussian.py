"""Independent Gaussians: posteriors q(u|z, c), priors p(u|c). Everything is per unit, in nats; `total` adds units up.

Computed in float32 at least, whatever the networks around compute in. Imports torch alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_LOGVAR, MOST_LOGVAR = -12.0, 6.0
"""What log-variances of networks are clamped to."""
_LOG_2_PI = math.log(2 * math.pi)


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or in their own type where it is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def total(values: Tensor) -> Tensor:
    """Sum over everything but the first axis: (B, ...) -> (B,)."""
    return values.flatten(1).sum(1)


def standard_log_prob(u: Tensor) -> Tensor:
    """Return the log-density of N(0, 1) at each element, in nats."""
    return -0.5 * (wide(u).square() + _LOG_2_PI)


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians, one for each unit.

    Attributes:
        mean: (B, ...), float32 or wider.
        logvar: the same shape.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def of(cls, both: Tensor) -> "Gaussian":
        """Return those whose means and log-variances are the halves of (B, 2 n, ...); log-variances are clamped."""
        mean, logvar = wide(both).chunk(2, dim=1)
        return cls(mean, logvar.clamp(LEAST_LOGVAR, MOST_LOGVAR))

    @classmethod
    def standard(cls, like: Tensor) -> "Gaussian":
        """Return N(0, I) of the shape, type and device of a tensor."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def at(self, noise: Tensor | None, temperature: float = 1.0) -> Tensor:
        """Return mean + temperature * deviation * noise, differentiable in both (Kingma & Welling 2013, section 2.4).

        Args:
            noise: standard normal, of the mean's shape, or with more axes in front; None = the mean.
            temperature: factor of the deviation; 0 = the mean.
        """
        return self.mean if noise is None else self.mean + temperature * torch.exp(0.5 * self.logvar) * noise

    def log_prob(self, u: Tensor) -> Tensor:
        """Return the log-density at u in nats, per unit: the shape of u, which may have more axes in front."""
        squared = (wide(u) - self.mean).square() * torch.exp(-self.logvar)
        return -0.5 * (squared + self.logvar + _LOG_2_PI)

    def kl(self, other: "Gaussian | None" = None) -> Tensor:
        """Return KL(self || other) in nats, per unit: (B, ...).

        Args:
            other: None = N(0, I). Kingma & Welling 2013, appendix B, arXiv:1312.6114.
        """
        if other is None:
            return 0.5 * (self.mean.square() + torch.expm1(self.logvar) - self.logvar)
        ratio = self.logvar - other.logvar
        distance = (self.mean - other.mean).square() * torch.exp(-other.logvar)
        return 0.5 * (torch.expm1(ratio) + distance - ratio)
