"""How well a head predicts latents: ELBO and importance-weighted bound, in bits per number of a normalized latent.

    z, c -> k draws of q(u|z, c) -> log p(z|u, c) + log p(u|c) - log q(u|z, c) -> `train.head.bounds`

The units of a second level are drawn with those of the first. A flow-matching decoder has no likelihood that could be
computed, only a bound of it in expectation over times and noise: its ELBO is a bound all the same, but an average of
exponentials of noisy values lies above the truth, so that there is no importance-weighted bound. Imports torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.head import Head
from codec.head.decoders import GaussianDecoder
from codec.head.flows import draw
from codec.head.gaussian import Gaussian, total
from codec.head.levels import Encoded
from codec.head.network import ConditionalHead
from train.head.anomaly import elbo_bits
from train.head.bounds import Bounds, bounds, per_row, repeated

_BATCH = 16  # latents at a time
_CHUNK = 16  # draws of each at a time


@dataclass(frozen=True)
class Predicted:
    """Upper bounds of -log2 p(z|c) of each latent, bits per number, (N,) float64.

    Attributes:
        elbo: mean over the draws.
        iwae: importance-weighted, of all draws; None with a flow-matching decoder.
        effective: how many of the draws count for it, 1 .. k; None with it.
        k: draws of each.
    """

    elbo: np.ndarray
    iwae: np.ndarray | None
    effective: np.ndarray | None
    k: int


def predicted(head: Head, z: Tensor, c: Sequence[Any], k: int, seed: int = 0) -> Predicted:
    """Bound how many bits latents take.

    Args:
        head: of these latents.
        z: (N, D, h, w) normalized.
        c: a condition for each, see `codec.head.conditions.Conditions`.
        k: draws of each posterior; with a flow-matching decoder times too, the same for all latents.
        seed: of them.
    """
    network, device = head.network, head.device
    if not isinstance(network.decoder, GaussianDecoder):
        return Predicted(elbo_bits(head, z.to(device), c, k, seed), None, None, k)
    labels, hidden = head.conditions(c, len(z))
    rng = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, len(z), _BATCH):
        at = slice(start, start + _BATCH)
        found.append(head_bounds(network, z[at].to(device), labels[at], hidden[at], k, rng))
    elbo, iwae, effective = (
        torch.cat([getattr(one, name) for one in found]).cpu().numpy() for name in ("elbo", "iwae", "effective")
    )
    scale, volume = 1 / (network.space.n * math.log(2)), network.log_volume() / math.log(2)
    return Predicted(volume - elbo * scale, volume - iwae * scale, effective, k)


@torch.inference_mode()
def head_bounds(
    network: ConditionalHead, z: Tensor, c: Tensor, hidden: Tensor, k: int, generator: torch.Generator
) -> Bounds:
    """Return bounds of log p(z|c) of standardised latents, of a head with a Gaussian decoder.

    Args:
        network: the head.
        z: (B, D, h, w) normalized.
        c: conditions, (B,) or (B, E).
        hidden: whether they are not to be known, (B,).
        k: draws of each posterior.
        generator: of them, on the CPU.
    """
    z, e = network.standardised(z), network.condition(c, hidden)
    found: Encoded = network.encoder(z, e)

    def draws(n: int) -> tuple[Tensor, Tensor]:
        posterior = Gaussian(*(repeated(part, n) for part in (found.posterior.mean, found.posterior.logvar)))
        context = None if found.context is None else repeated(found.context, n)
        u, log_q = draw(posterior, _noise(posterior.mean, generator), network.flow, context)
        if network.second is not None:
            x, v = network.top_down.upper(u, repeated(e, n))
            q = network.second.posterior(repeated(found.features, n), x, v)
            u_2 = q.at(_noise(q.mean, generator))
            log_q = log_q + total(q.log_prob(u_2))
            u = torch.cat([u, u_2.flatten(1)], dim=1)
        return u.reshape(n, len(z), -1), log_q.reshape(n, -1)

    def log_prior(u: Tensor, e: Tensor) -> Tensor:
        units = _levels(network, u)
        log_p = network.prior.log_prob(units[0], e.float())
        if network.second is not None:
            x, _ = network.top_down.upper(units[0], e)
            log_p = log_p + total(network.second.prior(x).log_prob(units[1]))
        return log_p

    def log_likelihood(u: Tensor, z: Tensor, e: Tensor) -> Tensor:
        units = _levels(network, u)
        x, v = network.top_down.upper(units[0], e)
        assert isinstance(network.decoder, GaussianDecoder)
        return -network.decoder.error(z, network.top_down.lower(x, v, units)).double() * network.space.n

    return bounds(draws, per_row(log_likelihood, z, e), per_row(log_prior, e), k, _CHUNK)


def _levels(network: ConditionalHead, u: Tensor) -> tuple[Tensor, ...]:
    """Return the units of each level out of vectors that hold all, (n, U + U2 h2 w2)."""
    parts = torch.split(u, [math.prod(shape) for shape in network.unit_shapes], dim=1)
    return tuple(part.reshape(-1, *shape) for part, shape in zip(parts, network.unit_shapes, strict=True))


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
