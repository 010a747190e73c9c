"""Rectified flow on normalized latents: what is mixed, what is predicted, and how samples are drawn.

z (t = 0)  ---  z_t = (1 - t) z + t noise  ---  noise (t = 1);    velocity = noise - z, the same for all t
"""

from collections.abc import Callable

import torch

N_BINS = 10
"""Parts of (0, 1) that the loss is reported in."""
_SMALLEST_TIME = 1e-3

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(z_t (B, D, h, w), t (B,)) -> the predicted velocity, (B, D, h, w)."""


def mix(z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z_t and the velocity that leads there.

    Args:
        z: (B, D, h, w) normalized latents.
        noise: the same shape, standard normal.
        t: (B,) in [0, 1]; 0 = latents, 1 = noise.

    Returns:
        z_t and velocity, (B, D, h, w) each.
    """
    # Rectified flow: Liu et al. 2022, arXiv:2209.03003 eq. 1, in the direction of Esser et al. 2024, arXiv:2403.03206.
    at = t[:, None, None, None]
    return (1 - at) * z + at * noise, noise - z


def training_times(normal: torch.Tensor) -> torch.Tensor:
    """Return times of training, (B,) in (0, 1), of standard normal numbers (B,): logit-normal, the middle preferred."""
    # Esser et al. 2024, arXiv:2403.03206, section 3.1, logit-normal with m = 0, s = 1.
    return torch.sigmoid(normal)


def measured_times(uniform: torch.Tensor) -> torch.Tensor:
    """Return times of a measurement, one in each bin, (..., N_BINS), of as many uniform numbers in [0, 1)."""
    return ((torch.arange(N_BINS) + uniform) / N_BINS).clamp_min(_SMALLEST_TIME)


def marginal_velocity(z_t: torch.Tensor, t: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Predict the velocity from each element of z_t alone, knowing nothing but its channel's mean and deviation.

    The best linear prediction; what a network does better is what it knows about structure: neighbours, other
    channels, the class, the shape of the distribution. Means of the squared errors of both, at the same z_t, have a
    ratio that neither the latents' scale nor the number of channels enters.

    Args:
        z_t: (B, D, h, w).
        t: (B,) in (0, 1].
        mean: (D,) of the latents z.
        std: (D,).

    Returns:
        (B, D, h, w).
    """
    # E[noise - z | z_t] where z ~ N(mean, std^2) and noise ~ N(0, 1) are independent: z_t has the variance
    # (1 - t)^2 std^2 + t^2, its covariance with noise is t, with z (1 - t) std^2.
    at, variance = t[:, None, None, None], std.square()[:, None, None]
    centred = z_t - (1 - at) * mean[:, None, None]
    gain = (at - (1 - at) * variance) / ((1 - at).square() * variance + at.square())
    return gain * centred - mean[:, None, None]


@torch.inference_mode()
def sample(velocity: Velocity, noise: torch.Tensor, n_steps: int) -> torch.Tensor:
    """Follow the velocity from noise to latents, in equal Euler steps.

    Args:
        velocity: see `Velocity`.
        noise: (B, D, h, w) standard normal.
        n_steps: calls of `velocity`.

    Returns:
        (B, D, h, w) normalized latents.
    """
    z = noise
    for step in range(n_steps):
        t = torch.full((len(z),), 1 - step / n_steps, device=z.device)
        z = z - velocity(z, t) / n_steps
    return z


def guided(conditional: Velocity, unconditional: Velocity, weight: float) -> Velocity:
    """Return the velocity under classifier-free guidance; weight 1 is the conditional one itself, at half the cost."""
    if weight == 1:
        return conditional

    # Ho & Salimans 2022, arXiv:2207.12598 eq. 6, with weight = 1 + w.
    def both(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without = unconditional(z, t)
        return without + weight * (conditional(z, t) - without)

    return both
