"""Which sample stands where in an epoch, and which shape its batch has.

Without buckets an epoch is one random order of all samples. With buckets the samples of like aspect ratio stand
together: each bucket has a random order of its own, cut in batches, the last of which is filled with samples of the
same bucket once more; then the batches are put in random order. All of it is a pure function of the seed.
Must not import torch.
"""

import math
from collections.abc import Sequence

import numpy as np

from codec.shards import SampleRef

_WIDEST = 2.0  # width / height of the last bucket; of the first one its inverse


def bucket_ratios(n_buckets: int) -> np.ndarray:
    """Return width / height of each bucket, log-spaced from 1:2 to 2:1; a single bucket is square. (n,) float64."""
    if n_buckets == 1:
        return np.ones(1)
    return np.exp(np.linspace(-math.log(_WIDEST), math.log(_WIDEST), n_buckets))


def nearest_bucket(samples: Sequence[SampleRef], n_buckets: int) -> np.ndarray:
    """Return each sample's bucket, the one of the nearest aspect ratio (by logarithm). (N,) int64."""
    logs = np.log([sample.width / sample.height for sample in samples]) / math.log(_WIDEST)  # -1 .. 1 in the buckets
    return np.rint((np.clip(logs, -1, 1) + 1) / 2 * (n_buckets - 1)).astype(np.int64)


def bucket_shape(ratio: float, side: int, multiple: int) -> tuple[int, int]:
    """Return (height, width) of about side x side pixels with this width / height, each a multiple of `multiple`."""
    width, height = side * math.sqrt(ratio), side / math.sqrt(ratio)
    return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple


def epoch_order(buckets: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the samples of one epoch, in batches of one bucket each.

    Args:
        buckets: (N,) the bucket of each sample.
        batch_size: B.
        rng: decides the order.

    Returns:
        (epoch_batches(buckets, B) * B,) int64, positions in `buckets`; every one at least once.
    """
    batches = []
    for bucket in np.unique(buckets):
        members = rng.permutation(np.flatnonzero(buckets == bucket))
        n_batches = -(-len(members) // batch_size)
        batches.append(np.resize(members, (n_batches, batch_size)))  # begins again where the members end
    stacked = np.concatenate(batches)
    return stacked[rng.permutation(len(stacked))].reshape(-1)


def epoch_batches(buckets: np.ndarray, batch_size: int) -> int:
    """Return the number of batches that `epoch_order` makes."""
    counts = np.unique(buckets, return_counts=True)[1]
    return int((-(-counts // batch_size)).sum())
