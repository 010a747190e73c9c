"""Codebook indices to bytes and back, in integers: the group of each code, then its place in the group.

    prior + codes seen in the tile, times what the neighbours say -> frequencies of groups, of places -> range coder

The order is that of `codec.wavefront`; the codes of a front share what is known before it, so whole fronts are done at
once. FORMAT.md section 5.5 is the law. Works on places (`IndexTables.codes`), never on codes. Must not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, repeat

import numpy as np

from codec import rangecoder
from codec.wavefront import geometry

N_NEIGHBOURS = 6  # W, N, NW, NE, WW, NN
EXPONENT_LIMIT = 160  # of the sum of what neighbours say, in 1/16 octave
PRIOR_TOTAL = 1 << 24  # what the prior of all codes sums to, about
_BASE_BITS = 26  # of the weights of all groups, before neighbours have their say

Units = tuple[int, int]
"""What a code seen in the tile adds to the prior of its group, and of its place."""


@dataclass(frozen=True)
class Layout:
    """Tables by group: G groups, of at most M places each; unused places have the weight 0.

    Attributes:
        sizes: (G,) int64, places of each group.
        firsts: (G,) int64, the first of them.
        prior: (G, M) int64.
        group_classes: (K + 1,) int64, the class of each place in `group_context`; the last one is for no place.
        member_classes: the same, in `member_context`.
        group_context: (6 * (C + 1), G) int16, for each neighbour its classes; the last one is all zero.
        member_context: (6 * (c + 1), G, M) int16.
        repeats: (6,) int64.
        powers: (2 * EXPONENT_LIMIT + 1,) int64.
    """

    sizes: np.ndarray
    firsts: np.ndarray
    prior: np.ndarray
    group_classes: np.ndarray
    member_classes: np.ndarray
    group_context: np.ndarray
    member_context: np.ndarray
    repeats: np.ndarray
    powers: np.ndarray

    @classmethod
    def of(
        cls,
        prior: np.ndarray,
        group_context: np.ndarray,
        member_context: np.ndarray,
        repeats: np.ndarray,
        powers: np.ndarray,
    ) -> "Layout":
        """Arrange the arrays of `codec.index_tables.IndexTables`."""
        k, n_groups = prior.size, group_context.shape[2]
        firsts = -(-np.arange(n_groups + 1) * k // n_groups)  # the first p with p * G // K = g
        sizes = np.diff(firsts)
        where = firsts[:-1, None] + np.arange(int(sizes.max()))
        unused = where >= firsts[1:, None]
        where = np.where(unused, 0, where)

        def padded(context: np.ndarray) -> np.ndarray:
            rows = np.pad(context.astype(np.int16), ((0, 0), (0, 1), (0, 0)))
            return rows.reshape(-1, context.shape[2])

        return cls(
            sizes=sizes,
            firsts=firsts[:-1],
            prior=np.where(unused, 0, prior.astype(np.int64)[where]),
            group_classes=_classes(k, group_context.shape[1]),
            member_classes=_classes(k, member_context.shape[1]),
            group_context=padded(group_context),
            member_context=np.where(unused, np.int16(0), padded(member_context)[:, where]),
            repeats=repeats.astype(np.int64),
            powers=powers.astype(np.int64),
        )

    def split(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return group and place within the group."""
        n_groups, k = self.sizes.size, self.group_classes.size - 1
        groups = places * n_groups // k
        return groups, places - self.firsts[groups]


def _classes(k: int, n_classes: int) -> np.ndarray:
    return np.append(np.arange(k) * n_classes // k, n_classes)


class Walk:
    """Goes over a grid in the order of coding: what to expect of each front, and then what there is."""

    def __init__(self, layout: Layout, shape: tuple[int, int], units: Units, contexts: bool) -> None:
        """Start before the first index.

        Args:
            layout: the tables.
            shape: (h, w).
            units: see `Units`; (0, 0) = nothing is learned.
            contexts: whether neighbours have their say.
        """
        self._layout = layout
        self._geometry = geometry((1, *shape))
        self._units, self._contexts = units, contexts
        self._no_place = layout.group_classes.size - 1
        self.places = np.full(shape[0] * shape[1] + 1, self._no_place, np.int64)  # the last one stands for none
        self._seen = np.zeros_like(layout.prior)
        self._group_prior = layout.prior.sum(axis=1)
        self._n_seen = 0
        self._used = layout.prior > 0
        self._near = np.empty((N_NEIGHBOURS, 0), np.int64)  # places of the neighbours of the current front
        self._fixed: tuple[np.ndarray, np.ndarray] | None = None  # the bounds, where they are always the same
        if not contexts and not any(units):
            self._fixed = self.groups(), self.members(np.arange(layout.sizes.size))

    def fronts(self) -> Iterator[np.ndarray]:
        """Yield the flat positions of each front, in the order of coding; each wants one `put`."""
        order, ends = self._geometry.order, self._geometry.ends
        for begin, end in pairwise(ends):
            at = order[begin:end]
            self._near = self.places[self._geometry.neighbours[:N_NEIGHBOURS, at]]
            yield at

    def groups(self) -> np.ndarray:
        """Return the bounds of the groups' intervals, (n, G + 1) int64; (1, G + 1) where all have the same."""
        if self._fixed is not None:
            return self._fixed[0]
        layout = self._layout
        weights = self._learned(self._group_prior, self._seen.sum(axis=1) if self._units[0] else None, 0)[None]
        if self._contexts:
            said = self._said(layout.group_context, layout.group_classes)
            weights = weights * self._powers(said.sum(axis=0))
        return _bounds(weights, np.full(len(weights), layout.sizes.size))

    def members(self, groups: np.ndarray) -> np.ndarray:
        """Return the bounds of the intervals of the places in groups, (n,) -> (n, M + 1) int64."""
        if self._fixed is not None:
            of_groups: np.ndarray = self._fixed[1][groups]
            return of_groups
        layout = self._layout
        seen = self._seen[groups] if self._units[1] else None
        weights = self._learned(layout.prior[groups], seen, 1)
        if self._contexts:
            rows = self._rows(layout.member_context, layout.member_classes)
            said = layout.member_context[rows, groups].sum(axis=0, dtype=np.int64)
            near = np.minimum(self._near, self._no_place - 1)
            near_groups, near_members = layout.split(near)
            same = (near_groups == groups) & (self._near < self._no_place)
            for j in range(N_NEIGHBOURS):
                here = np.flatnonzero(same[j])
                said[here, near_members[j, here]] += layout.repeats[j]
            weights = weights * self._powers(said)
        return _bounds(weights * self._used[groups], layout.sizes[groups])

    def put(self, at: np.ndarray, places: np.ndarray, groups: np.ndarray, members: np.ndarray) -> None:
        """Set the places of the current front, and learn from them."""
        self.places[at] = places
        if any(self._units):
            np.add.at(self._seen, (groups, members), 1)
            self._n_seen += at.size

    def _learned(self, prior: np.ndarray, seen: np.ndarray | None, level: int) -> np.ndarray:
        """Return the prior and what was seen, shifted so far to the right that the sum over all codes has 26 bits."""
        if seen is None:
            return prior
        unit = self._units[level]
        total = int(self._group_prior.sum()) + unit * self._n_seen
        shifted: np.ndarray = np.maximum((prior + unit * seen) >> max(0, total.bit_length() - _BASE_BITS), 1)
        return shifted

    def _rows(self, context: np.ndarray, classes: np.ndarray) -> np.ndarray:
        per_neighbour = len(context) // N_NEIGHBOURS
        rows: np.ndarray = classes[self._near] + np.arange(0, len(context), per_neighbour)[:, None]
        return rows

    def _said(self, context: np.ndarray, classes: np.ndarray) -> np.ndarray:
        said: np.ndarray = context[self._rows(context, classes)]
        return said

    def _powers(self, said: np.ndarray) -> np.ndarray:
        exponents = np.minimum(np.maximum(said, -EXPONENT_LIMIT), EXPONENT_LIMIT) + EXPONENT_LIMIT
        powers: np.ndarray = self._layout.powers[exponents]
        return powers


def _bounds(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return where intervals begin and end whose sizes are about proportional to weights, and at least 1.

    Args:
        weights: (n, A) int64, 0 behind the first `sizes` of a row.
        sizes: (n,), how many intervals each row has.
    """
    sums = np.cumsum(weights, axis=1)
    bounds = np.zeros((len(weights), weights.shape[1] + 1), np.int64)
    bounds[:, 1:] = sums * (rangecoder.TOTAL - sizes)[:, None] // sums[:, -1:]
    bounds[:, 1:] += np.minimum(np.arange(1, weights.shape[1] + 1), sizes[:, None])
    return bounds


def encode(layout: Layout, places: np.ndarray, units: Units, contexts: bool) -> bytes:
    """Code (h, w) places; see `Walk` for the rest."""
    starts, sizes = [], []
    for bounds, symbols in _symbols(layout, places, units, contexts):
        rows = _rows_of(bounds, symbols)
        start = bounds[rows, symbols]
        starts += start.tolist()
        sizes += (bounds[rows, symbols + 1] - start).tolist()
    return rangecoder.encode(zip(starts, sizes, strict=True))


def lengths(layout: Layout, places: np.ndarray, units: Units, contexts: bool) -> tuple[float, float]:
    """Return the ideal code lengths of the groups and of the places in them, in bits."""
    bits = [0.0, 0.0]
    for n, (bounds, symbols) in enumerate(_symbols(layout, places, units, contexts)):
        rows = _rows_of(bounds, symbols)
        sizes = (bounds[rows, symbols + 1] - bounds[rows, symbols]).astype(np.float64)
        level = n % 2 if layout.prior.shape[1] > 1 else 0
        bits[level] += float((rangecoder.PRECISION_BITS - np.log2(sizes)).sum())
    return bits[0], bits[1]


def _rows_of(bounds: np.ndarray, symbols: np.ndarray) -> np.ndarray | int:
    """Return which row of bounds is that of each symbol."""
    return np.arange(symbols.size) if len(bounds) > 1 else 0


def _symbols(
    layout: Layout, places: np.ndarray, units: Units, contexts: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield bounds and symbols: the groups of a front, the places in them, the groups of the next front ..."""
    height, width = places.shape
    walk = Walk(layout, (height, width), units, contexts)
    flat = places.reshape(-1)
    groups, members = layout.split(flat)
    for at in walk.fronts():
        yield walk.groups(), groups[at]
        if layout.prior.shape[1] > 1:
            yield walk.members(groups[at]), members[at]
        walk.put(at, flat[at], groups[at], members[at])


def decode(layout: Layout, payload: bytes, shape: tuple[int, int], units: Units, contexts: bool) -> np.ndarray:
    """Read (h, w) int64 places back.

    Raises:
        FormatError: the payload is damaged.
    """
    decoder = rangecoder.Decoder(payload)
    walk = Walk(layout, shape, units, contexts)
    for at in walk.fronts():
        rows = walk.groups().tolist()
        groups = np.array(decoder.symbols(rows if len(rows) == at.size else repeat(rows[0], at.size)))
        members = np.zeros_like(groups)
        if layout.prior.shape[1] > 1:
            members = np.array(decoder.symbols(walk.members(groups).tolist()))
        walk.put(at, layout.firsts[groups] + members, groups, members)
    decoder.finish()
    return walk.places[:-1].reshape(shape)
