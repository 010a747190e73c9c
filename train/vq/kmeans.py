"""k-means over latents that all ranks hold, each doing its part of the work; and the search for the nearest vector."""

import numpy as np
import torch
import torch.nn.functional as F

from train.vq.tokens import Extent, Reduce

_MOST_DISTANCES = 1 << 26  # computed at a time: 256 MiB
_JITTER = 0.01  # of the latents' deviation, between vectors that begin as the same latent


def nearest(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest vector, (N,) int64, of latents (N, d) in a codebook (K, d).

    Computed as `diffusers.VQModel` computes it, so that what is exported gives the same indices.
    """
    rows = max(1, _MOST_DISTANCES // len(codebook))
    return torch.cat([torch.cdist(part, codebook).argmin(dim=1) for part in torch.split(z, rows)])


def kmeans(
    pool: torch.Tensor,
    size: int,
    iterations: int,
    random: np.random.Generator,
    extent: Extent,
    reduce: Reduce,
    *,
    unit: bool = False,
) -> tuple[torch.Tensor, int]:
    """Cluster latents by Lloyd's algorithm, from random ones of them; a cluster that nothing chooses stays.

    Args:
        pool: (N, d), equal on all ranks, N >= 1.
        size: K.
        iterations: 0 = random latents.
        random: equal on all ranks.
        extent: which rank this is.
        reduce: averages over ranks.
        unit: latents have length 1, and the vectors shall.

    Returns:
        (K, d), equal on all ranks, and how many of these began as latents of their own: K, or fewer where the pool
        has fewer distinct ones, the rest then being copies of them moved a little at random.
    """
    distinct = torch.unique(pool, dim=0)
    n_own = min(size, len(distinct))
    chosen = random.permutation(len(distinct))[:n_own]
    chosen = np.concatenate([chosen, random.choice(chosen, size - n_own)])
    centres = distinct[torch.from_numpy(chosen).to(pool.device)]
    if n_own < size:
        noise = torch.from_numpy(random.standard_normal(tuple(centres.shape), dtype=np.float32)).to(pool.device)
        noise[:n_own] = 0
        centres = centres + _JITTER * (pool.std(0, correction=0) + 1e-6) * noise
    own = pool[extent.rank :: extent.n_ranks]
    for _ in range(iterations):
        if unit:
            centres = F.normalize(centres, dim=1)
        total = pool.new_zeros(size, pool.shape[1] + 1)
        if len(own):
            total.index_add_(0, nearest(own, centres), torch.cat([own, own.new_ones(len(own), 1)], dim=1))
        total = reduce(total)
        counts = total[:, -1:]
        centres = torch.where(counts > 0, total[:, :-1] / counts, centres)
    return F.normalize(centres, dim=1) if unit else centres, n_own
