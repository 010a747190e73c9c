"""Lower bounds of log p(z|c) in nats: ELBO, and the importance-weighted one, by k draws of the posterior.

    draws(n) -> u, log q(u|z, c) -> log w = log p(z|u, c) + log p(u|c) - log q(u|z, c)
    ELBO = mean of log w;   IWAE_k = log of the mean of w;   ELBO <= IWAE_k <= log p(z|c), in expectation

Imports torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.head.flows import Flow, draw
from codec.head.gaussian import Gaussian

Draw = Callable[[int], tuple[Tensor, Tensor]]
"""n -> n draws for each of B samples: u, (n, B, ...), and log q(u|z, c), (n, B) nats; each call draws anew."""
LogDensity = Callable[[Tensor], Tensor]
"""u, (n, B, ...) -> a log-density in nats, (n, B)."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of each sample, nats, float64; divide by D h w for nats per latent.

    Attributes:
        elbo: (B,) mean over the k draws.
        iwae: (B,) with k draws.
        effective: (B,) how many of the draws count, 1 .. k: (sum of w)^2 / sum of w^2 (Kong 1992). Near 1 the bound may
            be far below.
        k: draws.
    """

    elbo: Tensor
    iwae: Tensor
    effective: Tensor
    k: int


@torch.no_grad()
def bounds(draws: Draw, log_likelihood: LogDensity, log_prior: LogDensity, k: int, chunk: int = 16) -> Bounds:
    """Return ELBO and IWAE bound; Burda et al. 2016, arXiv:1509.00519 eq. 8.

    Args:
        draws: of the posterior.
        log_likelihood: log p(z|u, c), summed over D, h, w.
        log_prior: log p(u|c).
        k: draws for each sample.
        chunk: draws at a time; the result does not depend on it, if the draws do not.

    Raises:
        ValueError: k or chunk below 1, or a log-density of another shape than the draws'.
    """
    if k < 1 or chunk < 1:
        raise ValueError(f"k = {k}, chunk = {chunk}, allowed: >= 1")
    parts = []
    for start in range(0, k, chunk):
        n = min(chunk, k - start)
        u, log_q = draws(n)
        log_z, log_p = log_likelihood(u), log_prior(u)
        if {log_q.shape, log_z.shape, log_p.shape} != {u.shape[:2]} or len(u) != n:
            shapes = [tuple(part.shape) for part in (u, log_q, log_z, log_p)]
            raise ValueError(f"bounds: expected u ({n}, B, ...) and log-densities ({n}, B), got {shapes}")
        parts.append(log_z.double() + log_p.double() - log_q.double())
    log_w = torch.cat(parts)  # (k, B)
    log_sum = log_w.logsumexp(0)
    return Bounds(
        elbo=log_w.mean(0),
        iwae=log_sum - math.log(k),
        effective=torch.exp(2 * log_sum - (2 * log_w).logsumexp(0)),
        k=k,
    )


def per_row(density: Callable[..., Tensor], *given: Tensor) -> LogDensity:
    """Return a `LogDensity` of a function of flat batches.

    Args:
        density: (u (n*B, ...), *given, each n times one after the other) -> (n*B,).
        given: (B, ...) what belongs to each sample: z, c.
    """

    def of(u: Tensor) -> Tensor:
        flat: Tensor = density(u.flatten(0, 1), *(repeated(part, len(u)) for part in given))
        return flat.reshape(u.shape[:2])

    return of


def draws_of(
    posterior: Gaussian,
    flow: Flow | None = None,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Draw:
    """Return the `Draw` of posteriors that an encoder gave.

    Args:
        posterior: (B, U), or (B, U, ...) without a flow.
        flow: what its draws go through; None = nothing.
        context: of the flow, (B, n_context).
        generator: None = torch's own. Where it lies, noise is drawn.
    """

    def of(n: int) -> tuple[Tensor, Tensor]:
        mean, logvar = (repeated(part, n) for part in (posterior.mean, posterior.logvar))
        at = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=at).to(mean)
        u, log_q = draw(Gaussian(mean, logvar), noise, flow, None if context is None else repeated(context, n))
        return u.reshape(n, *posterior.mean.shape), log_q.reshape(n, -1)

    return of


def repeated(values: Tensor, n: int) -> Tensor:
    """Return (B, ...) n times one after the other, (n*B, ...)."""
    return values.repeat(n, *[1] * (values.ndim - 1))
