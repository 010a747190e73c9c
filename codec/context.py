"""CONTEXT mode: every index under a table that indices coded before it choose; FORMAT.md sections 4.2 and 5.3.

    nine neighbours in the channel, four channels before it -> prediction (1/8 step) + error to expect
      -> class -> frequency table (one per class and eighth of a step) -> range coder

Integers only, from stored weights: every machine finds the same tables. The order is that of a wavefront,
t = x + 2 * y + c: what an index depends on lies on earlier fronts, so that a whole front is predicted at once.
Must not import torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from codec import rangecoder
from codec.errors import ModelError
from codec.quantiser import INDEX_LIMIT, QUALITIES
from codec.static import check_frequencies, check_indices, escape_bits
from codec.wavefront import N_CAUSES, N_NEIGHBOURS, N_PREVIOUS, geometry

PHASES = 8  # predictions and their errors are counted in eighths of a step
WEIGHT_BITS = 12  # a weight of 4096 is one
ERROR_SHIFT = 6  # from eighths times weights to 1/512 steps, in which expected errors are counted
CLASSES_PER_OCTAVE = 4  # of the expected error
_LIMIT = PHASES * INDEX_LIMIT
_MAX_SHIFT = 12
_CHUNK = 1 << 16  # symbols whose causes are looked up at once


@dataclass(frozen=True)
class ContextTables:
    """Weights by quality and channel, and tables by class and phase that all of them share.

    Attributes:
        weights: (QUALITIES, D, 27) int16: 13 of the prediction, 13 (>= 0) of the expected error, and its least value.
        thresholds: (classes - 1,) int32 ascending, expected errors in 1/512 steps that bound the classes.
        reach: (classes,) int32 >= 1: a table holds the escape and then the residuals -reach..reach.
        frequencies: uint16, for each class `PHASES` tables of 2 * reach + 2 entries, each summing to 65536.
    """

    weights: np.ndarray
    thresholds: np.ndarray
    reach: np.ndarray
    frequencies: np.ndarray

    def __post_init__(self) -> None:
        thresholds = self.thresholds
        if (
            self.weights.ndim != 3
            or self.weights.shape[0::2] != (QUALITIES, 2 * N_CAUSES + 1)
            or bool((self.weights[:, :, N_CAUSES:] < 0).any())
            or self.reach.shape != (thresholds.size + 1,)
            or bool((self.reach < 1).any())
            or thresholds.size < CLASSES_PER_OCTAVE
            or bool((np.diff(thresholds, prepend=0) <= 0).any())
            or int(thresholds[-1]) >= 2 * int(thresholds[-CLASSES_PER_OCTAVE])
        ):
            raise ModelError("context tables are damaged: shapes, weights or thresholds are out of range")
        check_frequencies(self.offsets, self.frequencies)

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return int(self.weights.shape[1])

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each table, number class * PHASES + phase, starts in `frequencies`; (tables + 1,) int64."""
        sizes = np.repeat(2 * self.reach.astype(np.int64) + 2, PHASES)
        return np.concatenate([[0], np.cumsum(sizes)])

    @cached_property
    def starts(self) -> np.ndarray:
        """The start of every symbol's interval, in the order of `frequencies`, int64."""
        before = np.concatenate([[0], np.cumsum(self.frequencies.astype(np.int64))])[:-1]
        starts: np.ndarray = before - np.repeat(before[self.offsets[:-1]], np.diff(self.offsets))
        return starts

    @cached_property
    def cumulative(self) -> list[list[int]]:
        """The cumulative frequencies of every table, as the range decoder wants them."""
        starts, bounds = self.starts.tolist(), self.offsets.tolist()
        return [[*starts[a:b], rangecoder.TOTAL] for a, b in pairwise(bounds)]

    @cached_property
    def ladder(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps of the expected error: (n - 1,) bounds, (n,) classes and (n,) shifts, int64.

        Beyond the classes, each octave takes the classes of the last one again, for bins of 2^shift indices; which
        index of the bin it is follows as plain bits.
        """
        n, octave = self.reach.size, self.thresholds[-CLASSES_PER_OCTAVE:].astype(np.int64)
        shifts = np.arange(1, _MAX_SHIFT + 1)
        return (
            np.concatenate([self.thresholds, *(octave << shift for shift in shifts)]).astype(np.int64),
            np.concatenate([np.arange(n), np.tile(np.arange(n - octave.size, n), _MAX_SHIFT)]),
            np.concatenate([np.zeros(n, np.int64), np.repeat(shifts, octave.size)]),
        )

    def encode(self, indices: np.ndarray, quality: int) -> bytes:
        """Code integer latents, (D, h, w) int32 within +-INDEX_LIMIT."""
        return rangecoder.encode(self._intervals(indices, quality))

    def _intervals(self, indices: np.ndarray, quality: int) -> Iterable[tuple[int, int]]:
        """Return the intervals of all symbols in the order in which they are coded."""
        choice = self.choose(indices, quality)
        order = geometry(_grid(indices)).order
        table, base, shift, values = (a.reshape(-1)[order] for a in (choice.table, choice.base, choice.shift, indices))
        place = self.place(Choice(table, base, shift), values)
        pairs = list(zip(self.starts[place.entry].tolist(), self.frequencies[place.entry].tolist(), strict=True))
        more = np.flatnonzero(place.escaped | (shift > 0))
        return _with_extras(pairs, more, place, shift, values) if more.size else pairs

    def place(self, choice: "Choice", indices: np.ndarray) -> "Place":
        """Return where indices, of the choice's shape or several of that, lie in the tables chosen for them."""
        residual = (indices >> choice.shift) - choice.base
        reach = np.broadcast_to(self.reach[choice.table // PHASES], residual.shape)
        escaped = np.abs(residual) > reach
        entry = self.offsets[choice.table] + np.where(escaped, 0, residual + reach + 1)
        return Place(entry, residual, reach, escaped)

    def choose(self, indices: np.ndarray, quality: int) -> "Choice":
        """Return the table, base and shift of every index; see `Choice`.

        Args:
            indices: (D, h, w) int32 within +-INDEX_LIMIT.
            quality: 0..100.
        """
        shape = _grid(indices)
        neighbours = geometry(shape).neighbours  # (9, h*w)
        weights = self.weights[quality].astype(np.int64)
        planes = shape[1] * shape[2]
        values = np.zeros((shape[0], planes + 1), np.int64)
        values[:, :-1] = PHASES * indices.reshape(shape[0], -1).astype(np.int64)
        residuals = np.zeros((shape[0] + N_PREVIOUS, planes + 1), np.int64)  # N_PREVIOUS empty channels come first
        predictions = np.empty((shape[0], planes), np.int64)
        errors = np.empty((shape[0], planes), np.int64)
        for c in range(shape[0]):
            previous = residuals[c : c + N_PREVIOUS, :-1][::-1]  # c - 1 first
            sums = (values[c][neighbours] * weights[c, :N_NEIGHBOURS, None]).sum(axis=0)
            sums += (previous * weights[c, N_NEIGHBOURS:N_CAUSES, None]).sum(axis=0)
            predictions[c] = prediction(sums)
            own = residuals[c + N_PREVIOUS]
            own[:-1] = values[c, :-1] - predictions[c]
            sums = (np.abs(own[neighbours]) * weights[c, N_CAUSES : N_CAUSES + N_NEIGHBOURS, None]).sum(axis=0)
            sums += (np.abs(previous) * weights[c, N_CAUSES + N_NEIGHBOURS : -1, None]).sum(axis=0)
            errors[c] = (sums >> ERROR_SHIFT) + weights[c, -1]
        return self.expect(predictions.reshape(shape), errors.reshape(shape))

    def expect(self, predictions: np.ndarray, errors: np.ndarray) -> "Choice":
        """Turn predictions, in eighths of a step, and expected errors, in 1/512 steps, into tables."""
        bounds, classes, shifts = self.ladder
        step = bounds.searchsorted(errors, side="right")
        shift = shifts[step]
        moved = predictions + PHASES // 2  # so that the base is the nearest bin
        if shift.any():  # the middle of a bin of 2^s indices lies (2^s - 1) / 2 steps above its first
            moved = ((predictions - (((1 << shift) - 1) << 2)) >> shift) + PHASES // 2
        return Choice(classes[step] * PHASES + (moved & (PHASES - 1)), moved >> 3, shift)

    def decode(self, payload: bytes, shape: tuple[int, int], quality: int) -> np.ndarray:
        """Read (D, h, w) int32 integer latents back.

        Raises:
            FormatError: the payload is damaged.
        """
        decoder = rangecoder.Decoder(payload)
        wavefront = Wavefront(self, (self.channels, *shape), quality)
        for choice in wavefront.fronts():
            wavefront.put(self._read_front(decoder, choice))
        decoder.finish()
        return wavefront.indices()

    def _read_front(self, decoder: rangecoder.Decoder, choice: "Choice") -> np.ndarray:
        tables = self.cumulative
        wanted = [tables[i] for i in choice.table.tolist()]
        base = choice.base - self.reach[choice.table // PHASES] - 1  # less what symbols count from
        if not choice.shift.any():
            values: np.ndarray = np.array(_read(decoder, wanted)) + base
            return values
        shifted = choice.shift > 0
        both: list[list[int]] = []
        for table, shift in zip(wanted, choice.shift.tolist(), strict=True):
            both += [table, _field_table(shift)] if shift else [table]
        symbols = np.array(_read(decoder, both))
        bits = np.flatnonzero(shifted) + np.cumsum(shifted)[shifted]  # where the numbers within the bins are
        values = np.delete(symbols, bits) + base << choice.shift
        values[shifted] += symbols[bits] - 1
        return values

    def bits(self, indices: np.ndarray, quality: int) -> np.ndarray:
        """Return the ideal code length of every index, (D, h, w) int32 -> (D, h, w) float64, in bits."""
        return self.cost(self.choose(indices, quality), indices)

    @cached_property
    def _lengths(self) -> np.ndarray:
        lengths: np.ndarray = rangecoder.PRECISION_BITS - np.log2(self.frequencies.astype(np.float64))
        return lengths

    def cost(self, choice: "Choice", indices: np.ndarray) -> np.ndarray:
        """Return the bits of indices, of the choice's shape or several of that, under the tables chosen for them."""
        place = self.place(choice, indices)
        lengths: np.ndarray = self._lengths[place.entry] + choice.shift
        if place.escaped.any():
            far = place.reach[place.escaped]
            lengths[place.escaped] += escape_bits(place.residual[place.escaped], -far, far)
        return lengths


@dataclass(frozen=True)
class Choice:
    """What is known of indices before they are read.

    Attributes:
        table: number of the frequency table, class * PHASES + phase.
        base: the bin that residual 0 stands for.
        shift: an index v lies in the bin v >> shift.
    """

    table: np.ndarray
    base: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where indices lie in their tables.

    Attributes:
        entry: of the symbol, in `frequencies`; of the escape where `escaped`.
        residual: the bin of the index less the base.
        reach: of the table.
        escaped: whether the residual is beyond the reach.
    """

    entry: np.ndarray
    residual: np.ndarray
    reach: np.ndarray
    escaped: np.ndarray


class Wavefront:
    """Goes over a grid in the order of coding: `fronts` yields what to expect, `put` takes what there is."""

    def __init__(self, tables: ContextTables, shape: tuple[int, int, int], quality: int) -> None:
        """Start before the first index.

        Args:
            tables: the weights.
            shape: (D, h, w).
            quality: 0..100.
        """
        self._tables = tables
        self._shape = shape
        self._geometry = geometry(shape)
        self._weights = np.ascontiguousarray(tables.weights[quality].T.astype(np.int64))  # (27, D)
        cells = shape[0] * (shape[1] * shape[2] + 1)
        self._state = np.zeros(2 * cells, np.int64)  # values, then residuals, of all channels, in eighths
        self._cells = cells
        self.at = np.empty(0, np.int64)  # flat (D, h, w) positions of the current front
        self._cell = self.at
        self._prediction = self.at

    def fronts(self) -> Iterator[Choice]:
        """Yield what to expect of the indices of each front, in the order of coding; each wants one `put`."""
        order, ends = self._geometry.order, self._geometry.ends
        begin = 0
        while begin < len(ends) - 1:
            stop = begin + 1
            while stop < len(ends) - 1 and ends[stop + 1] - ends[begin] <= _CHUNK:
                stop += 1
            positions = order[ends[begin] : ends[stop]]
            cells, causes, channels = self._geometry.causes(positions)
            weights = self._weights[:, channels]
            for k in range(begin, stop):
                part = slice(ends[k] - ends[begin], ends[k + 1] - ends[begin])
                self.at, self._cell = positions[part], cells[part]
                yield self._expect(causes[:, part], weights[:, part])
            begin = stop

    def _expect(self, causes: np.ndarray, weights: np.ndarray) -> Choice:
        found = self._state.take(causes)  # (26, n): values or residuals, then residuals
        np.abs(found[N_CAUSES:], out=found[N_CAUSES:])
        found *= weights[:-1]
        sums = np.add.reduceat(found, (0, N_CAUSES), axis=0)
        self._prediction = prediction(sums[0])
        return self._tables.expect(self._prediction, (sums[1] >> ERROR_SHIFT) + weights[-1])

    def put(self, indices: np.ndarray) -> None:
        """Set the indices of the current front."""
        values = indices * PHASES
        self._state[self._cell] = values
        self._state[self._cell + self._cells] = values - self._prediction

    def indices(self) -> np.ndarray:
        """Return all that was put, (D, h, w) int32.

        Raises:
            FormatError: one of them is beyond the limit.
        """
        values = self._state[: self._cells].reshape(self._shape[0], -1)[:, :-1] // PHASES
        return check_indices(values).reshape(self._shape)


def _grid(indices: np.ndarray) -> tuple[int, int, int]:
    channels, height, width = indices.shape
    return channels, height, width


def _read(decoder: rangecoder.Decoder, wanted: Sequence[Sequence[int]]) -> list[int]:
    """Read a symbol under each table, escaped ones as the number that their residual would have."""
    tables = iter(wanted)
    symbols = decoder.symbols(tables, stop=0)
    while symbols[-1] == 0:  # an escape, whose bits follow at once
        far = (len(wanted[len(symbols) - 1]) - 3) // 2
        symbols[-1] = decoder.escaped(-far, far) + far + 1
        if len(symbols) == len(wanted):
            break
        symbols += decoder.symbols(tables, stop=0)
    return symbols


@lru_cache(maxsize=_MAX_SHIFT)
def _field_table(n_bits: int) -> list[int]:
    """Return a table of equiprobable numbers, from symbol 1 on: symbol 0, which would stop the decoder, is empty."""
    return [0, *range(0, rangecoder.TOTAL + 1, rangecoder.TOTAL >> n_bits)]


def prediction(sums: np.ndarray) -> np.ndarray:
    """Round weighted sums to eighths of a step, within the limit of an index."""
    rounded = (sums + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS
    result: np.ndarray = np.minimum(np.maximum(rounded, -_LIMIT), _LIMIT)
    return result


def _with_extras(
    pairs: Sequence[tuple[int, int]], more: np.ndarray, place: Place, shift: np.ndarray, values: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Put the bits of escapes and of bins behind the symbols that they belong to."""
    begin = 0
    for at in more.tolist():
        yield from pairs[begin : at + 1]
        if place.escaped[at]:
            yield from rangecoder.escape(int(place.residual[at]), -int(place.reach[at]), int(place.reach[at]))
        if shift[at]:
            yield rangecoder.field(int(values[at]) & ((1 << int(shift[at])) - 1), int(shift[at]))
        begin = at + 1
    yield from pairs[begin:]
