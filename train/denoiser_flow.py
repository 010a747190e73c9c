"""What the loss of a denoiser is measured at, and against: times in every part of (0, 1), the best linear prediction.

The flow itself is `codec.rectified_flow`.
"""

import torch

N_BINS = 10
"""Parts of (0, 1) that the loss is reported in."""
_SMALLEST_TIME = 1e-3


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
