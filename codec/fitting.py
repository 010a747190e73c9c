"""Fits of what a table set holds, to latent grids of training images; floating point, never run by a reader.

    grids (raw latents) -> static tables, context tables, reconstruction points

Must not import torch.
"""

from collections.abc import Sequence

import numpy as np

from codec.context import (
    CLASSES_PER_OCTAVE,
    ERROR_SHIFT,
    PHASES,
    WEIGHT_BITS,
    ContextTables,
    prediction,
)
from codec.quantiser import QUALITIES, step_scale, to_indices
from codec.static import StaticTables, normalize
from codec.wavefront import N_CAUSES, N_PREVIOUS, neighbour_cells

POINT_REACH = 3  # indices from here on share their reconstruction offset
POINT_UNIT = 128  # offsets are counted in 1/128 of a step
# How far a point goes from the index to the centroid of what is rounded to it. The centroid has the least error in the
# latents, but decoders, trained on noisy latents, expect latents as large as the encoder's. Measured with an f8c8 model
# at q = 4 to 16, bytes at equal PSNR against points on the indices: 1/2 of the way 3 to 5 % less, all of it 1 to 2 %
# more; with indices that `effort` has searched, 1/2 of the way 2 to 4 % more, all of it 5 to 7 % more.
_POINT_SHARE = 0.25
_TABLE_LIMIT = 255  # static tables: indices beyond +-this go through the escape
_CONTEXT_POSITIONS = 100_000  # grid positions that the context is fitted to
_CONTEXT_STRIDE = 4  # weights are fitted at every 4th quality, and interpolated
_LEAST_ERROR, _N_OCTAVES = 16, 10  # thresholds of the expected error, in 1/512 steps: 16 .. 16 * 2^10
_REACH = 8.0  # a table reaches this many expected errors
_PRIOR_COUNT = 64.0  # weight of the logistic law against counts
_REWEIGHTINGS = 2


def static_tables(z: np.ndarray, mean: np.ndarray, step: np.ndarray) -> tuple[StaticTables, np.ndarray]:
    """Fit the tables of every quality and channel, and the reconstruction points.

    Args:
        z: (D, N) raw latents, finite, N >= 1.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.

    Returns:
        Tables from the counts of each index plus 1/2 (Krichevsky and Trofimov 1981), the escape included; and
        (QUALITIES, D, 7) int8, in 1/128 of a step, how far above their index latents are reconstructed that are rounded
        to <= -3, -2 .. 2, >= 3: part of the way to their centroid.
    """
    numbers = np.arange(-_TABLE_LIMIT, _TABLE_LIMIT + 1)
    edges = np.append(numbers, _TABLE_LIMIT + 1) - 0.5  # in steps
    firsts: list[int] = []
    tables: list[np.ndarray] = []
    points = np.zeros((QUALITIES, len(z), 2 * POINT_REACH + 1), np.int8)
    ordered = [np.sort(plane.astype(np.float64) - m) for plane, m in zip(z, mean, strict=True)]
    sums = [np.concatenate([[0.0], np.cumsum(plane)]) for plane in ordered]
    for quality in range(QUALITIES):
        for channel, plane in enumerate(ordered):
            unit = float(step[channel]) * step_scale(quality)
            below = np.searchsorted(plane, edges * unit)  # how many values lie below each edge
            counts = np.diff(below)
            seen = np.flatnonzero(counts)
            low, high = (int(seen[0]), int(seen[-1])) if seen.size else (_TABLE_LIMIT, _TABLE_LIMIT)
            firsts.append(low - _TABLE_LIMIT)
            tables.append(normalize(np.append(plane.size - counts.sum(), counts[low : high + 1]) + 0.5))
            excess = np.diff(sums[channel][below]) / unit - numbers * counts
            points[quality, channel] = _points(excess, counts)
    offsets = np.cumsum([0] + [table.size for table in tables])
    return StaticTables(np.array(firsts, np.int32), offsets.astype(np.int32), np.concatenate(tables)), points


def _points(excess: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return (7,) offsets from sums of (value - index) and counts, each (511,) for the indices -255 .. 255."""
    inner = _TABLE_LIMIT - POINT_REACH + 1  # of the indices from -255 to -3
    cuts = [0, *range(inner, excess.size - inner + 1)]
    total, number = np.add.reduceat(excess, cuts), np.add.reduceat(counts, cuts)
    # A few latents say little: as if some more had been seen in the middle.
    offsets: np.ndarray = np.rint(_POINT_SHARE * POINT_UNIT * total / (number + 8))
    return offsets.astype(np.int8)


def context_tables(grids: Sequence[np.ndarray], mean: np.ndarray, step: np.ndarray) -> ContextTables:
    """Fit weights and tables of the context.

    Args:
        grids: (D, h, w) float32 raw latents each; the first ones, about 100,000 positions, are used.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.
    """
    used, n = [], 0
    for grid in grids:
        used.append(grid.reshape(len(mean), -1))
        n += used[-1].shape[1]
        if n >= _CONTEXT_POSITIONS:
            break
    z = np.concatenate(used, axis=1)
    neighbours = _joined_neighbours([grid.shape[1:] for grid in grids[: len(used)]])
    thresholds = np.rint(_LEAST_ERROR * 2 ** (np.arange(_N_OCTAVES * CLASSES_PER_OCTAVE) / CLASSES_PER_OCTAVE))
    thresholds = thresholds.astype(np.int32)
    middles = np.append(thresholds, 2 * thresholds[-CLASSES_PER_OCTAVE]) * 2 ** (-0.5 / CLASSES_PER_OCTAVE) / 512
    reach = np.ceil(_REACH * middles + 2).astype(np.int32)
    weights = np.zeros((QUALITIES, len(mean), 2 * N_CAUSES + 1), np.int16)
    blank = ContextTables(weights, thresholds, reach, _uniform(reach))
    counts = np.zeros(blank.frequencies.size, np.int64)
    knots = list(range(0, QUALITIES, _CONTEXT_STRIDE))
    for quality in knots:
        indices = to_indices(z, mean, step, quality)
        weights[quality], predictions, errors = _fit_weights(indices, neighbours)
        entries = blank.place(blank.expect(predictions, errors), indices).entry
        counts += np.bincount(entries.reshape(-1), minlength=counts.size)
    for quality in range(QUALITIES):
        low = quality - quality % _CONTEXT_STRIDE
        high = min(low + _CONTEXT_STRIDE, knots[-1])
        share = (quality - low) / _CONTEXT_STRIDE
        weights[quality] = np.rint((1 - share) * weights[low] + share * weights[high])
    frequencies = _smooth(counts, blank.offsets, reach, middles)
    return ContextTables(weights, thresholds, reach, frequencies)


def _joined_neighbours(shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the neighbours of grids that lie one behind the other, (9, N), with one empty cell N."""
    total = sum(h * w for h, w in shapes)
    parts, begin = [], 0
    for h, w in shapes:
        cells = neighbour_cells(h, w)
        parts.append(np.where(cells == h * w, total, cells + begin))
        begin += h * w
    return np.concatenate(parts, axis=1)


def _uniform(reach: np.ndarray) -> np.ndarray:
    return np.concatenate([np.tile(normalize(np.ones(2 * r + 2)), PHASES) for r in reach.tolist()])


def _fit_weights(indices: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit one quality: (D, N) indices -> (D, 27) int16 weights, (D, N) predictions, (D, N) expected errors."""
    channels, n = indices.shape
    values = np.zeros((channels, n + 1), np.int64)
    values[:, :-1] = PHASES * indices.astype(np.int64)
    residuals = np.zeros((channels + N_PREVIOUS, n + 1), np.int64)
    weights = np.zeros((channels, 2 * N_CAUSES + 1), np.int16)
    predictions, errors = np.empty((channels, n), np.int64), np.empty((channels, n), np.int64)
    for c in range(channels):
        previous = residuals[c : c + N_PREVIOUS, :-1][::-1]
        causes = np.concatenate([values[c][neighbours], previous])
        weights[c, :N_CAUSES] = _to_int16(_least_squares(causes, values[c, :-1]) * (1 << WEIGHT_BITS))
        predictions[c] = prediction((causes * weights[c, :N_CAUSES, None].astype(np.int64)).sum(axis=0))
        own = residuals[c + N_PREVIOUS]
        own[:-1] = values[c, :-1] - predictions[c]
        causes = np.abs(np.concatenate([own[neighbours], previous]))
        weights[c, N_CAUSES:] = _error_weights(causes, np.abs(own[:-1]))
        sums = (causes * weights[c, N_CAUSES:-1, None].astype(np.int64)).sum(axis=0)
        errors[c] = (sums >> ERROR_SHIFT) + weights[c, -1]
    return weights, predictions, errors


def _least_squares(causes: np.ndarray, target: np.ndarray, importance: np.ndarray | float = 1.0) -> np.ndarray:
    """Return the (K,) weights that minimise sum of importance * (target - weights . causes)^2; causes (K, N)."""
    matrix, vector = _normal_equations(causes, target, importance)
    result: np.ndarray = np.linalg.solve(matrix, vector)
    return result


def _normal_equations(
    causes: np.ndarray, target: np.ndarray, importance: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    weighted = causes * importance
    matrix = weighted @ causes.T.astype(np.float64)
    # Causes that never differ from 0 get the weight 0, and those that hardly differ from each other share theirs.
    matrix[np.diag_indices_from(matrix)] += 1e-4 * np.trace(matrix) / len(matrix) + 1e-9
    return matrix, weighted @ target.astype(np.float64)


def _error_weights(causes: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Fit the expected error: (13, N) and (N,), both in eighths of a step -> (14,) int16 weights, the last in 1/512.

    Squared relative errors count: a busy position must not decide for the calm ones. The weights are not negative, so
    the expected error is not either.
    """
    features = np.concatenate([causes, np.ones((1, magnitude.size))]).astype(np.float64)
    least = 0.05 * float(magnitude.mean()) + 1e-2
    importance: np.ndarray | float = 1.0
    for _ in range(_REWEIGHTINGS):
        matrix, vector = _normal_equations(features, magnitude, importance)
        weights = _not_negative(matrix, vector)
        importance = 1.0 / np.maximum(weights @ features, least) ** 2
    units = np.append(np.full(N_CAUSES, 1 << WEIGHT_BITS), (1 << WEIGHT_BITS) >> ERROR_SHIFT)
    return _to_int16(weights * units)


def _not_negative(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Solve matrix . x = vector for x >= 0: whatever comes out negative is set to 0 and the rest solved again."""
    active = np.ones(vector.size, bool)
    while True:
        x = np.zeros(vector.size)
        x[active] = np.linalg.solve(matrix[np.ix_(active, active)], vector[active])
        if (x >= 0).all():
            return x
        active &= x >= 0


def _to_int16(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.clip(np.rint(values), -(1 << 15), (1 << 15) - 1)
    return rounded.astype(np.int16)


def _smooth(counts: np.ndarray, offsets: np.ndarray, reach: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """Turn counts of symbols into frequencies; where they are few, a logistic law of the best scale fills in.

    Args:
        counts: of every entry of the tables.
        offsets: where each table starts.
        reach: (classes,) of the tables.
        middles: (classes,) expected errors in steps.
    """
    result = []
    for k, (far, middle) in enumerate(zip(reach.tolist(), middles.tolist(), strict=True)):
        seen = counts[offsets[k * PHASES] : offsets[(k + 1) * PHASES]].reshape(PHASES, 2 * far + 2)
        # The mean magnitude of a logistic variable is 2 ln 2 times its scale; rounding adds to it.
        laws = [_logistic(far, middle / (2 * np.log(2)) * 2 ** (j / 4) + 0.02) for j in range(-8, 9)]
        fits = [float((seen * np.log(law)).sum()) - 0.1 * abs(j - 8) for j, law in enumerate(laws)]
        law = laws[int(np.argmax(fits))]
        result += [normalize(row) for row in seen + _PRIOR_COUNT * law + 1e-3]
    return np.concatenate(result)


def _logistic(reach: int, scale: float) -> np.ndarray:
    """Return (PHASES, 2 * reach + 2) probabilities of the escape and the residuals under a logistic law."""
    centre = (np.arange(PHASES)[:, None] - PHASES // 2) / PHASES  # of the prediction, from the middle of residual 0
    edges = np.arange(-reach, reach + 2) - 0.5
    below = 0.5 * (1 + np.tanh((edges - centre) / (2 * scale)))
    inside = np.maximum(np.diff(below, axis=1), 1e-9)
    escape = np.maximum(1 - inside.sum(axis=1, keepdims=True), 1e-9)
    law: np.ndarray = np.concatenate([escape, inside], axis=1)
    law /= law.sum(axis=1, keepdims=True)
    return law
