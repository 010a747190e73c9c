"""Integer entropy tables: one per quality and latent channel, stored in the model folder, never computed at run time.

    z (raw, D channels) -> round((z - mean_c) / (step_c * 2^(-q/16))) = indices -> table (q, c) -> coder -> payload

Symbol 0 of every table is the escape; symbol k >= 1 stands for the index `first + k - 1`. FORMAT.md sections 4 and 5
are the law. Fitting uses floating point; coding and decoding use integers only. Must not import torch.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from codec import rangecoder
from codec.errors import FormatError, ModelError

QUALITIES = 101  # q = 0 (coarsest) .. 100 (finest)
QUALITY_PER_OCTAVE = 16  # the step halves every 16 units of q
INDEX_LIMIT = 1 << 20  # |index| <= this; latents beyond it are clamped by the encoder
_TABLE_LIMIT = 255  # indices beyond +-this go through the escape
_ESCAPE_LENGTH_BITS = 5


def step_scale(quality: int) -> float:
    """Return 2^(-q/16), which multiplies the per-channel steps (1 at q = 0, 0.0131 at q = 100)."""
    return float(2.0 ** (-quality / QUALITY_PER_OCTAVE))


def to_indices(z: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> np.ndarray:
    """Quantise raw latents.

    Args:
        z: (D, ...) float raw latents.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.
        quality: 0..100.

    Returns:
        (D, ...) int32, round half to even, clamped to +-INDEX_LIMIT.

    Raises:
        ValueError: z holds a value that is not finite.
    """
    if not np.isfinite(z).all():
        raise ValueError("latents are not finite")
    shape = (-1,) + (1,) * (z.ndim - 1)
    scaled = (z.astype(np.float64) - mean.reshape(shape)) / (
        step.astype(np.float64).reshape(shape) * step_scale(quality)
    )
    indices: np.ndarray = np.clip(np.rint(scaled), -INDEX_LIMIT, INDEX_LIMIT).astype(np.int32)
    return indices


def from_indices(indices: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> np.ndarray:
    """Return the raw latents z_q, (D, ...) float32, that indices stand for."""
    shape = (-1,) + (1,) * (indices.ndim - 1)
    scale = step.astype(np.float64).reshape(shape) * step_scale(quality)
    z_q: np.ndarray = (indices * scale + mean.reshape(shape)).astype(np.float32)
    return z_q


@dataclass(frozen=True)
class TableSet:
    """All tables of one stream: for quality q and channel c the slice `offsets[q * D + c] : offsets[q * D + c + 1]`.

    Attributes:
        first: (QUALITIES * D,) int32, the index that symbol 1 of each table stands for.
        offsets: (QUALITIES * D + 1,) int32, where each table starts in `frequencies`.
        frequencies: uint16, each >= 1; the slice of a table sums to 65536.
    """

    first: np.ndarray
    offsets: np.ndarray
    frequencies: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.first.size % QUALITIES
            or self.offsets.size != self.first.size + 1
            or int(self.offsets[0]) != 0
            or int(self.offsets[-1]) != self.frequencies.size
            or bool((np.diff(self.offsets) < 2).any())
            or bool((self.frequencies < 1).any())
            or bool((np.add.reduceat(self.frequencies.astype(np.int64), self.offsets[:-1]) != rangecoder.TOTAL).any())
        ):
            raise ModelError("entropy tables are damaged: every table must sum to 65536 with no zero frequency")

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
            escapes = np.flatnonzero(symbols == 0).tolist()
            begin = 0
            for at in escapes:
                yield from zip(starts[begin : at + 1], sizes[begin : at + 1], strict=True)
                yield from _escape_intervals(int(values[at]), first, first + cumulative.size - 3)
                begin = at + 1
            yield from zip(starts[begin:], sizes[begin:], strict=True)

    def decode(self, payload: bytes, shape: tuple[int, int], quality: int) -> np.ndarray:
        """Read integer latents back.

        Args:
            payload: what `encode` returned.
            shape: (h, w) of the latent grid.
            quality: 0..100.

        Returns:
            (D, h, w) int32.

        Raises:
            FormatError: the payload is damaged (a CRC over the file finds this first).
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
                symbols = decoder.symbols(bounds, count - len(plane), stop=0)
                escaped = symbols[-1] == 0
                plane += [symbol + first - 1 for symbol in symbols]
                if escaped:
                    plane[-1] = _read_escape(decoder, first, last)
            planes.append(np.array(plane, dtype=np.int32).reshape(shape))
        if not decoder.finished():
            raise FormatError("damaged payload: bytes left over after the last latent")
        return np.stack(planes)

    def bits(self, indices: np.ndarray, quality: int) -> float:
        """Return the ideal code length of (D, h, w) integer latents under these tables, in bits, escapes included."""
        total = 0.0
        for channel, plane in enumerate(indices):
            first, cumulative = self.table(quality, channel)
            symbols = plane.reshape(-1) - first + 1
            escaped = (symbols < 1) | (symbols > cumulative.size - 2)
            sizes = np.diff(cumulative)[np.where(escaped, 0, symbols)]
            total += float((rangecoder.PRECISION_BITS - np.log2(sizes)).sum())
            for value in plane.reshape(-1)[escaped].tolist():
                pairs = _escape_intervals(value, first, first + cumulative.size - 3)
                total += sum(rangecoder.PRECISION_BITS - float(np.log2(size)) for _, size in pairs)
        return total

    def digest(self, mean: np.ndarray, step: np.ndarray) -> str:
        """Return the stream id (16 hex digits) of this table set with a mean and step; FORMAT.md section 3."""
        sha = hashlib.sha256(b"latent-codec stream 0")
        for array, dtype in (
            (mean, "<f4"),
            (step, "<f4"),
            (self.first, "<i4"),
            (self.offsets, "<i4"),
            (self.frequencies, "<u2"),
        ):
            sha.update(np.uint32(array.size).tobytes())
            sha.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return sha.hexdigest()[:16]


def _escape_intervals(value: int, first: int, last: int) -> list[tuple[int, int]]:
    """Intervals of an index outside [first, last]: 1 bit below/above, 5 bits length, then that many bits."""
    below = value < first
    distance = (first - value) if below else (value - last)  # >= 1
    length = distance.bit_length() - 1
    fields = [(int(below), 1), (length, _ESCAPE_LENGTH_BITS)]
    rest = distance - (1 << length)
    low_bits = min(length, 16)
    if length > 16:
        fields.append((rest >> 16, length - 16))
    if low_bits:
        fields.append((rest & ((1 << low_bits) - 1), low_bits))
    return [(number << (16 - width), 1 << (16 - width)) for number, width in fields]


def _read_escape(decoder: rangecoder.Decoder, first: int, last: int) -> int:
    below = decoder.bits(1)
    length = decoder.bits(_ESCAPE_LENGTH_BITS)
    if length > INDEX_LIMIT.bit_length():
        raise FormatError("damaged payload: an escaped index is too large")
    rest = decoder.bits(length - 16) << 16 if length > 16 else 0
    low_bits = min(length, 16)
    if low_bits:
        rest |= decoder.bits(low_bits)
    distance = (1 << length) + rest
    return first - distance if below else last + distance


def fit(z: np.ndarray, mean: np.ndarray, step: np.ndarray) -> TableSet:
    """Fit the tables of every quality to raw latents of training images.

    Args:
        z: (D, N) float32 raw latents, N >= 1.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.

    Returns:
        Tables from the counts of each index plus 1/2 (Krichevsky and Trofimov 1981), the escape included.
    """
    firsts, tables = [], []
    for quality in range(QUALITIES):
        indices = np.clip(to_indices(z, mean, step, quality), -_TABLE_LIMIT - 1, _TABLE_LIMIT + 1)
        for plane in indices:
            counts = np.bincount(plane + _TABLE_LIMIT + 1, minlength=2 * _TABLE_LIMIT + 3)
            escaped = counts[0] + counts[-1]
            seen = np.flatnonzero(counts[1:-1])
            low, high = (int(seen[0]), int(seen[-1])) if seen.size else (_TABLE_LIMIT, _TABLE_LIMIT)
            firsts.append(low - _TABLE_LIMIT)
            tables.append(_normalize(np.concatenate([[escaped], counts[1:-1][low : high + 1]]) + 0.5))
    offsets = np.cumsum([0] + [table.size for table in tables])
    return TableSet(
        first=np.array(firsts, dtype=np.int32),
        offsets=offsets.astype(np.int32),
        frequencies=np.concatenate(tables),
    )


def _normalize(weights: np.ndarray) -> np.ndarray:
    """Scale positive weights to uint16 frequencies that are >= 1 and sum to 65536 (largest remainders get the rest)."""
    spare = rangecoder.TOTAL - weights.size
    exact = weights / weights.sum() * spare
    frequencies = np.floor(exact).astype(np.int64)
    rest = spare - int(frequencies.sum())
    order = np.argsort(-(exact - frequencies), kind="stable")
    frequencies[order[:rest]] += 1
    result: np.ndarray = (frequencies + 1).astype(np.uint16)
    return result


def entropy_bits(z: np.ndarray, mean: np.ndarray, step: np.ndarray, quality: int) -> float:
    """Return the order-0 entropy of quantised (D, N) latents in bits per column: sum over channels, mean over N."""
    total = 0.0
    for plane in to_indices(z, mean, step, quality):
        counts = np.unique(plane, return_counts=True)[1].astype(np.float64)
        total -= float((counts / plane.size * np.log2(counts / plane.size)).sum())
    return total
