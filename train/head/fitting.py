"""Fits priors to vectors after training: units that the encoder gives, or a codec's latents, flattened.

    vectors (N, d), labels -> k-means++ -> EM             -> GaussianMixture, the objective of each round
    vectors, held-out ones -> Adam until those get no better -> VectorFlow, their log-densities

Everything random comes from a seed. Imports torch.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from codec.head.flows import FlowSize
from codec.head.second_stage import GaussianMixture, VectorFlow, component_log_probs
from train.checks import require
from train.vq.kmeans import nearest

_LLOYD = 10  # iterations of k-means before EM
_LEAST_SHARE = 1e-3  # of a number's variance, that its prior variance in a component has at least
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How a mixture is fitted."""

    components: int = 16
    """K; of each class where `per_class` is set."""
    per_class: bool = False
    """Fit every class by itself; else the classes share their components and have weights of their own."""
    strength: float | None = None
    """Vectors that the prior of each covariance counts as: the larger, the nearer it stays to a diagonal one. None = d,
    as many as a vector has numbers."""
    iterations: int = 200
    """Rounds of EM at most."""
    tolerance: float = 1e-4
    """Gain of the objective (nats per vector) in one round below which EM stops."""
    seed: int = 0
    """Of the start."""

    def __post_init__(self) -> None:
        require(self.components >= 1, "components", self.components, ">= 1")
        if self.strength is not None:
            require(0 < self.strength < math.inf, "strength", self.strength, "> 0")
        require(self.iterations >= 1, "iterations", self.iterations, ">= 1")
        require(self.tolerance >= 0, "tolerance", self.tolerance, ">= 0")


@dataclass(frozen=True)
class MixtureFit:
    """A fitted mixture.

    Attributes:
        prior: the mixture, float32.
        traces: the objective of each round of EM, nats per vector, never falling; of each class where they are fitted
            by themselves, else one.
    """

    prior: GaussianMixture
    traces: list[list[float]]


def fit_mixture(vectors: Tensor, config: MixtureConfig, labels: Tensor | None = None, n_classes: int = 0) -> MixtureFit:
    """Fit Gaussians with full covariances by expectation maximisation, in float64.

    The objective is the log-likelihood plus the log-density of every covariance under an inverse Wishart prior, which
    keeps it invertible whatever d and N: that of `strength` vectors with the diagonal variances that k-means left
    within its clusters (Fraley & Raftery 2007, Journal of Classification 24, section 3).

    Args:
        vectors: (N, d).
        config: see there.
        labels: (N,) int64 in 0 .. n_classes - 1; None = there are none.
        n_classes: 0 = there are none.

    Raises:
        ValueError: shapes, labels or values that are none; fewer vectors than components, of a class where each is
            fitted by itself; a class without vectors.
    """
    x, y = _checked(vectors, labels, n_classes)
    generator = torch.Generator().manual_seed(config.seed)
    if config.per_class and n_classes:
        parts = [
            _em(x[y == label], torch.zeros_like(y[y == label]), 1, config, generator) for label in range(n_classes)
        ]
        weights = torch.block_diag(*(part.weights for part in parts))  # type: ignore[no-untyped-call]
    else:
        parts = [_em(x, y, max(1, n_classes), config, generator)]
        weights = parts[0].weights
    if n_classes:  # the last row: of any class, as often as it occurs
        shares = torch.bincount(y, minlength=n_classes).to(x.dtype) / len(y)
        weights = torch.cat([weights, shares[None] @ weights])
    prior = GaussianMixture(x.shape[1], weights.shape[1], n_classes)
    prior.means.copy_(torch.cat([part.means for part in parts]))
    prior.cholesky.copy_(torch.cat([part.cholesky for part in parts]))
    prior.log_weights.copy_(weights.log())
    return MixtureFit(prior.to(vectors.device).eval(), [part.trace for part in parts])


@dataclass
class _Mixture:
    """What EM works on, float64: weights (n_rows, K), means (K, d), cholesky (K, d, d)."""

    weights: Tensor
    means: Tensor
    cholesky: Tensor
    trace: list[float]


def _checked(vectors: Tensor, labels: Tensor | None, n_classes: int) -> tuple[Tensor, Tensor]:
    """Return vectors (N, d) float64 and labels, zeros where there are none; raises ValueError."""
    if vectors.ndim != 2 or len(vectors) < 2 or not bool(torch.isfinite(vectors).all()):
        raise ValueError(f"vectors: expected (N, d) finite numbers, N >= 2, got {tuple(vectors.shape)}")
    if (labels is None) != (n_classes == 0):
        raise ValueError(f"labels and n_classes go together, got n_classes = {n_classes}, labels {labels is not None}")
    if labels is None:
        return vectors.double(), torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    if labels.shape != vectors.shape[:1] or not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ValueError(f"labels: expected ({len(vectors)},) in 0 .. {n_classes - 1}, got {tuple(labels.shape)}")
    counts = torch.bincount(labels, minlength=n_classes)
    if int(counts.min()) == 0:
        raise ValueError(f"labels: no vector of class {int(counts.argmin())}")
    return vectors.double(), labels.to(vectors.device)


def _em(x: Tensor, y: Tensor, n_rows: int, config: MixtureConfig, generator: torch.Generator) -> _Mixture:
    """Fit one mixture to (N, d) vectors whose weights have n_rows rows, y says which is whose."""
    n_components = config.components
    if len(x) < n_components:
        raise ValueError(f"components = {n_components}, allowed: at most one for each of {len(x)} vectors")
    centres = _plus_plus(x, n_components, generator)
    for _ in range(_LLOYD):
        share = _one_hot(nearest(x, centres), n_components)
        counts = share.sum(0)[:, None]
        centres = torch.where(counts > 0, share.T @ x / counts.clamp_min(1), centres)
    share = _one_hot(nearest(x, centres), n_components)
    within = (x - centres[share.argmax(1)]).square().mean(0)
    within = within.clamp_min(_LEAST_DEVIATION**2).maximum(_LEAST_SHARE * x.var(0, correction=0))
    mixture = _Mixture(x.new_zeros(n_rows, n_components), centres, within.sqrt().diag().repeat(n_components, 1, 1), [])
    rows = _one_hot(y, n_rows)
    strength = float(x.shape[1]) if config.strength is None else config.strength
    for _ in range(config.iterations):
        _maximise(mixture, x, rows, share, within, strength)
        joint = component_log_probs(x, mixture.means, mixture.cholesky) + mixture.weights.log()[y]
        of_each = joint.logsumexp(1)
        mixture.trace.append(float(of_each.mean() + _covariance_prior(mixture, within, strength) / len(x)))
        if len(mixture.trace) > 1 and mixture.trace[-1] - mixture.trace[-2] < config.tolerance:
            break
        share = (joint - of_each[:, None]).exp()
    return mixture


def _maximise(mixture: _Mixture, x: Tensor, rows: Tensor, share: Tensor, within: Tensor, strength: float) -> None:
    """The M step, in place: what is most probable where `share`, (N, K), says whose each vector is."""
    mixture.weights = (rows.T @ share) / rows.sum(0)[:, None]
    counts = share.sum(0)
    for k, count in enumerate(counts.tolist()):
        if count > 0:
            mixture.means[k] = share[:, k] @ x / count
        centred = (x - mixture.means[k]) * share[:, k, None].sqrt()
        covariance = (centred.T @ centred + strength * within.diag()) / (count + strength)
        mixture.cholesky[k] = torch.linalg.cholesky(covariance)


def _covariance_prior(mixture: _Mixture, within: Tensor, strength: float) -> Tensor:
    """Return the log-density of all covariances, up to a constant: -strength / 2 (log|S| + tr(W S^-1)), summed."""
    found, root = within.new_zeros(()), within.sqrt().diag()
    for lower in mixture.cholesky:
        trace = torch.linalg.solve_triangular(lower, root, upper=False).square().sum()
        found = found + 2 * lower.diagonal().log().sum() + trace
    return -strength / 2 * found


def _one_hot(labels: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, n).double()


def _plus_plus(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n of the vectors, far from each other: k-means++, Arthur & Vassilvitskii 2007, section 2.2."""
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    squared = (x - x[chosen[0]]).square().sum(1)
    for _ in range(n - 1):
        ends = squared.cumsum(0).cpu()  # where all are equal, the last one: clusters that nothing chooses
        at = torch.rand(1, dtype=torch.float64, generator=generator) * ends[-1]
        chosen.append(min(int(torch.searchsorted(ends, at, right=True)), len(x) - 1))
        squared = torch.minimum(squared, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen].clone()


@dataclass(frozen=True, kw_only=True)
class FlowFitConfig:
    """How a flow is fitted."""

    size: FlowSize = field(default_factory=lambda: FlowSize(steps=8))
    """Of the flow."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    batch: int = 256
    """Vectors of a step."""
    steps: int = 5000
    """Steps at most."""
    check_every: int = 100
    """Steps between two looks at the held-out vectors."""
    patience: int = 5
    """Looks without a gain, after which it stops."""
    label_dropout: float = 0.1
    """Share of the vectors whose label is hidden: these learn the distribution of any class."""
    seed: int = 0
    """Of weights, batches and hidden labels."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "lr", self.lr, "> 0")
        for name in ("batch", "steps", "check_every", "patience"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        require(0 <= self.label_dropout < 1, "label_dropout", self.label_dropout, "0 <= share < 1")


@dataclass(frozen=True)
class FlowFit:
    """A fitted flow.

    Attributes:
        prior: as it was when the held-out vectors were most probable.
        trace: mean log-density of the held-out vectors, nats, at the start and at every look.
        best: which of these the prior is of.
    """

    prior: VectorFlow
    trace: list[float]
    best: int


def fit_flow(
    vectors: Tensor,
    held_out: Tensor,
    config: FlowFitConfig,
    labels: tuple[Tensor, Tensor] | None = None,
    n_classes: int = 0,
) -> FlowFit:
    """Fit a flow by maximum likelihood, in float32, and keep what suits the held-out vectors best.

    Args:
        vectors: (N, d), d >= 2.
        held_out: (M, d), none of the vectors.
        config: see there.
        labels: int64 in 0 .. n_classes - 1 of both, (N,) and (M,); None = there are none.
        n_classes: 0 = there are none.

    Raises:
        ValueError: shapes, labels or values that are none.
    """
    of_vectors, of_held_out = labels or (None, None)
    x, y = _checked(vectors, of_vectors, n_classes)
    if held_out.ndim != 2 or held_out.shape[1] != x.shape[1] or not len(held_out):
        raise ValueError(f"held_out: expected (M, {x.shape[1]}), M >= 1, got {tuple(held_out.shape)}")
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        prior = VectorFlow(x.shape[1], n_classes, config.size).to(x.device)
    prior.mean.copy_(x.mean(0))
    prior.deviation.copy_(x.std(0, correction=0).clamp_min(_LEAST_DEVIATION))
    x, optimizer = x.float(), torch.optim.Adam(prior.parameters(), config.lr)
    state, trace, best = copy.deepcopy(prior.state_dict()), [_mean_log_prob(prior, held_out, of_held_out)], 0
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(x), (config.batch,), generator=generator).to(x.device)
        hidden = torch.rand(config.batch, generator=generator).to(x.device) < config.label_dropout
        seen = y[rows].masked_fill(hidden, n_classes) if n_classes else None
        optimizer.zero_grad()
        (-prior.log_prob(x[rows], seen).mean()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        if step % config.check_every == 0 or step == config.steps:
            trace.append(_mean_log_prob(prior, held_out, of_held_out))
            if trace[-1] > trace[best]:
                state, best = copy.deepcopy(prior.state_dict()), len(trace) - 1
            elif len(trace) - 1 - best >= config.patience:
                break
    prior.load_state_dict(state)
    return FlowFit(prior.eval(), trace, best)


@torch.no_grad()
def _mean_log_prob(prior: VectorFlow, vectors: Tensor, labels: Tensor | None) -> float:
    return float(prior.log_prob(vectors, labels).double().mean())
