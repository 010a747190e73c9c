"""An exact range coder: intervals of a 16-bit integer scale in, bytes out, and back.

Integer arithmetic only, so every machine produces and reads the same bytes. The state is a 32-bit `low` with carry
and a 32-bit `range`, renormalised byte by byte (Martin 1979; the arithmetic of the LZMA SDK). FORMAT.md section 5 is
the law.

    encode: (cumulative, frequency) pairs -> payload          decode: payload + tables -> symbols
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from codec.errors import FormatError

PRECISION_BITS = 16
TOTAL = 1 << PRECISION_BITS  # every table's frequencies sum to this

_TOP = 1 << 24  # below this, `range` is renormalised
_MASK = (1 << 32) - 1


def encode(intervals: Iterable[tuple[int, int]]) -> bytes:
    """Code a sequence of intervals.

    Args:
        intervals: (cumulative, frequency) of each symbol; frequency >= 1 and cumulative + frequency <= TOTAL.

    Returns:
        The payload, without trailing zero bytes: the decoder reads zeros beyond the end.
    """
    out = bytearray()
    low, range_ = 0, _MASK
    for cumulative, frequency in intervals:
        unit = range_ >> PRECISION_BITS
        low += unit * cumulative
        range_ = unit * frequency
        if low > _MASK:
            _carry(out)
            low &= _MASK
        while range_ < _TOP:
            out.append(low >> 24)
            low = (low << 8) & _MASK
            range_ <<= 8
    # The shortest tail: the value inside [low, low + range) that ends in the most zero bits.
    for bits in range(32, -1, -1):
        value = (low + (1 << bits) - 1) >> bits << bits
        if value < low + range_:
            break
    if value > _MASK:
        _carry(out)
        value &= _MASK
    out += value.to_bytes(4, "big")
    return bytes(out).rstrip(b"\0")


def _carry(out: bytearray) -> None:
    """Add one to the number that `out` spells, most significant byte first."""
    i = len(out) - 1
    while out[i] == 0xFF:
        out[i] = 0
        i -= 1
    out[i] += 1


class Decoder:
    """Reads symbols from one payload, in the order in which they were coded."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._position = 4
        self._range = _MASK
        self._code = int.from_bytes(payload[:4].ljust(4, b"\0"), "big")

    def symbols(self, cumulative: Sequence[int], count: int, stop: int = -1) -> list[int]:
        """Read up to `count` symbols under one table.

        Args:
            cumulative: (n + 1,) increasing, from 0 to TOTAL; symbol k owns [cumulative[k], cumulative[k + 1]).
            count: how many to read, at least 0.
            stop: reading ends after this symbol was read (it is returned as the last one); -1 never stops.

        Raises:
            FormatError: the payload holds a position outside the scale, which no encoder writes.
        """
        payload, position, size = self._payload, self._position, len(self._payload)
        range_, code = self._range, self._code
        found: list[int] = []
        for _ in range(count):
            unit = range_ >> PRECISION_BITS
            target = code // unit
            if target >= TOTAL:
                raise FormatError("damaged payload: the range coder left its scale")
            symbol = bisect_right(cumulative, target) - 1
            start = cumulative[symbol]
            code -= unit * start
            range_ = unit * (cumulative[symbol + 1] - start)
            while range_ < _TOP:
                code = (code << 8) | (payload[position] if position < size else 0)
                position += 1
                range_ <<= 8
            found.append(symbol)
            if symbol == stop:
                break
        self._position, self._range, self._code = position, range_, code
        return found

    def bits(self, n_bits: int) -> int:
        """Read one number of `n_bits` (0 to 16) equiprobable bits."""
        unit = (self._range >> PRECISION_BITS) << (PRECISION_BITS - n_bits)
        value = self._code // unit
        if value >> n_bits:
            raise FormatError("damaged payload: the range coder left its scale")
        self._code -= unit * value
        self._range = unit
        while self._range < _TOP:
            byte = self._payload[self._position] if self._position < len(self._payload) else 0
            self._code = (self._code << 8) | byte
            self._position += 1
            self._range <<= 8
        return value

    def finished(self) -> bool:
        """Whether the payload ends where its last symbol ends: nothing of it is left unread."""
        return self._position >= len(self._payload)
