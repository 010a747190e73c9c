"""Rectified flow on latents: what is mixed and predicted, how samples are drawn, what the error says of their density.

z (t = 0)  ---  z_t = (1 - t) z + t noise  ---  noise (t = 1);    velocity = noise - z, the same for all t

Imports torch alone.
"""

import math
from collections.abc import Callable

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(z_t (B, D, h, w), t (B,)) -> the predicted velocity, (B, D, h, w)."""
_BOUND_START = 1e-2  # smallest time of `bound_times`


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


@torch.inference_mode()
def sample(velocity: Velocity, noise: torch.Tensor, n_steps: int, *, heun: bool = False) -> torch.Tensor:
    """Follow the velocity from noise to latents, in equal steps.

    Args:
        velocity: see `Velocity`.
        noise: (B, D, h, w) standard normal.
        n_steps: steps, each one call of `velocity`.
        heun: in each step but the last call it a second time, where the first led to, and take the mean of both.

    Returns:
        (B, D, h, w) normalized latents.
    """
    z = noise
    for step in range(n_steps):
        t = torch.full((len(z),), 1 - step / n_steps, device=z.device)
        slope = velocity(z, t)
        if heun and step < n_steps - 1:
            slope = (slope + velocity(z - slope / n_steps, t - 1 / n_steps)) / 2
        z = z - slope / n_steps
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


def bound_times(uniform: torch.Tensor) -> torch.Tensor:
    """Return times of `density_bound`, evenly spread in log t over [0.01, 1], of uniform numbers in [0, 1)."""
    return _BOUND_START ** (1 - uniform)


def density_bound(error: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return an upper bound of -log p(z) in nats per number, unbiased over times of `bound_times` and over noise.

        E[(1 - t) / t |v - v_hat|^2 over t from s to 1] + log(s / (1 - s)) + log(2 pi e) / 2,    s = 0.01

    The variational bound of a diffusion in continuous time, 1/2 E[-SNR'(t) |z - z_hat|^2] and what is left at t = s
    (Kingma et al. 2021, arXiv:2107.00630), with SNR = ((1 - t) / t)^2 and z_hat = z_t - t v_hat; the rest is the code
    of z given z_s, a Gaussian of deviation s / (1 - s). The best velocity meets the bound as s goes to 0.

    Args:
        error: squared error of the velocity, mean over D, h, w.
        t: where it was made.
    """
    rest = math.log(_BOUND_START / (1 - _BOUND_START)) + 0.5 * math.log(2 * math.pi * math.e)
    return (1 - t) * -math.log(_BOUND_START) * error + rest
