"""codec.salvage: what is left of damaged files, and no other error than FormatError."""

import contextlib
import time
import tracemalloc

import numpy as np
import pytest

from codec import bitstream
from codec.bitstream import Chunk, Header, Tile
from codec.errors import FormatError
from codec.salvage import Salvage, salvage
from tests.codec.test_bitstream import mutations, random_tiles, tiled

HEADER = tiled(width=1000, height=700, tile=16)
TILES = random_tiles(HEADER, seed=1, size=900)
CHUNKS = [Chunk(bitstream.INFO, b"\x01"), Chunk(bitstream.ICC, bytes(range(200)))]
DATA = bitstream.pack(HEADER, TILES, CHUNKS)
LOST = "alpha, profile or metadata may be lost"
STARTS = [span.at for span in bitstream.walk(DATA, 27, len(DATA) - 4) if span.is_tile]


def flipped(position: int, mask: int) -> bytes:
    return DATA[:position] + bytes([DATA[position] ^ mask]) + DATA[position + 1 :]


def n_same(found: Salvage) -> int:
    return sum(tile == expected for tile, expected in zip(found.tiles, TILES, strict=True))


def test_sound_file_has_no_damage() -> None:
    assert salvage(DATA) == Salvage(HEADER, list(TILES), CHUNKS, [])


def test_damaged_payload_costs_one_tile() -> None:
    for number in (0, 20, 47):
        found = salvage(flipped(STARTS[number] + 6, 0x10))
        assert n_same(found) == 47
        assert found.tiles[number] != TILES[number]  # there, for the check to refuse
        assert found.chunks == CHUNKS
        assert found.damage == ["damaged: the CRC-32 does not match"]


def test_damaged_type_or_length_costs_one_tile_at_most() -> None:
    recovered = []
    for start in STARTS:
        for offset in range(3):  # type and length, which has two bytes for nearly all
            for bit in range(8):
                found = salvage(flipped(start + offset, 1 << bit))
                recovered.append(n_same(found))
                assert found.chunks == CHUNKS or start == STARTS[-1]
    assert sum(count >= 47 for count in recovered) > 0.98 * len(recovered)  # the rest fit elsewhere by chance
    assert sum(count == 48 for count in recovered) > 0.4 * len(recovered)  # a length alone is found again


@pytest.mark.parametrize("alpha", [b"\x08\x7f", np.random.default_rng(3).bytes(300)], ids=["short", "long"])
@pytest.mark.parametrize("n_others", [1, 2])
@pytest.mark.parametrize("header", [tiled(tile=0), tiled()], ids=["one tile", "many tiles"])
def test_damaged_type_or_length_of_alpha_costs_alpha_alone(header: Header, n_others: int, alpha: bytes) -> None:
    tiles, others = random_tiles(header, seed=2), CHUNKS[-n_others:]
    data = bitstream.pack(header, tiles, [Chunk(bitstream.ALPHA, alpha), *others])
    start = data.index(alpha) - 1 - len(bitstream.varint(len(alpha)))
    for position in range(start, data.index(alpha)):
        for bit in range(8):
            found = salvage(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            assert found.tiles == tiles
            assert [chunk for chunk in found.chunks if chunk.kind != bitstream.ALPHA] == others
            assert LOST in found.damage[-1]


@pytest.mark.parametrize("chunks", [[], CHUNKS, CHUNKS[1:]])
@pytest.mark.parametrize("header", [tiled(tile=0), tiled()], ids=["one tile", "many tiles"])
def test_damaged_length_of_the_last_tile_costs_nothing(header: Header, chunks: list[Chunk]) -> None:
    tiles = [*random_tiles(header)[:-1], Tile(1, 7, np.random.default_rng(5).bytes(300))]
    data = bitstream.pack(header, tiles, chunks)
    start = data.index(tiles[-1].payload) - bitstream.CHECK_BYTES
    for position in (start - 2, start - 1):
        for bit in range(8):
            found = salvage(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            assert (found.tiles, found.chunks) == (tiles, chunks)
            assert len(found.damage) == 1


def test_file_cut_within_or_behind_its_last_chunk_says_so() -> None:
    stop = len(DATA) - bitstream.CRC.size
    for length in range(stop - 200 - 3, len(DATA)):  # from the start of the ICC chunk on
        found = salvage(DATA[:length])
        assert n_same(found) == 48
        assert CHUNKS[0] in found.chunks
        assert LOST in found.damage[-1]
        assert (CHUNKS[1] in found.chunks) == (length >= stop)


def test_burst_costs_the_tiles_that_it_hits() -> None:
    start, stop = STARTS[10] + 40, STARTS[14] + 40
    found = salvage(DATA[:start] + bytes(stop - start) + DATA[stop:])
    assert found.tiles[:10] + found.tiles[15:] == TILES[:10] + TILES[15:]
    assert found.tiles[11:14] == [None] * 3
    assert "tiles not found" in found.damage[-1]
    found = salvage(DATA[:start] + DATA[stop:])  # the same bytes missing
    assert found.tiles[:10] + found.tiles[15:] == TILES[:10] + TILES[15:]


def test_truncated_file_keeps_every_complete_tile() -> None:
    missed = 0
    for length in range(27, len(DATA), 17):
        found = salvage(DATA[:length])
        complete = sum(stop <= length for stop in STARTS[1:])
        missed += n_same(found) < complete
        assert n_same(found) >= complete - 1
        assert found.damage
    assert missed <= 8  # where the last bytes look like a chunk by chance


def test_damaged_header_leaves_the_tiles_to_their_checks() -> None:
    found = salvage(flipped(6, 1))  # stream id
    assert found.header.stream_id != HEADER.stream_id
    indices = np.zeros((4, 16, 16), dtype=np.int32)
    assert bitstream.tile_check(found.header, 0, indices) != bitstream.tile_check(HEADER, 0, indices)
    assert n_same(found) == 48


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (DATA[:20], "truncated"),
        (DATA[:26], "truncated: within the height"),
        (b"\x88" + DATA[1:], "not a latent-codec file"),
        (DATA[:4] + b"\x00" + DATA[5:], "format version 0"),
        (flipped(21, 0x80), "quality 178|quality 135"),
        (flipped(22, 0x80), "downsampling factor"),
    ],
)
def test_header_that_cannot_be_believed(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        salvage(data)


def test_every_flipped_bit_and_truncation_of_a_small_file() -> None:
    header = tiled(width=30, height=20, tile=2)
    data = bitstream.pack(header, random_tiles(header, size=20), CHUNKS[:1])
    for n in range(len(data)):
        with contextlib.suppress(FormatError):
            salvage(data[:n])
        for bit in range(8):
            with contextlib.suppress(FormatError):
                found = salvage(data[:n] + bytes([data[n] ^ 1 << bit]) + data[n + 1 :])
                assert len(found.tiles) == found.header.n_tiles
                assert found.damage


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_mutations_raise_nothing_but_format_errors(count: int) -> None:
    header = tiled(width=100, height=90, tile=4)
    data = bitstream.pack(header, random_tiles(header), CHUNKS)
    n_tiles = 0
    for damaged in mutations(data, count):
        with contextlib.suppress(FormatError):
            found = salvage(damaged)
            assert len(found.tiles) == found.header.n_tiles
            n_tiles += sum(isinstance(tile, Tile) for tile in found.tiles)
    assert n_tiles > count * header.n_tiles / 2


@pytest.mark.parametrize("filling", [b"\x10", b"\x10\x03", b"\x10\x80", b"\x10\x00", b"\x83\x00", b"\x10\x03abc"])
def test_hostile_bytes_take_linear_time(filling: bytes) -> None:
    header = tiled(width=16384, height=16384, tile=8)
    assert header.n_tiles == 65536
    start = bitstream.pack(tiled(), random_tiles(tiled()))[:22] + b"\x33\x80\x80\x01\x80\x80\x01"
    started = time.process_time()
    found = salvage(start + filling * (50_000 // len(filling)))
    assert len(found.tiles) == 65536
    assert time.process_time() - started < 5  # about 0.1 s


@pytest.mark.parametrize("filling", [b"\x10", b"\x83\x00"])
def test_hostile_bytes_take_little_memory(filling: bytes) -> None:
    header = tiled(tile=0)
    data = bitstream.pack(header, random_tiles(header)) + filling * ((1 << 20) // len(filling))
    tracemalloc.start()
    started = time.process_time()
    found = salvage(data)
    time_s = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.tiles) == 1
    assert time_s < 10  # about 1 s, most of it for tracemalloc
    assert peak < 32 << 20
