"""How unusual an image is to a head: its latents' reconstruction, its ELBO, its reconstruction's features.

    z, c -> units -> mean of p(z|u, c)       -> latent_error: mean square of what standardised z differs by
    z, c -> draws of q(u|z, c)               -> elbo_bits: the ELBO with its sign turned, bits per number of a latent
    images of z and a reconstruction -> a network -> feature_distance: Euclidean

The higher, the more unusual. What is random is the same for all images. Imports torch.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.head import Head
from codec.head.conditions import generators
from codec.head.network import Noise
from codec.rectified_flow import bound_times, density_bound
from eval.feature_networks import FeatureNetwork

SCORES = ("latent_error", "elbo_bits", "feature_distance")


def auroc(scores: Sequence[float] | np.ndarray, outlier: Sequence[bool] | np.ndarray) -> float:
    """Return the area under the ROC curve: how often an outlier's score is above that of another, ties as a half.

    Args:
        scores: (n,), finite.
        outlier: (n,), of both kinds.

    Raises:
        ValueError: no outlier, or nothing else.
    """
    values, positive = np.asarray(scores, np.float64), np.asarray(outlier, bool)
    n_out, n_in = int(positive.sum()), int((~positive).sum())
    if not n_out or not n_in:
        raise ValueError(f"{n_out} outliers and {n_in} others, expected some of both")
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]  # 1, 2, ...; the mean of equal ones
    return float((ranks[positive].sum() - n_out * (n_out + 1) / 2) / (n_out * n_in))  # Mann & Whitney 1947


@torch.inference_mode()
def elbo_bits(head: Head, z: Tensor, c: Sequence[Any], n_draws: int, seed: int = 0) -> np.ndarray:
    """Return -ELBO / (D h w) in bits, a bound of -log2 p(z|c) per number of a normalized latent, (B,) float64.

    Of a flow-matching decoder the likelihood is bounded in turn, see `codec.rectified_flow.density_bound`, at times
    that are spread evenly over the draws.

    Args:
        head: of these latents.
        z: (B, D, h, w) normalized.
        c: a condition for each.
        n_draws: of the posterior (and times), whose mean is taken.
        seed: of them.
    """
    network, device = head.network, head.device
    labels, hidden = head.conditions(c, len(z))
    rngs = generators(seed, range(n_draws), "anomaly")
    total = np.zeros(len(z))
    for number, rng in enumerate(rngs):
        drawn = [rng.standard_normal(shape, dtype=np.float32) for shape in (*network.unit_shapes, network.space.shape)]
        *units, noise = (torch.from_numpy(each).to(device) for each in drawn)
        even = (number + rng.random()) / n_draws
        for start in range(0, len(z), head.batch):
            at = slice(start, start + head.batch)
            n = len(z[at])
            of_units = tuple(each.expand(n, *each.shape) for each in units)
            if network.config.decoder == "gaussian":
                out = network(z[at], labels[at], hidden[at], Noise(units=of_units))
                nats = out.error
            else:
                time = bound_times(torch.full((n,), even, device=device))
                of_all = Noise(units=of_units, time=time, latents=noise.expand(n, *noise.shape))
                out = network(z[at], labels[at], hidden[at], of_all)
                nats = density_bound(out.error, time)
            kl = sum(part.flatten(1).double().sum(1) for part in out.kl)
            total[at] += (nats.double() + kl / network.space.n).cpu().numpy()
    return (total / n_draws + network.log_volume()) / math.log(2)


def expected(head: Head, z: Tensor, c: Sequence[Any], n_draws: int, seed: int = 0) -> Tensor:
    """Return the mean of p(z|u, c) at the middle u of q(u|z, c), (B, D, h, w) normalized.

    What a flow-matching decoder draws has an error of its own, as large as that of z in an image that is not unusual.
    Its mean is what one step from noise leads to, E[z|u, c] = noise - velocity at t = 1 (`codec.rectified_flow.mix`):
    from any noise the same, were the network exact.

    Args:
        head: of these latents.
        z: (B, D, h, w) normalized.
        c: a condition for each.
        n_draws: of that noise, whose mean is taken; the same for all images.
        seed: of it.
    """
    units = head.encode(z, c)
    draws = range(1 if head.network.config.decoder == "gaussian" else n_draws)
    total = sum(head.decode(units, c, seed=seed, numbers=[number] * len(z), steps=1) for number in draws)
    return torch.as_tensor(total) / len(draws)


def latent_errors(head: Head, z: Tensor, z_hat: Tensor) -> np.ndarray:
    """Return the mean square of the difference of standardised latents over D, h, w, (B,) float64."""
    difference = head.network.standardised(z) - head.network.standardised(z_hat)
    return difference.double().square().mean((1, 2, 3)).cpu().numpy()


def feature_distances(network: FeatureNetwork, one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> np.ndarray:
    """Return Euclidean distances of the features of images, (H, W, 3) uint8 each, pair by pair, (B,) float64."""
    found = []
    for pair in zip(one, other, strict=True):
        both = network(torch.from_numpy(np.stack(pair)).permute(0, 3, 1, 2).contiguous()).double()
        found.append(float((both[0] - both[1]).norm()))
    return np.array(found)
