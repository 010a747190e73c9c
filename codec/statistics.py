"""Streaming statistics of raw latents, float64: what scaling_factor, shift_factor, mean and step are measured by."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from codec.latent_model import Posterior


@dataclass(frozen=True)
class LatentSummary:
    """Statistics of the raw latents of a set of images; the mean of the posterior, never a sample.

    Attributes:
        n_images: images seen.
        n_positions: latent positions seen (sum of h * w).
        mean: (D,) per-channel mean.
        std: (D,) per-channel standard deviation of the posterior's mean.
        posterior_std: (D,) root mean square of the posterior's standard deviation; zeros where there is no variance.
        kl_nats: (D,) KL(q(z|x) || N(0, I)) per latent position, nats; zeros where there is no variance.
        global_mean: mean over all channels: shift_factor.
        global_std: standard deviation over all channels: 1 / scaling_factor.
        sampled_std: the same for a sample of the posterior, which diffusion trainers often draw.
    """

    n_images: int
    n_positions: int
    mean: np.ndarray
    std: np.ndarray
    posterior_std: np.ndarray
    kl_nats: np.ndarray
    global_mean: float
    global_std: float
    sampled_std: float

    def to_json(self) -> dict[str, Any]:
        """Return plain Python numbers and lists, for codec.json."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}


class LatentStatistics:
    """Accumulates the moments of batches of posteriors (pairwise updates, Chan, Golub and LeVeque 1979)."""

    def __init__(self, channels: int) -> None:
        self._n_images = 0
        self._n = 0
        self._mean = np.zeros(channels)
        self._m2 = np.zeros(channels)  # sum of squared deviations
        self._variance = np.zeros(channels)  # sum of posterior variances
        self._kl = np.zeros(channels)  # sum of nats

    def update(self, posterior: Posterior) -> None:
        """Add a batch: raw posterior of (B, D, h, w)."""
        z = posterior.mean.detach().double().cpu().numpy()
        batch = np.moveaxis(z, 1, 0).reshape(z.shape[1], -1)  # (D, B*h*w)
        mean = batch.mean(axis=1)
        self._add(batch.shape[1], mean, ((batch - mean[:, None]) ** 2).sum(axis=1))
        self._n_images += z.shape[0]
        if posterior.logvar is not None:
            logvar = np.moveaxis(posterior.logvar.detach().double().cpu().numpy(), 1, 0).reshape(z.shape[1], -1)
            self._variance += np.exp(logvar).sum(axis=1)
            # Closed form, Kingma & Welling 2013, appendix B, arXiv:1312.6114.
            self._kl += 0.5 * (batch**2 + np.exp(logvar) - 1.0 - logvar).sum(axis=1)

    def merge(self, other: "LatentStatistics") -> None:
        """Add everything that another one was given, on another rank for example."""
        if other._n:
            self._add(other._n, other._mean, other._m2)
        self._n_images += other._n_images
        self._variance += other._variance
        self._kl += other._kl

    def _add(self, n: int, mean: np.ndarray, m2: np.ndarray) -> None:
        delta = mean - self._mean
        total = self._n + n
        self._m2 += m2 + delta**2 * (self._n * n / total)
        self._mean += delta * (n / total)
        self._n = total

    def summary(self) -> LatentSummary:
        """Return the statistics so far.

        Raises:
            ValueError: nothing was added yet.
        """
        if self._n == 0:
            raise ValueError("no latents to take statistics of")
        variance = self._m2 / self._n
        global_mean = float(self._mean.mean())
        global_variance = float((variance + (self._mean - global_mean) ** 2).mean())
        posterior_variance = self._variance / self._n
        return LatentSummary(
            n_images=self._n_images,
            n_positions=self._n,
            mean=self._mean.copy(),
            std=np.sqrt(variance),
            posterior_std=np.sqrt(posterior_variance),
            kl_nats=self._kl / self._n,
            global_mean=global_mean,
            global_std=float(np.sqrt(global_variance)),
            sampled_std=float(np.sqrt(global_variance + posterior_variance.mean())),
        )
