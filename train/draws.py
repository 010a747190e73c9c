"""Random tensors that belong to positions of a run's sequence, not to batches, ranks or workers.

The draw of stream s at position k is a function of (seed, s, k) alone: accumulating batches, or spreading them over
ranks, leaves every sample's noise as it is.
"""

from collections.abc import Sequence

import numpy as np
import torch

POSTERIOR = 10  # the first ten are for the order of the samples and their crops
UNIFORM = 11
LATENT_NOISE = 12
PER_IMAGE = 13
PER_BATCH = 14
BACKGROUND = 15
POOL = 16  # latents that a codebook begins with
CODEBOOK = 17
REVIVAL = 18
CONDITION = 19  # whether an image's class is hidden


def rng(seed: int, stream: int, position: int) -> np.random.Generator:
    """Return the generator of one stream at one position."""
    return np.random.default_rng((seed, stream, position))


def normal(seed: int, stream: int, positions: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return standard normal noise, (B, *shape) float32 on the CPU, one draw per position."""
    drawn = [rng(seed, stream, position).standard_normal(shape, dtype=np.float32) for position in positions]
    return torch.from_numpy(np.stack(drawn))


def uniform(seed: int, stream: int, positions: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Return uniform noise in [0, 1), (B, *shape) float32 on the CPU, one draw per position."""
    drawn = [rng(seed, stream, position).random(shape, dtype=np.float32) for position in positions]
    return torch.from_numpy(np.stack(drawn))


def differing(labels: np.ndarray, n: int, rng: np.random.Generator) -> int:
    """Return the place, in (N,) labels, of one that differs from number n, drawn at random; n where all are alike."""
    others = np.flatnonzero(labels != labels[n])
    return int(others[rng.integers(len(others))]) if len(others) else n
