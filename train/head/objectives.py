"""The terms of a head's objective beside the reconstruction, and what tells whether its units say anything.

    KL per unit (B, U) -> weighted_kl                                    beta, free bits
    u, posterior       -> decompose -> MI, total correlation, dimension-wise KL            (beta-TCVAE)
    u -> TotalCorrelationCritic, against permute_dims(u)                                   (FactorVAE)
    posterior means, KL -> unit_report                                   active, collapsed

How a weight changes over a run, cyclically or otherwise, is `train.schedules.kl_factor`, times which beta counts.
All in nats; computed in float32. Imports torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.head.gaussian import Gaussian, standard_log_prob
from eval.latent_posterior import ACTIVE_VARIANCE
from train.checks import require


def weighted_kl(kl: Tensor, *, beta: float = 1.0, free_nats: float = 0.0) -> Tensor:
    """Return beta * (sum over units of max(KL of the unit, mean over B; free_nats)), a scalar.

    beta: Higgins et al. 2017 eq. 4. Free bits: Kingma et al. 2016, arXiv:1606.04934 eq. 15, a unit being a group; a
    unit below them gets no gradient. As in `train.losses.kl_loss`, the mean is over the batch of one rank.

    Args:
        kl: (B, ...) nats per unit; (B, 1) where only the sum over units is known, as with flows.
        beta: the weight.
        free_nats: KL that each unit has for free; 0 = none, and the KL of a draw may be negative.
    """
    per_unit = kl.float().mean(0)
    return beta * (per_unit.clamp(min=free_nats) if free_nats > 0 else per_unit).sum()


@dataclass(frozen=True)
class Decomposition:
    """The parts of KL(q(u|z) || p(u)), mean over B, scalars in nats, differentiable; estimates from one batch.

    Attributes:
        index_code_mi: KL(q(u, n) || q(u) p(n)), what u says about which sample it is of.
        total_correlation: KL(q(u) || prod q(u_j)), what units say about each other.
        dimension_kl: sum over units of KL(q(u_j) || p(u_j)).
    """

    index_code_mi: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor

    def weighted(self, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
        """Return alpha MI + beta TC + gamma dimension-wise KL; all 1: the KL. arXiv:1802.04942 eq. 4."""
        return alpha * self.index_code_mi + beta * self.total_correlation + gamma * self.dimension_kl


def decompose(
    u: Tensor,
    posterior: Gaussian,
    n_data: int,
    *,
    sampling: Literal["stratified", "weighted"] = "stratified",
    prior: Gaussian | None = None,
) -> Decomposition:
    """Split the KL as beta-TCVAE does; Chen et al. 2018, arXiv:1802.04942 eq. 2.

    The sum of the three is log q(u|z) - log p(u) at the drawn u, mean over B, exactly. They need q(u), an
    average over the whole data, which is estimated from the batch: see `log_sample_weights`. Only for posteriors
    without a flow behind them.

    Args:
        u: (B, U) drawn from the posteriors, in the same order; B >= 2.
        posterior: (B, U), of one batch of one rank.
        n_data: N, samples of the data set.
        sampling: how q(u) is estimated.
        prior: (B, U), a conditional prior of each; None = N(0, I).
    """
    log_p = standard_log_prob(u) if prior is None else prior.log_prob(u)
    log_own = posterior.log_prob(u).sum(1)
    # (B, B, U): row i is the density of u_i under every posterior j of the batch
    log_each = posterior.log_prob(u[:, None])
    weights = log_sample_weights(len(u), n_data, sampling).to(u.device)  # (B, B)
    log_joint = (log_each.sum(2) + weights).logsumexp(1)
    log_product = (log_each + weights[:, :, None]).logsumexp(1).sum(1)
    return Decomposition(
        index_code_mi=(log_own - log_joint).mean(),
        total_correlation=(log_joint - log_product).mean(),
        dimension_kl=(log_product - log_p.sum(1)).mean(),
    )


def log_sample_weights(n_batch: int, n_data: int, sampling: str) -> Tensor:
    """Return logarithms of the weights with which densities of a batch estimate q(u_i), (B, B) float32.

    weighted: 1 / (N B) each; arXiv:1802.04942 eq. S3: too small by far, for u_i has its own sample in every batch.
    stratified: 1 / N for its own sample, and (N - 1) / N shared by the others; eq. S4, with B = M + 1, whose weights
    of the others, 1 / M but for one of them, are replaced by their mean: none is special, and with B = N the density
    is exact. It is without bias over batches drawn without replacement (the authors' code gives the 1 / N to the first
    sample of the batch, an index error). Its logarithm is not: of few samples the joint density is estimated lower
    than the product, and the total correlation of units that are nearly independent comes out below 0.

    Args:
        n_batch: B.
        n_data: N >= B.
        sampling: "weighted" or "stratified".
    """
    require(n_data >= n_batch >= 2, "n_data", n_data, f">= samples of a batch, {n_batch}, of which there are >= 2")
    if sampling == "weighted":
        return torch.full((n_batch, n_batch), -math.log(n_data * n_batch))
    require(sampling == "stratified", "sampling", sampling, '"stratified" or "weighted"')
    own = torch.eye(n_batch, dtype=torch.bool)
    weights = torch.full((n_batch, n_batch), (n_data - 1) / (n_data * (n_batch - 1)), dtype=torch.float64)
    weights[own] = 1 / n_data
    return weights.log().float()


class TotalCorrelationCritic(nn.Module):
    """Tells units that were drawn together from units put together at random; Kim & Mnih 2018, arXiv:1802.05983.

    One logit in place of their two, which enter as a difference only.
    """

    def __init__(self, n_units: int, width: int = 1000, depth: int = 6) -> None:
        """Build it with weights from torch's generator.

        Args:
            n_units: U.
            width: of the hidden layers.
            depth: hidden layers; both as in the paper.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(depth):
            layers += [nn.Linear(width if number else n_units, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(width if depth else n_units, 1))

    def forward(self, u: Tensor) -> Tensor:
        """Return logits, (B,) float32, larger for what was drawn together, of u, (B, U)."""
        logits: Tensor = self.layers(u)
        return logits[:, 0].float()


class ConditionCritic(nn.Module):
    """Reads the class of an image from its units; Lample et al. 2017, arXiv:1706.00409."""

    def __init__(self, n_units: int, n_classes: int, width: int = 256) -> None:
        """Build it with weights from torch's generator: two hidden layers of `width`."""
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(n_units, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2)),
            nn.Linear(width, n_classes),
        )

    def forward(self, u: Tensor) -> Tensor:
        """Return logits, (B, n_classes) float32, of u, (B, U)."""
        logits: Tensor = self.layers(u)
        return logits.float()


def class_surprise(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Return the cross-entropy of labels (B,) in nats, the mean over those that are `counted`, (B,) bool; 0 of none."""
    each = F.cross_entropy(logits, labels, reduction="none")
    return (each * counted).sum() / counted.sum().clamp_min(1)


def label_entropy(labels: Tensor) -> float:
    """Return the entropy in nats of labels' frequencies."""
    share = torch.bincount(labels).double() / len(labels)
    return float(-torch.special.xlogy(share, share).sum())


def permute_dims(u: Tensor, keys: Tensor) -> Tensor:
    """Permute each unit over the batch by itself; Kim & Mnih 2018, algorithm 1.

    Args:
        u: (B, U).
        keys: (B, U) random numbers, whose order in a column is the permutation.

    Returns:
        (B, U): every column holds what it held.
    """
    return u.gather(0, keys.argsort(dim=0))


def total_correlation(logits: Tensor) -> Tensor:
    """Return the critic's estimate of the total correlation in nats, mean over B of the log-odds; eq. 3."""
    return logits.mean()


def critic_loss(together: Tensor, permuted: Tensor) -> Tensor:
    """Return the critic's cross-entropy, half the sum of the means over B: log 2 where it cannot tell.

    Args:
        together: (B,) logits of units as they were drawn, detached from the encoder.
        permuted: (B,) logits of permuted units of another batch (or of the other half of it).
    """
    return 0.5 * (F.softplus(-together).mean() + F.softplus(permuted).mean())


@dataclass(frozen=True)
class UnitReport:
    """What each unit does, over a data set.

    Attributes:
        kl: (U,) nats, mean.
        variance: (U,) of the posterior's mean over the data.
        active: (U,) bool: the variance is above 0.01. Burda et al. 2016, arXiv:1509.00519, section 5.2.
        collapsed: (U,) bool: the unit says nothing about z beyond its condition: its KL is below the threshold, or
            its posterior is the same for all (not active).
    """

    kl: Tensor
    variance: Tensor
    active: Tensor
    collapsed: Tensor

    @property
    def posterior_collapse(self) -> bool:
        """Whether all units have collapsed."""
        return bool(self.collapsed.all())


def unit_report(means: Tensor, kl: Tensor, least_nats: float = 0.01) -> UnitReport:
    """Look at posteriors over a data set.

    Args:
        means: (N, U) of the posteriors, N >= 2.
        kl: (N, U) nats, of each posterior to its own (conditional) prior.
        least_nats: mean KL below which a unit has collapsed.
    """
    if means.ndim != 2 or means.shape != kl.shape or len(means) < 2:
        raise ValueError(f"units: expected means and kl (N, U), N >= 2, got {tuple(means.shape)} and {tuple(kl.shape)}")
    nats = kl.double().mean(0)
    variance = means.double().var(0, correction=0)
    active = variance > ACTIVE_VARIANCE
    return UnitReport(kl=nats, variance=variance, active=active, collapsed=(nats < least_nats) | ~active)
