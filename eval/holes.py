"""Holes: how much of a prior lies where the aggregate posterior has nothing. Imports torch.

posterior draws -> half: reference; half: how far a draw of the posterior is from the nearest of them
prior draws     -> how far from the same reference; the share that is farther than 95 % of the posterior's
"""

from dataclasses import dataclass

import numpy as np
import torch

_MOST_DISTANCES = 1 << 24  # computed at a time


@dataclass(frozen=True)
class Holes:
    """What was measured.

    Attributes:
        share: of the prior's draws that lie in holes, 0..1. 1 - quantile where both distributions are equal.
        threshold: distance to the nearest reference draw beyond which a draw lies in a hole.
        distance: median distance of the prior's draws, over that of the posterior's.
        n_reference: draws of the posterior that distances are measured to.
        n_held_out: draws of the posterior that the threshold is of.
        n_prior: draws of the prior.
    """

    share: float
    threshold: float
    distance: float
    n_reference: int
    n_held_out: int
    n_prior: int


def hole_share(prior: torch.Tensor, posterior: torch.Tensor, *, quantile: float = 0.95, seed: int = 0) -> Holes:
    """Measure how much of a prior's mass lies where the aggregate posterior has none.

    The draws of the posterior are halved at random. A draw lies in a hole when the Euclidean distance to its nearest
    neighbour in the first half is above the given quantile of those of the second half. So it is mass outside, as far
    as that many draws can tell. A prior that covers only a part of the posterior has no holes, nor has one that is the
    posterior, only narrower: call it with both exchanged for that. In many dimensions draws are all about equally far
    from each other, and few draws then cannot tell holes.

    Args:
        prior: (M, ...) draws, M >= 1.
        posterior: (N, ...) draws of q(u|z), one for each z, N >= 40, in the same space.
        quantile: of the distances of the posterior's own draws.
        seed: of the halves.

    Raises:
        ValueError: other shapes, values that are not finite.
    """
    a, b = prior.double().flatten(1), posterior.double().flatten(1)
    if a.shape[1] != b.shape[1] or len(a) < 1 or len(b) < 40:
        raise ValueError(f"holes: expected draws (M, d) and (N >= 40, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("holes: draws that are not finite")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(b))).to(b.device)
    reference, held_out = b[order[: len(b) // 2]], b[order[len(b) // 2 :]]
    own, others = (_nearest_distance(points, reference) for points in (held_out, a))
    threshold = float(torch.quantile(own, quantile))
    middle = float(own.median())
    return Holes(
        share=float((others > threshold).double().mean()),
        threshold=threshold,
        distance=float(others.median()) / middle if middle > 0 else float("nan"),
        n_reference=len(reference),
        n_held_out=len(held_out),
        n_prior=len(a),
    )


def _nearest_distance(points: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the distance from each of (n, d) to the nearest of (m, d), (n,)."""
    rows = max(1, _MOST_DISTANCES // len(reference))
    return torch.cat([torch.cdist(part, reference).amin(dim=1) for part in torch.split(points, rows)])
