from collections.abc import Iterator

import numpy as np
import pytest

from codec import rangecoder
from codec.errors import FormatError


def tables_of(frequencies: list[int]) -> list[int]:
    assert sum(frequencies) == rangecoder.TOTAL
    return np.concatenate([[0], np.cumsum(frequencies)]).tolist()


SKEWED = tables_of([1, 1, 60000, 5000, 534])
FLAT = tables_of([256] * 256)


def intervals(symbols: list[int], cumulative: list[int]) -> list[tuple[int, int]]:
    return [(cumulative[s], cumulative[s + 1] - cumulative[s]) for s in symbols]


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_of_random_symbols_under_alternating_tables(seed: int) -> None:
    rng = np.random.default_rng(seed)
    skewed = rng.choice(5, p=np.diff(SKEWED) / rangecoder.TOTAL, size=rng.integers(0, 300)).tolist()
    rare = rng.integers(0, 5, size=rng.integers(0, 300)).tolist()  # the 1-in-65536 symbols on purpose
    flat = rng.integers(0, 256, size=rng.integers(0, 300)).tolist()
    payload = rangecoder.encode(intervals(skewed, SKEWED) + intervals(flat, FLAT) + intervals(rare, SKEWED))
    decoder = rangecoder.Decoder(payload)
    assert decoder.symbols([SKEWED] * len(skewed) + [FLAT] * len(flat)) == skewed + flat
    assert decoder.symbols([SKEWED] * len(rare)) == rare
    decoder.finish()


def test_reading_stops_behind_the_symbol_that_stops_it() -> None:
    symbols = [2, 3, 0, 4, 2]
    decoder = rangecoder.Decoder(rangecoder.encode(intervals(symbols, SKEWED)))
    assert decoder.symbols([SKEWED] * 5, stop=0) == [2, 3, 0]
    assert decoder.symbols([SKEWED] * 2, stop=0) == [4, 2]
    decoder.finish()


@pytest.mark.parametrize(("first", "last"), [(-3, 5), (0, 0), (-(2**20), 7)])
def test_escaped_numbers_come_back(first: int, last: int) -> None:
    near = [distance << n for n in range(22) for distance in (1,)] + [3, 100, 2**16 + 1, 2**20 - 1, 2**22 - 1]
    values = [last + d for d in near] + [first - d for d in near]
    pairs = [pair for value in values for pair in rangecoder.escape(value, first, last)]
    assert all(start + size <= rangecoder.TOTAL and size >= 1 for start, size in pairs)
    decoder = rangecoder.Decoder(rangecoder.encode(pairs))
    assert [decoder.escaped(first, last) for _ in values] == values


def test_an_escaped_number_beyond_all_distances_is_a_format_error() -> None:
    payload = rangecoder.encode([rangecoder.field(0, 1), rangecoder.field(23, 5)])
    with pytest.raises(FormatError, match="too large"):
        rangecoder.Decoder(payload).escaped(-1, 1)


def test_a_carry_runs_through_bytes_of_ff() -> None:
    # The last interval again and again drives `low` to the top; then the payload is a run of 0xFF until a carry.
    last = (rangecoder.TOTAL - 1, 1)
    for tail in range(0, rangecoder.TOTAL, 4099):
        coded = [last] * 6 + [(tail, 1)] * 3
        decoder = rangecoder.Decoder(rangecoder.encode(coded))
        every = list(range(rangecoder.TOTAL + 1))
        assert decoder.symbols([every] * 9) == [start for start, _ in coded]


def test_size_is_within_a_byte_or_two_of_the_ideal_code_length() -> None:
    rng = np.random.default_rng(0)
    p = np.diff(SKEWED) / rangecoder.TOTAL
    symbols = rng.choice(5, p=p, size=50_000)
    ideal_bytes = -np.log2(p[symbols]).sum() / 8
    assert ideal_bytes <= len(rangecoder.encode(intervals(symbols.tolist(), SKEWED))) <= ideal_bytes * 1.0005 + 2


def test_no_symbols_no_bytes() -> None:
    assert rangecoder.encode([]) == b""
    rangecoder.Decoder(b"").finish()


@pytest.mark.parametrize(("payload", "message"), [(b"\x80\0", "zero byte"), (b"\x80\0\0\0\x01\x01", "left over")])
def test_a_payload_that_is_too_long_is_a_format_error(payload: bytes, message: str) -> None:
    decoder = rangecoder.Decoder(payload)
    decoder.symbols([FLAT])
    with pytest.raises(FormatError, match=message):
        decoder.finish()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1000])
def test_at_most_four_zero_bytes_are_dropped_and_read_beyond_the_end(count: int) -> None:
    """Symbols whose intervals start at 0 are nothing but zeros: all that counts is how many."""
    payload = rangecoder.encode(intervals([0] * count, FLAT))
    assert payload == bytes(count)  # each symbol writes a byte, and the four of the end are dropped
    decoder = rangecoder.Decoder(payload)
    assert decoder.symbols([FLAT] * count) == [0] * count
    decoder.finish()
    with pytest.raises(FormatError, match="ends early"):
        rangecoder.Decoder(payload[:-1]).symbols([FLAT] * count)
    for extra in range(1, 5):
        decoder = rangecoder.Decoder(payload + bytes(extra))
        decoder.symbols([FLAT] * count)
        with pytest.raises(FormatError, match="zero byte"):
            decoder.finish()


def test_every_payload_has_one_length() -> None:
    """Of all endings in zeros, the decoder takes the encoder's and no other."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        symbols = rng.integers(0, 2, rng.integers(0, 9)).tolist() + [0] * int(rng.integers(0, 9))
        coded = rangecoder.encode(intervals(symbols, FLAT))
        accepted = []
        stem = coded.rstrip(b"\0")
        for zeros in range(len(coded) - len(stem) + 7):
            try:
                decoder = rangecoder.Decoder(stem + bytes(zeros))
                decoder.symbols([FLAT] * len(symbols))
                decoder.finish()
            except FormatError:
                continue
            accepted.append(stem + bytes(zeros))
        assert accepted == [coded]


@pytest.mark.parametrize("size", [0, 1, 3, 4, 9])
def test_a_payload_that_ends_early_is_refused_after_as_many_symbols_as_it_has_bytes(size: int) -> None:
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield FLAT

    with pytest.raises(FormatError, match="ends early"):
        rangecoder.Decoder(bytes(size)).symbols(endless())
    assert taken == size + 1
    decoder = rangecoder.Decoder(bytes(size))
    for _ in range(size):
        assert decoder.bits(8) == 0
    with pytest.raises(FormatError, match="ends early"):
        decoder.bits(8)


def test_known_bytes() -> None:
    # Worked by hand from FORMAT.md section 5: unit = 65535; low = 65535 * 32768 = 0x7FFF8000, range = 65535 * 16384 =
    # 0x3FFFC000; the value with most trailing zeros in [0x7FFF8000, 0xBFFF4000) is 0x80000000.
    assert rangecoder.encode([(32768, 16384)]) == b"\x80"


def test_a_position_outside_the_scale_is_a_format_error() -> None:
    with pytest.raises(FormatError, match="left its scale"):
        rangecoder.Decoder(b"\xff\xff\xff\xff").symbols([FLAT])
    with pytest.raises(FormatError, match="left its scale"):
        rangecoder.Decoder(b"\xff\xff\xff\xff").bits(16)
