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

_TAIL_BYTES = 4  # what the encoder writes after the last symbol; the decoder is ahead by as many
_TOP = 1 << 24  # below this, `range` is renormalised
_MASK = (1 << 32) - 1
_ESCAPE_LENGTH_BITS = 5
_MAX_ESCAPE_LENGTH = 22  # of the distance between two indices within +-2^20, in bits
_ENDS_EARLY = "damaged payload: it ends early"


def encode(intervals: Iterable[tuple[int, int]]) -> bytes:
    """Code a sequence of intervals.

    Args:
        intervals: (cumulative, frequency) of each symbol; frequency >= 1 and cumulative + frequency <= TOTAL.

    Returns:
        The payload without its trailing zero bytes, of which at most four are dropped: the decoder reads no more than
        four zeros beyond the end.
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
    out += value.to_bytes(_TAIL_BYTES, "big")
    least = len(out) - _TAIL_BYTES
    return bytes(out[:least] + out[least:].rstrip(b"\0"))


def _carry(out: bytearray) -> None:
    """Add one to the number that `out` spells, most significant byte first."""
    i = len(out) - 1
    while out[i] == 0xFF:
        out[i] = 0
        i -= 1
    out[i] += 1


def field(value: int, n_bits: int) -> tuple[int, int]:
    """Return the interval of a number of `n_bits` (0 to 16) equiprobable bits."""
    return value << (PRECISION_BITS - n_bits), 1 << (PRECISION_BITS - n_bits)


def escape(value: int, first: int, last: int) -> list[tuple[int, int]]:
    """Return the intervals that follow an escape: a value outside first..last, at most 2^23 - 1 away from it.

    One bit below or above, 5 bits for the length of the distance, then the distance without its leading one.
    """
    below = value < first
    distance = (first - value) if below else (value - last)  # >= 1
    length = distance.bit_length() - 1
    rest = distance - (1 << length)
    low_bits = min(length, 16)
    fields = [field(int(below), 1), field(length, _ESCAPE_LENGTH_BITS)]
    if length > 16:
        fields.append(field(rest >> 16, length - 16))
    if low_bits:
        fields.append(field(rest & ((1 << low_bits) - 1), low_bits))
    return fields


class Decoder:
    """Reads symbols from one payload, in the order in which they were coded."""

    def __init__(self, payload: bytes) -> None:
        """Start at the first byte."""
        self._size = len(payload)
        self._payload = payload + bytes(_TAIL_BYTES)  # beyond it, indexing raises: the only check that reading needs
        self._position = _TAIL_BYTES  # bytes read; at last the length of the payload before zeros were dropped
        self._range = _MASK
        self._code = int.from_bytes(self._payload[:_TAIL_BYTES], "big")

    def symbols(self, tables: Iterable[Sequence[int]], stop: int = -1) -> list[int]:
        """Read one symbol under each table.

        Args:
            tables: cumulative frequencies, each (n + 1,) increasing from 0 to TOTAL; symbol k owns
                [cumulative[k], cumulative[k + 1]).
            stop: reading ends after this symbol was read (it is returned as the last one); -1 never stops.

        Raises:
            FormatError: the payload holds a position outside the scale, which no encoder writes, or it ends early.
        """
        payload, position = self._payload, self._position
        range_, code = self._range, self._code
        found: list[int] = []
        append = found.append
        for cumulative in tables:
            unit = range_ >> PRECISION_BITS
            target = code // unit
            if target >= TOTAL:
                raise FormatError("damaged payload: the range coder left its scale")
            symbol = bisect_right(cumulative, target) - 1
            start = cumulative[symbol]
            code -= unit * start
            range_ = unit * (cumulative[symbol + 1] - start)
            while range_ < _TOP:
                try:
                    code = (code << 8) | payload[position]
                except IndexError:
                    raise FormatError(_ENDS_EARLY) from None
                position += 1
                range_ <<= 8
            append(symbol)
            if symbol == stop:
                break
        self._position, self._range, self._code = position, range_, code
        return found

    def bits(self, n_bits: int) -> int:
        """Read one number of `n_bits` (0 to 16) equiprobable bits; raises FormatError as `symbols` does."""
        unit = (self._range >> PRECISION_BITS) << (PRECISION_BITS - n_bits)
        value = self._code // unit
        if value >> n_bits:
            raise FormatError("damaged payload: the range coder left its scale")
        self._code -= unit * value
        self._range = unit
        while self._range < _TOP:
            if self._position == len(self._payload):
                raise FormatError(_ENDS_EARLY)
            self._code = (self._code << 8) | self._payload[self._position]
            self._position += 1
            self._range <<= 8
        return value

    def escaped(self, first: int, last: int) -> int:
        """Read the value that `escape` coded.

        Raises:
            FormatError: it is farther away than any index can be, or the payload is damaged (see `symbols`).
        """
        below = self.bits(1)
        length = self.bits(_ESCAPE_LENGTH_BITS)
        if length > _MAX_ESCAPE_LENGTH:
            raise FormatError("damaged payload: an escaped index is too large")
        rest = self.bits(length - 16) << 16 if length > 16 else 0
        if length:
            rest |= self.bits(min(length, 16))
        distance = (1 << length) + rest
        return first - distance if below else last + distance

    def finish(self) -> None:
        """End reading.

        Raises:
            FormatError: bytes of the payload are left unread, or it ends in a zero byte that the encoder had dropped.
        """
        if self._position < self._size:
            raise FormatError("damaged payload: bytes left over after the last latent")
        if self._position < self._size + _TAIL_BYTES and self._payload[self._size - 1 : self._size] == b"\0":
            raise FormatError("damaged payload: it ends in a zero byte that should have been dropped")
