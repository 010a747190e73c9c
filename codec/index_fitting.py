"""Fits of what index tables hold, to the codebook indices of training images; floating point, never run by a reader.

    codebook -> order of the codes, groups      indices -> prior, what neighbours say, weight of what was seen

What neighbours say is log-linear: log2 P(code | neighbours) = log2 P(code) + the sum over neighbours j of w_j times
log2 of P(code | class of j) / P(code). The ratios come from counts, the w_j are fitted on images that the counts have
not seen. Must not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from codec import index_coder
from codec.index_coder import EXPONENT_LIMIT, N_NEIGHBOURS, PRIOR_TOTAL, Layout, Units
from codec.wavefront import neighbour_cells

_UNITS_PER_OCTAVE = 16
_MOST_GROUPS = 512
_MOST_CLASSES = (128, 32)  # of neighbours: for groups, for the places within them
_TOKENS_PER_ENTRY = 4  # a class more for places wants so many tokens of each code
_SMOOTHING = 20.0  # tokens of the prior that each conditional distribution starts with
_KNOWN = 0.5  # what a code that was never seen counts (Krichevsky and Trofimov 1981)
_NEWTON_ENTRIES = 1 << 22  # numbers that weights are fitted to at once
_NEWTON_STEPS = 12
_RIDGE = 4.0
_TRIED_GRIDS = 6  # images that the units are tried on
_TRIED_SIDE = 64  # positions, as in a tile
_STRENGTHS = (16, 64, 256, 1024, 4096, 16384)  # tokens that the prior is worth against those seen in a tile
_SHARES = (1.0, 0.85, 0.7)  # of the weights, where what was seen says some of the same


@dataclass(frozen=True)
class _Shape:
    """How many groups, and classes of neighbours, tables have."""

    k: int
    n_groups: int
    group_classes: int
    member_classes: int


@dataclass(frozen=True)
class _Contexts:
    """What neighbours say, in nats: as in `codec.index_tables.IndexTables`, not yet weighed and rounded."""

    groups: np.ndarray
    members: np.ndarray


def fit(grids: Sequence[np.ndarray], codebook: np.ndarray) -> dict[str, np.ndarray]:
    """Return the parts of `codec.index_tables.IndexTables`.

    Args:
        grids: (h, w) integers in [0, K), at least one position in all.
        codebook: (K, D).
    """
    k = len(codebook)
    shape = _shape(k, sum(grid.size for grid in grids))
    codes = _order(codebook.astype(np.float64), max(1, k // (2 * shape.n_groups)))
    places = np.empty(k, np.int64)
    places[codes] = np.arange(k)
    placed = [places[grid] for grid in grids]
    first, second = placed[0::2], placed[1::2] or placed
    weights = _weights(_ratios(first, shape), _prior(first, k), _tokens(second, k), shape)
    parts = {"codes": codes.astype(np.int32), "powers": _powers()}
    tried = [grid[:_TRIED_SIDE, :_TRIED_SIDE] for grid in second[:_TRIED_GRIDS]]
    half = _parts(_ratios(first, shape), weights, _prior(first, k))
    shares, units = _best(half | parts, tried)
    contexts = _ratios(placed, shape)
    scaled = (weights[0] * shares[0], weights[1] * shares[1])
    return parts | _parts(contexts, scaled, _prior(placed, k)) | {"units": units}


def _shape(k: int, n_tokens: int) -> _Shape:
    n_groups = min(k, _MOST_GROUPS, 2 << (k - 1).bit_length() // 2)
    wanted = n_tokens // (_TOKENS_PER_ENTRY * k)
    member_classes = min(_MOST_CLASSES[1], n_groups, 1 << max(wanted.bit_length() - 1, 0))
    return _Shape(k, n_groups, min(_MOST_CLASSES[0], n_groups), member_classes)


def _order(codebook: np.ndarray, leaf: int) -> np.ndarray:
    """Return the codes such that like ones are near each other: halved along the principal axis, again and again."""
    done: list[np.ndarray] = []
    waiting = [np.arange(len(codebook))]
    while waiting:
        part = waiting.pop()
        if part.size <= leaf:
            done.append(part)
            continue
        centred = codebook[part] - codebook[part].mean(axis=0)
        axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        ordered = part[np.argsort(centred @ axis, kind="stable")]
        waiting += [ordered[part.size // 2 :], ordered[: part.size // 2]]
    return np.concatenate(done)


def _tokens(placed: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Return (7, N) places and those of their neighbours; k = none."""
    parts = []
    for grid in placed:
        cells = neighbour_cells(*grid.shape)[:N_NEIGHBOURS]
        flat = np.append(grid.reshape(-1), k)
        parts.append(np.concatenate([flat[None, :-1], flat[cells]]))
    return np.concatenate(parts, axis=1)


def _prior(placed: Sequence[np.ndarray], k: int) -> np.ndarray:
    counts = sum((np.bincount(grid.reshape(-1), minlength=k) for grid in placed), np.zeros(k)) + _KNOWN
    probabilities: np.ndarray = counts / counts.sum()
    return probabilities


def _ratios(placed: Sequence[np.ndarray], shape: _Shape) -> _Contexts:
    """Return log P(. | class of a neighbour) / P(.), of the groups and of the places within a group."""
    k, n_groups = shape.k, shape.n_groups
    tokens, prior = _tokens(placed, k), _prior(placed, k)
    tokens = tokens[:, (tokens[1:] < k).all(axis=0)]
    group = np.arange(k) * n_groups // k
    of_group = np.bincount(group, prior, n_groups)
    groups = np.empty((N_NEIGHBOURS, shape.group_classes, n_groups), np.float32)
    members = np.empty((N_NEIGHBOURS, shape.member_classes, k), np.float32)
    for j in range(N_NEIGHBOURS):
        counts = _counts(tokens[j + 1] * shape.group_classes // k, group[tokens[0]], groups[j].shape)
        groups[j] = _log_ratio(counts, of_group, counts.sum(axis=1, keepdims=True))
        counts = _counts(tokens[j + 1] * shape.member_classes // k, tokens[0], members[j].shape)
        first = np.flatnonzero(np.diff(group, prepend=-1))
        totals = np.add.reduceat(counts, first, axis=1)[:, group]
        members[j] = _log_ratio(counts, prior / of_group[group], totals)
    return _Contexts(groups, members)


def _counts(classes: np.ndarray, symbols: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    counted: np.ndarray = np.bincount(classes * shape[1] + symbols, minlength=shape[0] * shape[1]).reshape(shape)
    return counted


def _log_ratio(counts: np.ndarray, prior: np.ndarray, totals: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.log((counts / prior + _SMOOTHING) / (totals + _SMOOTHING))
    return ratio


def _weights(
    contexts: _Contexts, prior: np.ndarray, tokens: np.ndarray, shape: _Shape
) -> tuple[np.ndarray, np.ndarray]:
    """Fit the weight of each neighbour: (6,) for groups, (12,) for places and for repeats; zeros without any tokens."""
    k, n_groups = shape.k, shape.n_groups
    tokens = tokens[:, (tokens[1:] < k).all(axis=0)]
    size = -(-k // n_groups)
    n = min(tokens.shape[1], _NEWTON_ENTRIES // (N_NEIGHBOURS * max(n_groups, 2 * size)))
    tokens = tokens[:, np.random.default_rng(0).permutation(tokens.shape[1])[:n]]
    if not n:
        return np.zeros(N_NEIGHBOURS), np.zeros(2 * N_NEIGHBOURS)
    groups = tokens[0] * n_groups // k
    of_group = np.bincount(np.arange(k) * n_groups // k, prior, n_groups)
    said = np.stack([contexts.groups[j][tokens[j + 1] * shape.group_classes // k] for j in range(N_NEIGHBOURS)], axis=1)
    for_groups = _newton(np.broadcast_to(np.log(of_group), (n, n_groups)), said, groups)
    firsts = -(-np.arange(n_groups + 1) * k // n_groups)
    where = firsts[groups, None] + np.arange(size)
    unused = where >= firsts[groups + 1, None]
    where = np.where(unused, firsts[groups, None], where)
    base = np.where(unused, -50.0, np.log(prior[where]))
    features = [
        contexts.members[j][(tokens[j + 1] * shape.member_classes // k)[:, None], where] for j in range(N_NEIGHBOURS)
    ]
    features += [((tokens[j + 1][:, None] == where) & ~unused).astype(np.float32) for j in range(N_NEIGHBOURS)]
    return for_groups, _newton(base, np.stack(features, axis=1), tokens[0] - firsts[groups])


def _newton(base: np.ndarray, features: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Fit log P = base + sum of w_j features_j, normalised: the w of the least sum of -log P, and a ridge.

    Args:
        base: (N, A).
        features: (N, J, A).
        chosen: (N,) in [0, A).
    """
    rows = np.arange(chosen.size)

    def at(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits = base + np.einsum("nja,j->na", features, w)
        logits = logits - logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(axis=1, keepdims=True)
        loss = float((np.log(total[:, 0]) - logits[rows, chosen]).sum()) + 0.5 * _RIDGE * float(w @ w)
        return loss, p / total

    w = np.zeros(features.shape[1])
    loss, p = at(w)
    for _ in range(_NEWTON_STEPS):
        expected = np.einsum("nja,na->nj", features, p)
        gradient = (features[rows, :, chosen] - expected).sum(axis=0) - _RIDGE * w
        spread = (features * p[:, None]).transpose(1, 0, 2).reshape(w.size, -1)
        curvature = spread @ features.transpose(1, 0, 2).reshape(w.size, -1).T - expected.T @ expected
        step = np.linalg.solve(curvature + _RIDGE * np.eye(w.size), gradient)
        for _ in range(8):
            moved, its_p = at(w + step)
            if moved < loss:
                break
            step = step / 2
        else:
            break
        w, p, gain, loss = w + step, its_p, loss - moved, moved
        if gain < 1e-5 * loss:
            break
    return w


def _parts(contexts: _Contexts, weights: tuple[np.ndarray, np.ndarray], prior: np.ndarray) -> dict[str, np.ndarray]:
    """Return the parts in integers, without units."""
    for_groups, for_members = weights
    said = for_members[:N_NEIGHBOURS, None, None] * contexts.members
    return {
        "prior": np.maximum(np.rint(prior * PRIOR_TOTAL), 1).astype(np.int32),
        "group_context": _rounded(for_groups[:, None, None] * contexts.groups, np.int8),
        "member_context": _rounded(said, np.int8),
        "repeats": _rounded(for_members[N_NEIGHBOURS:], np.int16),
    }


def _rounded(nats: np.ndarray, dtype: type[np.signedinteger]) -> np.ndarray:
    limit = np.iinfo(dtype)
    rounded: np.ndarray = np.clip(np.rint(nats * _UNITS_PER_OCTAVE / np.log(2)), limit.min, limit.max).astype(dtype)
    return rounded


def _powers() -> np.ndarray:
    exponents = np.arange(-EXPONENT_LIMIT, EXPONENT_LIMIT + 1) / _UNITS_PER_OCTAVE
    powers: np.ndarray = np.rint(2.0 ** (10 + exponents)).astype(np.int32)
    return powers


def _best(parts: dict[str, np.ndarray], tried: Sequence[np.ndarray]) -> tuple[tuple[float, float], np.ndarray]:
    """Return the shares of the weights, and the units, with the shortest code; groups and places are apart in this."""

    def lengths(units: Units, share: float, contexts: bool) -> np.ndarray:
        scaled = {name: np.rint(parts[name] * share) for name in ("group_context", "member_context", "repeats")}
        layout = Layout.of(parts["prior"], powers=parts["powers"], **scaled)
        total: np.ndarray = np.sum([index_coder.lengths(layout, grid, units, contexts) for grid in tried], axis=0)
        return total

    options = [(0, 0)] + [(unit, unit) for unit in (PRIOR_TOTAL // strength for strength in _STRENGTHS)]
    adaptive = np.array([lengths(units, 1.0, False) for units in options])
    context = np.array([lengths(units, 1.0, True) for units in options])
    units = np.array([[options[i][0] for i in found.argmin(axis=0)] for found in (adaptive, context)], np.int32)
    of_context: Units = (int(units[1, 0]), int(units[1, 1]))
    by_share = np.array([lengths(of_context, share, True) for share in _SHARES])
    best = by_share.argmin(axis=0)
    return (_SHARES[best[0]], _SHARES[best[1]]), units
