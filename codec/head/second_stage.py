"""Priors that are fitted after training, to the units of a head or to the latents of a codec as vectors.

    vectors (N, d), labels -> `train.head.fitting` -> GaussianMixture or VectorFlow; Standard, for comparison
    its `config` and `state_dict`, plain values and tensors -> `restore` -> the same

Their condition is a label: (B,) int64 in 0 .. n_classes - 1, n_classes or None = any class. Imports torch alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codec.errors import ModelError
from codec.head.flows import FlowSize
from codec.head.gaussian import wide
from codec.head.priors import FlowPrior, Prior, StandardNormal


class FittedPrior(Prior):
    """A prior of vectors whose condition is a label.

    Attributes:
        n_classes: labels are 0 .. n_classes - 1, n_classes stands for any class; 0 = vectors have no labels.
    """

    def __init__(self, n_units: int, n_classes: int) -> None:
        super().__init__(n_units)
        self.n_classes = n_classes

    def config(self) -> dict[str, Any]:
        """Return what `restore` needs beside the tensors of `state_dict`, as plain JSON values."""
        raise NotImplementedError

    def _labels(self, n: int, c: Tensor | None, device: torch.device) -> Tensor:
        """Return n labels; raises ValueError for what is none."""
        if c is None:
            return torch.full((n,), self.n_classes, device=device)
        if c.shape != (n,) or (n > 0 and not 0 <= int(c.min()) <= int(c.max()) <= self.n_classes):
            raise ValueError(f"labels: expected ({n},) in 0 .. {self.n_classes}, got {tuple(c.shape)} {c.tolist()[:4]}")
        return c.to(device)


class Standard(FittedPrior):
    """N(0, I) of any class: what others are compared with."""

    def __init__(self, n_units: int) -> None:
        super().__init__(n_units, 0)
        self._all = StandardNormal(n_units)

    def config(self) -> dict[str, Any]:
        """See `FittedPrior.config`."""
        return {"kind": "standard", "n_units": self.n_units}

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        return self._all.log_prob(u)

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        return self._all.draw(noise, choice, None, temperature)


class GaussianMixture(FittedPrior):
    """Gaussians with full covariances, shared by the classes, each of which has weights of its own.

    A component that serves one class alone has the weight 0 in the others.

    Attributes:
        means: (K, d).
        cholesky: (K, d, d) lower triangular, L L^T is the covariance.
        log_weights: (n_classes + 1, K), the last row is of any class; -inf = never.
    """

    means: Tensor
    cholesky: Tensor
    log_weights: Tensor

    def __init__(self, n_units: int, n_components: int, n_classes: int = 0) -> None:
        """Build N(0, I), to be filled."""
        super().__init__(n_units, n_classes)
        self.register_buffer("means", torch.zeros(n_components, n_units))
        self.register_buffer("cholesky", torch.eye(n_units).repeat(n_components, 1, 1))
        self.register_buffer("log_weights", torch.full((n_classes + 1, n_components), -math.log(n_components)))

    def config(self) -> dict[str, Any]:
        """See `FittedPrior.config`."""
        sizes = {"n_units": self.n_units, "n_components": len(self.means), "n_classes": self.n_classes}
        return {"kind": "mixture", **sizes}

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        weights = self.log_weights[self._labels(len(u), c, self.means.device)]
        return (component_log_probs(u, self.means, self.cholesky) + weights).logsumexp(1)

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        ends = self.log_weights.double().exp().cumsum(1)[self._labels(len(noise), c, self.means.device)]
        chosen = torch.searchsorted(ends, choice.double()[:, None] * ends[:, -1:], right=True)[:, 0]
        u = torch.empty_like(self.means[:1]).repeat(len(noise), 1)
        for k in sorted(set(chosen.tolist())):  # covariances are large: each is used once, none copied
            rows = chosen == k
            u[rows] = self.means[k] + temperature * noise[rows].to(u.dtype) @ self.cholesky[k].T
        return u


def component_log_probs(u: Tensor, means: Tensor, cholesky: Tensor) -> Tensor:
    """Return the log-density of every Gaussian, in nats.

    Args:
        u: (B, d).
        means: (K, d).
        cholesky: (K, d, d), see `GaussianMixture`.

    Returns:
        (B, K).
    """
    found = []
    for mean, lower in zip(means, cholesky, strict=True):
        white = torch.linalg.solve_triangular(lower, (u.to(means.dtype) - mean).T, upper=False)  # (d, B)
        log_det = lower.diagonal().log().sum()
        found.append(-0.5 * (white.square().sum(0) + u.shape[1] * math.log(2 * math.pi)) - log_det)
    return torch.stack(found, dim=1)


class VectorFlow(FittedPrior):
    """A flow prior of standardised vectors, which is told the label.

    Attributes:
        mean: (d,) of the vectors that it was fitted to.
        deviation: (d,).
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, n_units: int, n_classes: int, size: FlowSize) -> None:
        """Build it with weights from torch's generator: a Gaussian without correlations, until it is fitted."""
        super().__init__(n_units, n_classes)
        self._size = size
        self.register_buffer("mean", torch.zeros(n_units))
        self.register_buffer("deviation", torch.ones(n_units))
        self.prior = FlowPrior(n_units, n_classes + 1 if n_classes else 0, size)

    def config(self) -> dict[str, Any]:
        """See `FittedPrior.config`."""
        sizes = {"n_units": self.n_units, "n_classes": self.n_classes}
        return {"kind": "flow", **sizes, "size": self._size.to_json()}

    def _condition(self, n: int, c: Tensor | None) -> Tensor | None:
        labels = self._labels(n, c, self.mean.device)
        return F.one_hot(labels, self.n_classes + 1).to(self.mean.dtype) if self.n_classes else None

    def log_prob(self, u: Tensor, c: Tensor | None = None) -> Tensor:
        """See `Prior.log_prob`."""
        standardised = (wide(u) - self.mean) / self.deviation
        return self.prior.log_prob(standardised, self._condition(len(u), c)) - self.deviation.log().sum()

    def draw(self, noise: Tensor, choice: Tensor, c: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """See `Prior.draw`."""
        u = self.prior.draw(noise, choice, self._condition(len(noise), c), temperature)
        return u * self.deviation + self.mean


def restore(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "prior") -> FittedPrior:
    """Return the prior that `config()` and `state_dict()` were of.

    Args:
        config: plain JSON values.
        tensors: its state.
        where: begins the message of an error.

    Raises:
        ModelError: they are damaged, of another version, or do not belong together.
    """
    prior: FittedPrior
    try:
        values = dict(config)
        kind = values.pop("kind")
        if kind == "mixture":
            prior = GaussianMixture(**values)
        elif kind == "flow":
            prior = VectorFlow(size=FlowSize(**values.pop("size")), **values)
        elif kind == "standard":
            prior = Standard(**values)
        else:
            raise ModelError(f'{where}: kind = {kind!r}, expected "mixture", "flow" or "standard"')
        prior.load_state_dict(dict(tensors))
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as exception:
        reason = " ".join(str(exception).split())
        raise ModelError(f"{where}: config and tensors are no fitted prior: {reason}") from exception
    return prior.eval()
