"""STATIC mode: one integer frequency table per quality and latent channel; FORMAT.md sections 4.1 and 5.2.

Symbol 0 of every table is the escape; symbol k >= 1 stands for the index `first + k - 1`. Coding uses integers only.
Must not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from codec import rangecoder
from codec.errors import FormatError, ModelError
from codec.quantiser import INDEX_LIMIT, QUALITIES


@dataclass(frozen=True)
class StaticTables:
    """For quality q and channel c the slice `offsets[q * D + c] : offsets[q * D + c + 1]` of `frequencies`.

    Attributes:
        first: (QUALITIES * D,) int32, the index that symbol 1 of each table stands for.
        offsets: (QUALITIES * D + 1,) int32, where each table starts in `frequencies`.
        frequencies: uint16, each >= 1; the slice of a table sums to 65536.
    """

    first: np.ndarray
    offsets: np.ndarray
    frequencies: np.ndarray

    def __post_init__(self) -> None:
        check_frequencies(self.offsets, self.frequencies)
        if self.first.size % QUALITIES or self.offsets.size != self.first.size + 1:
            raise ModelError("entropy tables are damaged: not one table for every quality and channel")

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return self.first.size // QUALITIES

    def table(self, quality: int, channel: int) -> tuple[int, np.ndarray]:
        """Return (first, cumulative) of one table; cumulative is (n + 1,) int64 from 0 to 65536."""
        i = quality * self.channels + channel
        frequencies = self.frequencies[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)
        return int(self.first[i]), np.concatenate([[0], np.cumsum(frequencies)])

    def encode(self, indices: np.ndarray, quality: int) -> bytes:
        """Code integer latents, (D, h, w) int32, channel by channel in raster order."""
        return rangecoder.encode(self._intervals(indices, quality))

    def _intervals(self, indices: np.ndarray, quality: int) -> Iterator[tuple[int, int]]:
        for channel, plane in enumerate(indices):
            first, cumulative = self.table(quality, channel)
            values = plane.reshape(-1)
            symbols = values - first + 1
            symbols[(symbols < 1) | (symbols > cumulative.size - 2)] = 0
            starts = cumulative[symbols].tolist()
            sizes = np.diff(cumulative)[symbols].tolist()
            begin = 0
            for at in np.flatnonzero(symbols == 0).tolist():
                yield from zip(starts[begin : at + 1], sizes[begin : at + 1], strict=True)
                yield from rangecoder.escape(int(values[at]), first, first + cumulative.size - 3)
                begin = at + 1
            yield from zip(starts[begin:], sizes[begin:], strict=True)

    def decode(self, payload: bytes, shape: tuple[int, int], quality: int) -> np.ndarray:
        """Read (D, h, w) int32 integer latents back.

        Raises:
            FormatError: the payload is damaged.
        """
        decoder = rangecoder.Decoder(payload)
        count = shape[0] * shape[1]
        planes = []
        for channel in range(self.channels):
            first, cumulative = self.table(quality, channel)
            last = first + cumulative.size - 3
            bounds = cumulative.tolist()
            plane: list[int] = []
            while len(plane) < count:
                symbols = decoder.symbols(repeat(bounds, count - len(plane)), stop=0)
                plane += [symbol + first - 1 for symbol in symbols]
                if symbols[-1] == 0:
                    plane[-1] = decoder.escaped(first, last)
            planes.append(np.array(plane, dtype=np.int32).reshape(shape))
        decoder.finish()
        return check_indices(np.stack(planes))

    def bits(self, indices: np.ndarray, quality: int) -> np.ndarray:
        """Return the ideal code length of every index, escapes included: (D, h, w) int32 -> (D, h, w) float64, bits."""
        lengths = np.empty(indices.shape)
        for channel, plane in enumerate(indices):
            first, cumulative = self.table(quality, channel)
            last = first + cumulative.size - 3
            escaped = (plane < first) | (plane > last)
            sizes = np.diff(cumulative)[np.where(escaped, 0, plane - first + 1)]
            lengths[channel] = rangecoder.PRECISION_BITS - np.log2(sizes)
            if escaped.any():
                lengths[channel][escaped] += escape_bits(plane[escaped], first, last)
        return lengths


def escape_bits(values: np.ndarray, first: np.ndarray | int, last: np.ndarray | int) -> np.ndarray:
    """Return the bits that `rangecoder.escape` takes for values outside first..last: 6 + floor(log2(distance))."""
    distance = np.where(values < first, first - values, values - last)
    exponents: np.ndarray = np.frexp(distance.astype(np.float64))[1] - 1
    return 6.0 + exponents


def check_indices(indices: np.ndarray) -> np.ndarray:
    """Return decoded integer latents as int32.

    Raises:
        FormatError: one of them is beyond the limit.
    """
    if bool((np.abs(indices) > INDEX_LIMIT).any()):
        raise FormatError(f"damaged payload: an index is beyond {INDEX_LIMIT}")
    return indices.astype(np.int32)


def check_frequencies(offsets: np.ndarray, frequencies: np.ndarray) -> None:
    """Check tables that lie one after the other.

    Raises:
        ModelError: a table has fewer than two symbols, a frequency of zero, or another sum than 65536.
    """
    if (
        offsets.size < 2
        or int(offsets[0]) != 0
        or int(offsets[-1]) != frequencies.size
        or bool((np.diff(offsets) < 2).any())
        or bool((frequencies < 1).any())
        or bool((np.add.reduceat(frequencies.astype(np.int64), offsets[:-1]) != rangecoder.TOTAL).any())
    ):
        raise ModelError("entropy tables are damaged: every table must sum to 65536 with no zero frequency")


def normalize(weights: np.ndarray) -> np.ndarray:
    """Scale positive weights to uint16 frequencies that are >= 1 and sum to 65536 (largest remainders get the rest)."""
    spare = rangecoder.TOTAL - weights.size
    exact = weights / weights.sum() * spare
    frequencies = np.floor(exact).astype(np.int64)
    rest = spare - int(frequencies.sum())
    order = np.argsort(-(exact - frequencies), kind="stable")
    frequencies[order[:rest]] += 1
    result: np.ndarray = (frequencies + 1).astype(np.uint16)
    return result
