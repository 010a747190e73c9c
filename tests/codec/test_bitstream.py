"""codec.bitstream: known bytes, round trips, and no other error than FormatError on whatever bytes."""

import contextlib
import struct
import zlib

import numpy as np
import pytest

from codec import bitstream
from codec.bitstream import Chunk, Contents, Header, Tile
from codec.errors import FormatError

IDS = {"stream_id": "0123456789abcdef", "decoder_id": "fedcba9876543210"}
HEADER = Header(**IDS, quality=50, width=300, height=7, f=8)
START = b"\x89LCX\x01" + bytes.fromhex("0123456789abcdeffedcba9876543210")


def tiled(width: int = 300, height: int = 200, tile: int = 8, f: int = 8) -> Header:
    return Header(**IDS, quality=7, width=width, height=height, f=f, tile=tile)


def random_tiles(header: Header, seed: int = 0, size: int = 60) -> list[Tile]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, size, header.n_tiles)
    return [Tile(int(rng.integers(3)), int(rng.integers(1 << 24)), rng.bytes(int(n))) for n in sizes]


def with_crc(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


# --- bytes


def test_known_bytes() -> None:
    tile = Tile(mode=2, check=0x030201, payload=b"payload")
    chunks = [Chunk(bitstream.EXIF, b"exif"), Chunk(bitstream.ALPHA, b"\x08\x7f")]
    body = (
        START + b"\x32\x3f" + b"\xac\x02" + b"\x07" + b"\x12\x0a\x01\x02\x03payload" + b"\x01\x02\x08\x7f\x83\x04exif"
    )
    assert bitstream.pack(HEADER, [tile], chunks) == with_crc(body)
    assert bitstream.unpack(with_crc(body)) == Contents(HEADER, [tile], chunks[::-1])


def test_overhead_of_a_file_without_metadata() -> None:
    header = Header(**IDS, quality=50, width=768, height=512, f=8)
    assert len(bitstream.pack(header, [Tile(2, 1, bytes(5000))])) - 5000 == 37
    header = Header(**IDS, quality=50, width=16384, height=16384, f=16)
    assert len(bitstream.pack(header, [Tile(2, 1, bytes(50000))])) - 50000 == 40


@pytest.mark.parametrize("size", [(1, 1), (127, 128), (65535, 1), (1, 65535), (16384, 16384)])
@pytest.mark.parametrize("geometry", [(1, 1024), (16, 0), (8, 64), (256, 1)])
def test_round_trip_of_sizes_and_geometries(size: tuple[int, int], geometry: tuple[int, int]) -> None:
    header = tiled(*size, tile=geometry[1], f=geometry[0])
    tiles = random_tiles(header, size=3)
    data = bitstream.pack(header, tiles)
    assert bitstream.unpack(data) == Contents(header, tiles, [])
    assert bitstream.read_header(data) == bitstream.read_header(data[:29]) == header


def test_tiles_cover_the_grid_once_in_raster_order() -> None:
    header = tiled(width=300, height=200, tile=8)
    assert header.grid == (25, 38)
    count = np.zeros(header.grid, dtype=int)
    for rows, columns in header.tiles():
        count[rows, columns] += 1
    assert (count == 1).all()
    assert header.tiles()[:2] == [(slice(0, 8), slice(0, 8)), (slice(0, 8), slice(8, 16))]
    assert header.tiles()[-1] == (slice(24, 25), slice(32, 38))
    assert len(header.tiles()) == header.n_tiles == 20
    assert tiled(tile=0).tiles() == [(slice(0, 25), slice(0, 38))]


def test_check_is_the_one_of_the_format_and_depends_on_everything() -> None:
    header = tiled()
    indices = np.arange(-8, 8, dtype=np.int32).reshape(1, 4, 4)
    text = bitstream.pack(header, random_tiles(header))[:27] + struct.pack("<I16i", 3, *range(-8, 8))
    check = bitstream.tile_check(header, 3, indices)
    assert check == zlib.crc32(text) % (1 << 24)
    assert check == bitstream.tile_check(header, 3, np.asfortranarray(indices.astype(">i8")))
    others = [
        bitstream.tile_check(header, 4, indices),
        bitstream.tile_check(header, 3, indices + 1),
        bitstream.tile_check(tiled(width=301), 3, indices),
    ]
    assert check not in others


def test_the_largest_tiles() -> None:
    for header in (tiled(8192, 8192, tile=0), tiled(65535, 16, tile=0, f=1), tiled(16384, 16384, tile=1024, f=1)):
        data = bitstream.pack(header, random_tiles(header, size=3))
        assert bitstream.read_header(data) == header
        assert (
            max((r.stop - r.start) * (c.stop - c.start) for r, c in header.tiles()) <= bitstream.MAX_TILE_AREA == 2**20
        )


# --- what is refused


@pytest.mark.parametrize("size", [(0, 1), (1, 65536), (65535, 65535)])
def test_sizes_that_the_format_cannot_hold(size: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="image size"):
        bitstream.check_size(*size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quality": 101}, "quality 101"),
        ({"f": 12}, "downsampling factor 12"),
        ({"f": 512}, "downsampling factor 512"),
        ({"tile": 3}, "tile side 3"),
        ({"tile": -8}, "tile side -8"),
        ({"tile": 2048}, "tile side 2048, expected 0 or a power of two, at most 1024"),
        ({"width": 8193, "height": 8192}, "one tile of 1025x1024 latents, expected at most 1048576"),
        ({"width": 65535, "height": 17, "f": 1}, "one tile of 65535x17 latents"),
        ({"stream_id": "0123"}, "stream id '0123'"),
        ({"decoder_id": "G" * 16}, "decoder id 'GGG"),
        ({"width": 65535, "height": 4096, "f": 1, "tile": 4}, "16777216|16776192 tiles"),
    ],
)
def test_header_fields_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Header(**{"quality": 1, "width": 9, "height": 9, "f": 8} | IDS | change)


@pytest.mark.parametrize(
    ("tiles", "chunks"),
    [
        ([], []),
        ([Tile(3, 0, b"")], []),
        ([Tile(0, 1 << 24, b"")], []),
        ([Tile(0, 0, b"")], [Chunk(17, b"")]),
        ([Tile(0, 0, b"")], [Chunk(2, b"")]),
        ([Tile(0, 0, b"")], [Chunk(256, b"")]),
        ([Tile(0, 0, b"")], [Chunk(bitstream.ICC, b""), Chunk(bitstream.ICC, b"")]),
    ],
)
def test_pack_refuses_what_unpack_would(tiles: list[Tile], chunks: list[Chunk]) -> None:
    with pytest.raises(ValueError, match=r"tile|chunk"):
        bitstream.pack(HEADER, tiles, chunks)


TILE = b"\x10\x03abc"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "^empty file"),
        (b"GIF89a" + bytes(40), "^not a latent-codec file"),
        (b"\x89LCX", "^truncated"),
        (b"\x89LCX\x00" + bytes(30), r"^format version 0 \(a trial version"),
        (b"\x89LCX\x02" + bytes(30), r"^format version 2 \(a newer program"),
        (START[:20], "^truncated: 20 bytes"),
        (with_crc(START + b"\x32\x3f\x09\x09" + TILE)[:-1], "^truncated|^damaged"),
        (with_crc(START + b"\x32\x3f\x09\x09" + TILE)[:-5], "^truncated"),
        (START + b"\x32\x3f\x09\x09" + TILE + bytes(4), "^damaged: the CRC-32"),
        (with_crc(START + b"\x65\x3f\x01\x01" + TILE), "quality 101"),
        (with_crc(START + b"\x32\x9f\x01\x01" + TILE), "downsampling factor 512"),
        *((with_crc(START + bytes([0x32, 0x30 + log2, 9, 9]) + TILE), "tile side") for log2 in range(11, 15)),
        (with_crc(START + b"\x32\x3f\x80\x80\x01\x80\x80\x01\x12\x03abc"), "one tile of 2048x2048 latents"),
        (with_crc(START + b"\x32\x3f\x00\x01" + TILE), "image size 0x1"),
        (with_crc(START + b"\x32\x00\xff\xff\x03\xff\x1f" + TILE), "tiles of 1 latents"),
        (with_crc(START + b"\x32\x3f\xff\xff\xff\xff\xff\xff"), "the width is no number"),
        (with_crc(START + b"\x32\x3f\x89\x00\x09" + TILE), "the width is no number in its shortest form"),
        (with_crc(START + b"\x32\x3f\x81\x80"), "truncated: within the height|within the width"),
        (with_crc(START + b"\x32\x3f\x09\x09"), "0 tiles, expected 1"),
        (with_crc(START + b"\x32\x3f\x09\x09" + TILE + TILE), "tile 1 where none belongs"),
        (with_crc(START + b"\x32\x3f\x09\x09" + b"\x83\x00" + TILE), "tile 0 where none belongs"),
        (with_crc(START + b"\x32\x3f\x09\x09" + b"\x10\x02ab"), "a tile of 2 bytes"),
        (with_crc(START + b"\x32\x3f\x09\x09" + b"\x13\x03abc"), "entropy mode 3"),
        (with_crc(START + b"\x32\x3f\x09\x09" + TILE + b"\x02\x00"), "chunk of type 2"),
        (with_crc(START + b"\x32\x3f\x09\x09" + TILE + b"\x83\x00\x83\x00"), "two chunks of type 131"),
        (with_crc(START + b"\x32\x3f\x09\x09" + TILE + b"\x83\x05"), "needs 5 bytes more"),
    ],
)
def test_each_kind_of_wrong_file_has_its_own_message(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        bitstream.unpack(data)


def test_unknown_ancillary_chunks_are_passed_on() -> None:
    data = with_crc(START + b"\x32\x3f\x09\x09" + TILE + b"\xff\x02hi")
    assert bitstream.unpack(data).chunks == [Chunk(255, b"hi")]


# --- damage


def test_every_flipped_bit_and_every_truncation_is_a_format_error() -> None:
    header = tiled(width=30, height=20, tile=2)
    data = bitstream.pack(header, random_tiles(header, size=20), [Chunk(bitstream.INFO, b"\x01")])
    for n in range(len(data)):
        with pytest.raises(FormatError):
            bitstream.unpack(data[:n])
        for bit in range(8):
            damaged = data[:n] + bytes([data[n] ^ 1 << bit]) + data[n + 1 :]
            with pytest.raises(FormatError):
                bitstream.unpack(damaged)
            with contextlib.suppress(FormatError):
                bitstream.read_header(damaged)


def mutations(data: bytes, count: int) -> list[bytes]:
    """Changed, cut, doubled and overwritten copies of a file, half of them with a CRC-32 that matches."""
    rng = np.random.default_rng(5)
    results = []
    for number in range(count):
        damaged = bytearray(data[:-4])
        for _ in range(int(rng.integers(1, 4))):
            start, length = int(rng.integers(5, len(data))), int(rng.integers(1, 12))
            kind = int(rng.integers(4))
            if kind == 0:
                damaged[start : start + 1] = rng.bytes(1)
            elif kind == 1:
                del damaged[start : start + length]
            elif kind == 2:
                damaged[start:start] = damaged[start : start + length]
            else:
                damaged[start : start + length] = rng.bytes(length)
        results.append(with_crc(bytes(damaged)) if number % 2 else bytes(damaged) + data[-4:])
    return results


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_mutations_raise_nothing_but_format_errors(count: int) -> None:
    header = tiled(width=100, height=90, tile=4)
    data = bitstream.pack(header, random_tiles(header), [Chunk(bitstream.ICC, bytes(30)), Chunk(bitstream.INFO, b"\1")])
    n_read = 0
    for damaged in mutations(data, count):
        with contextlib.suppress(FormatError):
            contents = bitstream.unpack(damaged)
            assert len(contents.tiles) == contents.header.n_tiles
            n_read += 1
    assert 0 < n_read < count / 2  # some changes with a new CRC-32 are files as good as any
