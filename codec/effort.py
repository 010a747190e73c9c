"""Encoder-side rate-distortion search: other indices than the nearest ones where that saves more bits than it costs.

    z -> each index, or one next to it, whichever has the least (error / step)^2 + LAMBDA * bits -> indices

A reader does not notice. The same latents give the same indices. Must not import torch.
"""

import numpy as np

from codec.context import Wavefront
from codec.fitting import POINT_UNIT
from codec.quantiser import INDEX_LIMIT, round_steps, to_steps
from codec.tables import Mode, TableSet

MAX_LEVEL = 9
# What one bit is worth in squared steps. At high rates the error of a uniform quantiser is step^2 / 12, and its root
# halves with every bit: 2 ln 2 / 12 = 0.1155 (as lambda by step in Sullivan and Wiegand 1998). A little less serves
# decoded images best: see `search`.
LAMBDA = 0.1
_ORDERED_LEVEL = 5  # from here on in the order of coding


def search(
    z: np.ndarray, mean: np.ndarray, step: np.ndarray, table_set: TableSet, quality: int, level: int
) -> np.ndarray:
    """Choose the indices of one grid.

    Every level takes the same trade of error for bits; higher ones know better what a choice costs, as the tables of an
    index depend on those chosen before it. Measured with two f8c8 models, at equal PSNR of decoded images: 15 to 22 %
    fewer bytes at q = 8, 11 to 18 % at q = 16, 4 to 7 % at q = 24, and hardly any fewer from q = 40 on. Level 1 has
    most of it. Other models gain less, or lose: `codec.search_limit` measures up to which quality it serves one.

    Args:
        z: (D, h, w) float raw latents.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.
        table_set: what the indices will be coded with.
        quality: 0..100.
        level: 0 = nearest indices, no search; 1..4 = so many rounds, each under the tables that the last one's indices
            choose; 5..9 = one round in the order of coding, so that all choices are known that a table depends on.

    Returns:
        (D, h, w) int32 within +-INDEX_LIMIT.

    Raises:
        ValueError: a latent is not finite, or there is no such level.
    """
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"effort {level}, expected 0..{MAX_LEVEL}")
    scaled = to_steps(z, mean, step, quality)
    nearest = round_steps(scaled)
    if level == 0:
        return nearest
    options = np.clip(nearest + np.array([0, -1, 1], np.int32)[:, None, None, None], -INDEX_LIMIT, INDEX_LIMIT)
    errors = np.stack([(table_set.centroids(option, quality) / POINT_UNIT - scaled) ** 2 for option in options])
    if table_set.bits(nearest, quality, Mode.STATIC) < table_set.bits(nearest, quality, Mode.CONTEXT):
        bits = np.stack([table_set.static.bits(option, quality) for option in options])
        return _cheapest(options, errors, bits)
    if level < _ORDERED_LEVEL:
        indices = nearest
        for _ in range(level):
            choice = table_set.context.choose(indices, quality)
            indices = _cheapest(options, errors, table_set.context.cost(choice, options))
        return indices
    return _in_order(options, errors, table_set, quality)


def _cheapest(options: np.ndarray, errors: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Return the best of (3, ...) options, the first of equals, which is the nearest."""
    best = (errors + LAMBDA * bits).argmin(axis=0)
    indices: np.ndarray = np.take_along_axis(options, best[None], axis=0)[0]
    return indices


def _in_order(options: np.ndarray, errors: np.ndarray, table_set: TableSet, quality: int) -> np.ndarray:
    """Go over the grid once in the order of coding; what later indices will then cost is not looked at."""
    _, channels, height, width = options.shape
    options, errors = options.reshape(len(options), -1), errors.reshape(len(errors), -1)
    wavefront = Wavefront(table_set.context, (channels, height, width), quality)
    for choice in wavefront.fronts():
        here = options[:, wavefront.at]
        chosen = _cheapest(here, errors[:, wavefront.at], table_set.context.cost(choice, here))
        wavefront.put(chosen.astype(np.int64))
    return wavefront.indices()
