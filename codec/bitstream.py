"""The container of a compressed file, format version 1. FORMAT.md section 2 is the law; this module follows it.

    header | tile chunks in raster order | other chunks | CRC-32

Reads and writes headers and chunks without a model, so `codec info` needs neither torch nor diffusers. What the
chunks hold is `tables.py` (tiles) and `pictures.py` (alpha, gray, ICC, EXIF, XMP); damaged files are for `salvage.py`.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from codec.errors import FormatError

MAGIC = b"\x89LCX"
VERSION = 1
SUFFIX = ".lcx"
DEFAULT_QUALITY = 50
MAX_SIDE = 65535  # pixels
MAX_PIXELS = 1 << 28
MAX_TILES = 1 << 16
MAX_F = 256
MAX_TILE = 1 << 10  # latents a side
MAX_TILE_AREA = MAX_TILE**2  # positions, of a single tile too: what reading a tile needs grows with it

TILE = 16  # a tile chunk's type is TILE + its entropy mode
LATENT_MODES = frozenset(range(3))  # entropy modes of integer latents: raw, static, context
CODE_MODES = frozenset(range(4, 8))  # of codebook indices: fixed, static, adaptive, context
MAPS = 8  # of several maps of codebook indices, each with a mode of its own
MODES = LATENT_MODES | CODE_MODES | {MAPS}
ALPHA = 1
INFO = 129
ICC = 130
EXIF = 131
XMP = 132
ANCILLARY = 128  # bit of a chunk's type: a reader that does not know the type passes over the chunk
KINDS = {ALPHA: "ALPHA", INFO: "INFO", ICC: "ICC", EXIF: "EXIF", XMP: "XMP"}
"""The types of chunks that are no tiles, and their names."""

TILE_KINDS = range(TILE, TILE + 16)
CHECK_BYTES = 3  # of a tile, before its payload
CRC = struct.Struct("<I")

_ONE_TILE = 15  # in the geometry byte, instead of log2 of the tile's side
_FIXED = struct.Struct("<4sB8s8sBB")  # magic, version, stream id, decoder id, quality, geometry
_HEADER_BYTES = _FIXED.size + 10  # no header is longer


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says about itself; raises FormatError where a field is out of range.

    Attributes:
        stream_id: 16 hex digits; which mean, step and tables its latents were coded with. Must be known to decode.
        decoder_id: 16 hex digits; which decoder the encoder's model had.
        quality: 0 (coarsest) .. 100 (finest); 0 in files of codebook indices, whose quality is the model's.
        width: pixels, 1..65535.
        height: pixels, 1..65535.
        f: downsampling factor, a power of two, 1..256.
        tile: side of a tile in latents, a power of two, 1..1024; 0 = the whole image, of at most
            2^20 latents a channel, is one tile.
    """

    stream_id: str
    decoder_id: str
    quality: int
    width: int
    height: int
    f: int
    tile: int = 0

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        if not 0 <= self.quality <= 100:
            raise FormatError(f"quality {self.quality}, expected 0..100")
        if not _is_power(self.f, MAX_F):
            raise FormatError(f"downsampling factor {self.f}, expected a power of two, at most {MAX_F}")
        if self.tile and not _is_power(self.tile, MAX_TILE):
            raise FormatError(f"tile side {self.tile}, expected 0 or a power of two, at most {MAX_TILE}")
        for name, value in (("stream id", self.stream_id), ("decoder id", self.decoder_id)):
            if not re.fullmatch("[0-9a-f]{16}", value):
                raise FormatError(f"{name} {value!r}, expected 16 hex digits")
        if not self.tile and self.grid[0] * self.grid[1] > MAX_TILE_AREA:
            raise FormatError(
                f"one tile of {self.grid[1]}x{self.grid[0]} latents, expected at most {MAX_TILE_AREA} in a tile"
            )
        if self.n_tiles > MAX_TILES:
            raise FormatError(f"{self.n_tiles} tiles of {self.tile} latents a side, expected at most {MAX_TILES}")

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the latent grid: H / f and W / f, rounded up."""
        return -(-self.height // self.f), -(-self.width // self.f)

    @property
    def n_tiles(self) -> int:
        """Number of tiles, 1..MAX_TILES."""
        if not self.tile:
            return 1
        h, w = self.grid
        return -(-h // self.tile) * -(-w // self.tile)

    def tiles(self) -> list[tuple[slice, slice]]:
        """Return where each tile lies, (rows, columns) in latents, in raster order; those at the end may be smaller."""
        h, w = self.grid
        side = self.tile or max(h, w)
        return [
            (slice(top, min(top + side, h)), slice(left, min(left + side, w)))
            for top in range(0, h, side)
            for left in range(0, w, side)
        ]


@dataclass(frozen=True)
class Tile:
    """The coded latents of one tile: entropy mode, one of MODES, `tile_check` of the latents, and the coder's bytes."""

    mode: int
    check: int
    payload: bytes


@dataclass(frozen=True)
class Chunk:
    """A chunk that is no tile: its type (one of KINDS, or unknown with the ancillary bit) and its body."""

    kind: int
    body: bytes


class Span(NamedTuple):
    """Where a chunk lies in a file: its type, where it starts, and the start and stop of its body."""

    kind: int
    at: int
    start: int
    stop: int

    @property
    def is_tile(self) -> bool:
        """Whether it is a tile, of a known entropy mode or not."""
        return self.kind in TILE_KINDS


@dataclass(frozen=True)
class Contents:
    """A whole file taken apart: one tile for each of `header.tiles()`; no two chunks have the same type."""

    header: Header
    tiles: list[Tile]
    chunks: list[Chunk]


def check_size(width: int, height: int) -> None:
    """Raise FormatError unless the format can hold an image of width x height pixels."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise FormatError(f"image size {width}x{height}, expected 1..{MAX_SIDE} a side and at most {MAX_PIXELS} pixels")


def tile_check(header: Header, number: int, indices: npt.NDArray[np.int32]) -> int:
    """Return the 24-bit check of a tile, which finds wrong tables, a damaged header and swapped tiles as well.

    Args:
        header: of the file.
        number: of the tile, counted from 0 in the order of `header.tiles()`.
        indices: (D, rows, columns) integer latents of the tile, or (C, rows, columns) codebook indices.
    """
    start = zlib.crc32(struct.pack("<I", number), zlib.crc32(_pack_header(header)))
    return zlib.crc32(np.ascontiguousarray(indices, dtype="<i4").tobytes(), start) & 0xFFFFFF


def pack(header: Header, tiles: Sequence[Tile], chunks: Sequence[Chunk] = ()) -> bytes:
    """Return the bytes of a whole file.

    Args:
        header: what the file says about itself.
        tiles: one for each of `header.tiles()`, in that order.
        chunks: all others; written in the order of their types.

    Raises:
        ValueError: the number of tiles is not the header's, or a mode, check or type of chunk is out of range.
    """
    if len(tiles) != header.n_tiles:
        raise ValueError(f"{len(tiles)} tiles, the header has {header.n_tiles}")
    kinds = sorted(chunk.kind for chunk in chunks)
    if any(kind not in KINDS and not ANCILLARY <= kind <= 255 for kind in kinds) or len(set(kinds)) < len(kinds):
        raise ValueError(f"chunk types {kinds}, expected known or ancillary ones, each once")
    parts = [_pack_header(header)]
    for tile in tiles:
        if tile.mode not in MODES or not 0 <= tile.check < 1 << 24:
            raise ValueError(f"tile of mode {tile.mode} and check {tile.check}, expected {sorted(MODES)} and 24 bits")
        parts.append(_pack_chunk(TILE + tile.mode, tile.check.to_bytes(CHECK_BYTES, "little") + tile.payload))
    parts += [_pack_chunk(chunk.kind, chunk.body) for chunk in sorted(chunks, key=lambda chunk: chunk.kind)]
    body = b"".join(parts)
    return body + CRC.pack(zlib.crc32(body))


def unpack(data: bytes) -> Contents:
    """Take the bytes of a whole file apart.

    Raises:
        FormatError: not a compressed file, another version, truncated, damaged (CRC-32), or a field out of range.
    """
    _check_start(data)
    end = len(data) - CRC.size
    if end < _FIXED.size + 2:
        raise FormatError(f"truncated: {len(data)} bytes")
    if CRC.unpack_from(data, end)[0] != zlib.crc32(memoryview(data)[:end]):
        raise FormatError(_what_is_wrong(data, end))
    header, position = parse_header(data[: min(end, _HEADER_BYTES)])
    tiles: list[Tile] = []
    chunks: list[Chunk] = []
    for span in walk(data, position, end):
        body = data[span.start : span.stop]
        if span.is_tile:
            if chunks or len(tiles) == header.n_tiles:
                raise FormatError(f"damaged: tile {len(tiles)} where none belongs")
            tiles.append(parse_tile(span.kind, body))
        elif any(span.kind == chunk.kind for chunk in chunks):
            raise FormatError(f"damaged: two chunks of type {span.kind}")
        elif span.kind not in KINDS and not span.kind & ANCILLARY:
            raise FormatError(f"chunk of type {span.kind}, which this program does not know: a newer one is needed")
        else:
            chunks.append(Chunk(span.kind, body))
    if len(tiles) < header.n_tiles:
        raise FormatError(f"damaged: {len(tiles)} tiles, expected {header.n_tiles}")
    return Contents(header, tiles, chunks)


def read_header(data: bytes) -> Header:
    """Read the header alone, from the start of a file; nothing after it is looked at, the CRC-32 neither.

    Raises:
        FormatError: not a compressed file, another version, truncated within the header, or a field out of range.
    """
    return parse_header(data)[0]


def inflate(body: bytes, limit: int, name: str) -> bytes:
    """Undo zlib.compress, without ever holding more than `limit` bytes of the result.

    Raises:
        FormatError: damaged, or more than `limit` bytes; the message calls it `name`.
    """
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(body, limit + 1)
    except zlib.error as exception:
        raise FormatError(f"damaged {name}: {exception}") from exception
    if len(data) > limit:
        raise FormatError(f"damaged {name}: more than {limit} bytes")
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError(f"damaged {name}: truncated, or bytes left over")
    return data


def _is_power(value: int, maximum: int) -> bool:
    return 1 <= value <= maximum and value & (value - 1) == 0


def _check_start(data: bytes) -> None:
    """Raise FormatError for what is no compressed file, or one of another version."""
    if data[:4] != MAGIC:
        raise FormatError("not a latent-codec file" if data else "empty file")
    if len(data) < 5:
        raise FormatError(f"truncated: {len(data)} bytes")
    if data[4] != VERSION:
        made = "a trial version of the program" if data[4] < VERSION else "a newer program, or damaged"
        raise FormatError(f"format version {data[4]} ({made}), this program reads version {VERSION}")


def _pack_header(header: Header) -> bytes:
    tile = header.tile.bit_length() - 1 if header.tile else _ONE_TILE
    return (
        _FIXED.pack(
            MAGIC,
            VERSION,
            bytes.fromhex(header.stream_id),
            bytes.fromhex(header.decoder_id),
            header.quality,
            (header.f.bit_length() - 1) << 4 | tile,
        )
        + varint(header.width)
        + varint(header.height)
    )


def parse_header(data: bytes) -> tuple[Header, int]:
    """Return the header and where the first chunk starts; see `read_header`."""
    _check_start(data)
    if len(data) < _FIXED.size + 2:
        raise FormatError(f"truncated: {len(data)} bytes")
    _, _, stream_id, decoder_id, quality, geometry = _FIXED.unpack_from(data)
    width, position = read_varint(data, _FIXED.size, "the width")
    height, position = read_varint(data, position, "the height")
    tile = geometry & 15
    header = Header(
        stream_id=stream_id.hex(),
        decoder_id=decoder_id.hex(),
        quality=quality,
        width=width,
        height=height,
        f=1 << (geometry >> 4),
        tile=0 if tile == _ONE_TILE else 1 << tile,
    )
    return header, position


def _pack_chunk(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + varint(len(body)) + body


def walk(data: bytes, position: int, end: int) -> Iterator[Span]:
    """Yield the chunks that fill data[position:end], in order; FormatError at the first that does not fit."""
    while position < end:
        length, start = read_varint(data, position + 1, f"the length of the chunk at byte {position}")
        if start + length > end:
            raise FormatError(f"truncated: the chunk at byte {position} needs {start + length - end} bytes more")
        yield Span(data[position], position, start, start + length)
        position = start + length


def parse_tile(kind: int, body: bytes) -> Tile:
    """Return the tile of a chunk whose type is in TILE_KINDS; FormatError: an unknown mode, or too short."""
    if kind - TILE not in MODES:
        raise FormatError(f"entropy mode {kind - TILE}, which this program does not know: a newer one is needed")
    if len(body) < CHECK_BYTES:
        raise FormatError(f"damaged: a tile of {len(body)} bytes, expected at least {CHECK_BYTES}")
    return Tile(kind - TILE, int.from_bytes(body[:CHECK_BYTES], "little"), body[CHECK_BYTES:])


def _what_is_wrong(data: bytes, end: int) -> str:
    """Tell a file that stops too early from one with changed bytes; its CRC-32 does not match."""
    try:
        header, position = parse_header(data)
        n_tiles = sum(span.is_tile for span in walk(data, position, end))
        if n_tiles < header.n_tiles:
            return f"truncated: {n_tiles} of {header.n_tiles} tiles"
    except FormatError as exception:
        if str(exception).startswith("truncated"):
            return f"{exception} (or its length is damaged)"
    return "damaged: the CRC-32 does not match"


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, least significant first, the high bit says that more follow."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, position: int, what: str) -> tuple[int, int]:
    """Return a number and the position after it; FormatError: cut off, over five bytes, or not its shortest form."""
    value = 0
    for shift in range(0, 35, 7):
        if position >= len(data):
            raise FormatError(f"truncated: within {what}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if shift and not byte:
                break
            return value, position
    raise FormatError(f"damaged: {what} is no number in its shortest form")
