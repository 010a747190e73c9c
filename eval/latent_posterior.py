"""What the posterior carries: moments, KL, active units, mutual information, and whether it has collapsed.

    posteriors of images -> PosteriorTally (mergeable over ranks) -> channel rows, totals, verdict

All latents here are raw: the prior N(0, I) of training is over raw latents. A position is one cell of the latent grid;
every position of every image is one datum, and its D channels are the latent variable. Imports no torch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from codec.statistics import LatentStatistics, LatentSummary

if TYPE_CHECKING:
    from codec.latent_model import Posterior

CLAMP = (-30.0, 20.0)
"""diffusers' limits of the log-variance."""
ACTIVE_VARIANCE = 0.01
"""Burda et al. 2015, arXiv:1509.00519, section 5.2: a unit is active when the variance of its mean is above this."""
COLLAPSED_RATIO = 0.1
"""A channel that is not active has collapsed when its mean varies less than this share of its noise's variance."""
DETERMINISTIC_RATIO = 0.01
"""Noise of less than this share of the data's deviation (40 dB below it) is as good as none."""

RULE = (
    f"a channel has collapsed when the variance of its mean over the data is at most {ACTIVE_VARIANCE} (not active) "
    f"and at most {COLLAPSED_RATIO} of its posterior variance; collapsed: all channels; partly collapsed: some; nearly "
    f"deterministic: none, and in more than half of the channels the noise's deviation is below {DETERMINISTIC_RATIO} "
    "of the mean's deviation over the data; healthy: the rest; no posterior: the encoder gives no variance"
)


@dataclass
class Samples:
    """Some positions of the data, in the order of the images.

    Attributes:
        mean: (M, D) float64, posterior means.
        logvar: (M, D) float64; None where the encoder gives no variance.
        z: (M, D) float64, one draw of each posterior; the mean where there is no variance.
    """

    mean: np.ndarray
    logvar: np.ndarray | None
    z: np.ndarray

    @classmethod
    def draw(cls, posterior: "Posterior", n: int, rng: np.random.Generator) -> "Samples":
        """Draw n positions (all, where there are fewer) of one image's posterior, (1, D, h, w)."""
        mean = _positions(posterior.mean)
        chosen = np.sort(rng.permutation(len(mean))[:n])
        mean = mean[chosen]
        if posterior.logvar is None:
            return cls(mean, None, mean)
        logvar = _positions(posterior.logvar)[chosen]
        return cls(mean, logvar, mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape))

    @classmethod
    def join(cls, parts: list["Samples"]) -> "Samples":
        """Return all of them, one after the other."""
        logvars = [part.logvar for part in parts if part.logvar is not None]
        return cls(
            np.concatenate([part.mean for part in parts]),
            np.concatenate(logvars) if logvars else None,
            np.concatenate([part.z for part in parts]),
        )


def _positions(latents: Any) -> np.ndarray:
    """Turn a torch (1, D, h, w) into (h*w, D) float64."""
    array: np.ndarray = latents.detach().double().cpu().numpy()
    positions: np.ndarray = array[0].reshape(array.shape[1], -1).T
    return positions


@dataclass
class PosteriorTally:
    """Everything about posteriors that is a sum or a maximum over images.

    Attributes:
        statistics: moments and KL.
        n: positions.
        mean: (D,) of the posterior means.
        products: (D, D) sum of products of deviations from `mean`.
        clamped: (2, D) positions whose log-variance is at the lower and at the upper limit.
        largest: (D,) largest |mean|.
    """

    statistics: LatentStatistics
    n: int
    mean: np.ndarray
    products: np.ndarray
    clamped: np.ndarray
    largest: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "PosteriorTally":
        """Return the tally of no images."""
        zeros = np.zeros(channels)
        return cls(LatentStatistics(channels), 0, zeros, np.zeros((channels, channels)), np.zeros((2, channels)), zeros)

    def update(self, posterior: "Posterior") -> None:
        """Add one image's raw posterior, (1, D, h, w)."""
        self.statistics.update(posterior)
        positions = _positions(posterior.mean)
        mean = positions.mean(axis=0)
        deviations = positions - mean
        self._add(len(positions), mean, deviations.T @ deviations)
        self.largest = np.maximum(self.largest, np.abs(positions).max(axis=0))
        if posterior.logvar is not None:
            logvar = _positions(posterior.logvar)
            at_limits = [(logvar <= CLAMP[0]).sum(axis=0), (logvar >= CLAMP[1]).sum(axis=0)]
            self.clamped = self.clamped + np.array(at_limits)

    def merge(self, other: "PosteriorTally") -> None:
        """Add what another rank saw."""
        self.statistics.merge(other.statistics)
        if other.n:
            self._add(other.n, other.mean, other.products)
        self.clamped = self.clamped + other.clamped
        self.largest = np.maximum(self.largest, other.largest)

    def _add(self, n: int, mean: np.ndarray, products: np.ndarray) -> None:
        delta, total = mean - self.mean, self.n + n
        self.products = self.products + products + np.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) covariance of the posterior means."""
        covariance: np.ndarray = self.products / self.n
        return covariance


@dataclass(frozen=True)
class Verdict:
    """Whether the posterior says something about the image: see RULE."""

    name: str
    collapsed: list[bool] = field(default_factory=list)


def judge(summary: LatentSummary, has_variance: bool) -> Verdict:
    """Apply RULE."""
    if not has_variance:
        return Verdict("no posterior", [False] * len(summary.std))
    variance, noise = summary.std**2, summary.posterior_std**2
    collapsed = (variance <= ACTIVE_VARIANCE) & (variance <= COLLAPSED_RATIO * noise)
    if collapsed.all():
        name = "collapsed"
    elif collapsed.any():
        name = "partly collapsed"
    elif np.mean(summary.posterior_std < DETERMINISTIC_RATIO * summary.std) > 0.5:
        name = "nearly deterministic"
    else:
        name = "healthy"
    return Verdict(name, collapsed.tolist())


def mutual_information_lower(samples: Samples) -> float:
    """Return a lower bound of I(x; z) per position, nats, never above ln M.

    E[ln q(z|x)] - E[ln 1/M sum_m q(z|x_m)] over M positions, its own among them: the minibatch estimate of the
    aggregate posterior in Hoffman & Johnson 2016, a lower bound by Poole et al. 2019, arXiv:1905.06922, eq. 12.
    """
    assert samples.logvar is not None
    mean, logvar, z = samples.mean, samples.logvar, samples.z
    centre = mean.mean(axis=0)  # differences of large numbers lose digits
    mean, z = mean - centre, z - centre
    precision = np.exp(-logvar)
    # The constant D/2 ln(2 pi) stands in both terms.
    of_own = -0.5 * (precision * (z - mean) ** 2 + logvar).sum(axis=1)
    constant = (precision * mean**2 + logvar).sum(axis=1)
    of_all = np.empty(len(z))
    for start in range(0, len(z), 256):
        part = z[start : start + 256]
        log_q = -0.5 * (part**2 @ precision.T - 2 * part @ (precision * mean).T + constant)
        own = np.arange(len(part))
        log_q[own, start + own] = of_own[start : start + 256]  # exact where it matters most
        highest = log_q.max(axis=1)
        of_all[start : start + 256] = highest + np.log(np.exp(log_q - highest[:, None]).mean(axis=1))
    return float((of_own - of_all).mean())


def gaussian_distances(mean: np.ndarray, covariance: np.ndarray) -> dict[str, float]:
    """Return how far N(mean, covariance) is from N(0, I).

    Args:
        mean: (D,).
        covariance: (D, D).

    Returns:
        kl_nats (infinite for a covariance without full rank) and frechet, the squared 2-Wasserstein distance (the same
        formula as FID's).
    """
    eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    square = float(mean @ mean)
    full = eigenvalues.min() > 1e-12 * max(1.0, eigenvalues.max())
    kl = 0.5 * (square + float((eigenvalues - 1 - np.log(eigenvalues)).sum())) if full else float("inf")
    return {"kl_nats": kl, "frechet": square + float(((np.sqrt(eigenvalues) - 1) ** 2).sum())}


def effective_rank(covariance: np.ndarray) -> float:
    """Return exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007): 1 .. D; 0 without variance."""
    eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    if eigenvalues.sum() <= 0:
        return 0.0
    share = eigenvalues / eigenvalues.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def correlation(covariance: np.ndarray) -> np.ndarray:
    """Return the (D, D) matrix of correlations; 0 beside the diagonal for a channel without variance."""
    deviation = np.sqrt(np.diag(covariance))
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    matrix: np.ndarray = covariance * np.outer(scale, scale)
    np.fill_diagonal(matrix, 1.0)
    return matrix
