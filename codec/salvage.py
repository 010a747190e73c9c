"""What can still be read of a damaged or truncated file; FORMAT.md section 7 describes the method.

No tile is believed here: whoever can decode compares `bitstream.tile_check`, under the number that the tile has here.
"""

import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from codec import bitstream
from codec.bitstream import CHECK_BYTES, CRC, KINDS, LATENT_MODES, TILE, Chunk, Header, Span, Tile
from codec.errors import FormatError

_ONE_TILE = 1 << len(KINDS)
_MOST = np.array([1 if kind == bitstream.INFO else 1 << 35 for kind in range(256)])
_BLOCK = 1 << 16  # bytes searched at once


@dataclass(frozen=True)
class _Known:
    """What chunks are looked for.

    Attributes:
        tiles: the types of tiles.
        adds: (256,) what a chunk of a type adds to the state of a chain: the number of its tiles, and in the lowest
            bits which others it has; 0 = unknown.
        least: (256,) how long its body is at least.
    """

    tiles: frozenset[int]
    adds: np.ndarray
    least: np.ndarray


@lru_cache(maxsize=4)
def _known(modes: frozenset[int]) -> _Known:
    tiles = frozenset(TILE + mode for mode in modes)
    adds = np.array([_ONE_TILE if kind in tiles else 0 for kind in range(256)])
    adds[list(KINDS)] = 1 << np.arange(len(KINDS))
    others = {bitstream.INFO: 1, bitstream.ALPHA: 2}
    least = np.array([CHECK_BYTES if kind in tiles else others.get(kind, 0) for kind in range(256)])
    return _Known(tiles, adds, least)


@dataclass(frozen=True)
class Salvage:
    """What could be read of a damaged file.

    Attributes:
        header: as it stands in the file; if it is damaged, no tile's check will agree.
        tiles: one for each of `header.tiles()`, None where lost. Candidates: only a tile whose check agrees is sound.
        chunks: candidates too; deflated bodies carry a check of their own, see `pictures.from_chunks`.
        damage: what is wrong, one line each; empty for a sound file.
    """

    header: Header
    tiles: list[Tile | None]
    chunks: list[Chunk]
    damage: list[str]


def salvage(data: bytes, modes: frozenset[int] = LATENT_MODES) -> Salvage:
    """Read what can be read of a damaged or truncated file; of a sound one, all.

    Chunks are followed from the start of the file, as far as they fit (the front). Behind damaged bytes they are found
    from the end: a chain of chunks which ends exactly where the CRC-32 starts (the tail) numbers its tiles backwards.
    Where one tile is missing between the two, its bytes are known, and only its length was damaged.

    Args:
        data: the file.
        modes: entropy modes that its stream has; tiles of others are none.

    Raises:
        FormatError: the header cannot be believed: not a compressed file, another version, or a field out of range.
    """
    try:
        contents = bitstream.unpack(data)
        return Salvage(contents.header, list(contents.tiles), contents.chunks, [])
    except FormatError as exception:
        damage = [str(exception)]
    header, first = bitstream.parse_header(data)
    known = _known(modes)
    front, tail = _front_and_tail(data, first, header.n_tiles, known)
    tiles = _tiles(data, front)
    behind = _tiles(data, tail)
    n_missing = header.n_tiles - len(tiles) - len(behind)
    gap = front[-1].stop if front else first, tail[0].at if tail else len(data) - CRC.size
    if n_missing == 1 and tail:
        span = _without_length(data, *gap, known)
        tiles += [None] if span is None else _tiles(data, [span])
    else:
        tiles += [None] * n_missing
    tiles += behind
    chunks: dict[int, Chunk] = {}
    for span in front + tail[::-1]:  # the nearer to either end, the less can it be a chance find
        if not span.is_tile:
            chunks.setdefault(span.kind, Chunk(span.kind, data[span.start : span.stop]))
    lost = [number for number, tile in enumerate(tiles) if tile is None]
    if lost:
        damage.append(f"{len(lost)} of {len(tiles)} tiles not found, the first is number {lost[0]}")
    damage += _left_over(data, gap, only_tiles=bool(behind))
    return Salvage(header, tiles, [chunks[kind] for kind in sorted(chunks)], damage)


def _front_and_tail(data: bytes, first: int, n_tiles: int, known: _Known) -> tuple[list[Span], list[Span]]:
    """Return the chunks found from the start of the file, and those found from its end."""
    tail = _tail(data, first, n_tiles, known)
    alone, _ = _front(data, first, [], n_tiles, known)
    tiles = [span for span in alone if span.is_tile]
    others = [span for span in tail if not span.is_tile]
    if len(tiles) >= n_tiles - 1:
        at = tiles[-1].at if len(tiles) == n_tiles else tiles[-1].stop if tiles else first
        for stop in [*(span.at for span in others), len(data) - CRC.size]:
            last = _without_length(data, at, stop, known)
            if last is not None and _is_repair(data, last):
                return [*tiles[: n_tiles - 1], last], [span for span in others if span.at >= stop]
    if len(tiles) == n_tiles:  # what else there is lies behind them, even if it looks like a tile
        tail = [span for span in others if span.at >= tiles[-1].stop]
        return [span for span in alone if not tail or span.stop <= tail[0].at], tail
    front, tail = _front(data, first, tail, n_tiles, known)
    if len(tiles) > sum(span.is_tile for span in front + tail):
        return alone, []  # the file is cut off, and its last bytes look like a chunk by chance
    return front, tail


def _tail(data: bytes, first: int, n_tiles: int, known: _Known) -> list[Span]:
    """Return the chain of known chunks that ends at the CRC-32 and has most tiles (at most n_tiles); [] if none."""
    end = len(data) - CRC.size
    if end <= first:
        return []
    chains = array("i", [-1]) * (end + 1 - first)  # by where it starts: the state of a chain to the end; -1 = none
    chains[-1] = 0
    best, most = end, 0
    full = (n_tiles + 1) * _ONE_TILE
    for at, stop, adds in _candidates(data, first, end, known):
        behind = chains[stop - first]
        if behind < 0 or behind + adds >= full or (adds < _ONE_TILE and (behind >= _ONE_TILE or behind & adds)):
            continue
        chains[at - first] = behind + adds
        if behind + adds >= most:
            best, most = at, (behind + adds) // _ONE_TILE * _ONE_TILE
    if best == first and most < n_tiles * _ONE_TILE:
        return []  # a damaged length leads over some tiles, straight to a later chunk
    return list(bitstream.walk(data, best, end))


def _candidates(data: bytes, first: int, end: int, known: _Known) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, what it adds) of all that could be known chunks within data[first:end], last one first."""
    values = np.frombuffer(data, np.uint8)
    for block_end in range(end, first, -_BLOCK):
        block = max(first, block_end - _BLOCK)
        starts = np.flatnonzero(known.adds[values[block:block_end]])[::-1] + block
        stops = np.full(len(starts), end + 1)
        rows = np.arange(len(starts))  # those whose length goes on
        lengths = np.zeros(len(starts), np.int64)
        for n_bytes in range(1, 6):
            byte = values[np.minimum(starts[rows] + n_bytes, len(values) - 1)].astype(np.int64)
            lengths[rows] |= (byte & 0x7F) << 7 * (n_bytes - 1)
            done = rows[(byte < 0x80) & ((byte > 0) | (n_bytes == 1))]
            stops[done] = starts[done] + 1 + n_bytes + lengths[done]
            rows = rows[byte >= 0x80]
        kinds = values[starts]
        fits = (stops <= end) & (known.least[kinds] <= lengths) & (lengths <= _MOST[kinds])
        yield from zip(starts[fits].tolist(), stops[fits].tolist(), known.adds[kinds[fits]].tolist(), strict=True)


def _front(data: bytes, first: int, tail: list[Span], n_tiles: int, known: _Known) -> tuple[list[Span], list[Span]]:
    """Follow the chunks from the first on as far as they fit; return them, and the tail that fits behind them."""
    n_front = n_tiles - sum(span.is_tile for span in tail)
    front: list[Span] = []
    n = 0  # tiles in it
    others: set[int] = set()
    try:
        for span in bitstream.walk(data, first, tail[0].at if tail else len(data)):
            if not known.least[span.kind] <= span.stop - span.start <= _MOST[span.kind]:
                break
            if span.kind in known.tiles and n < n_front:
                n += 1
            elif span.kind in KINDS and n == n_tiles and span.kind not in others:
                others.add(span.kind)
            else:
                break
            front.append(span)
    except FormatError:  # where the front ends
        pass
    if not tail or n < n_front or not front or front[-1].stop == tail[0].at:
        return front, tail
    # All tiles before the tail, and bytes left over: either the tail's first chunk is a chance find within a damaged
    # tile, or the front's last one has a damaged length.
    if data[front[-1].stop] in known.tiles:
        return front, tail[1:]
    return front[:-1], tail


def _tiles(data: bytes, spans: list[Span]) -> list[Tile | None]:
    return [bitstream.parse_tile(span.kind, data[span.start : span.stop]) for span in spans if span.is_tile]


def _without_length(data: bytes, at: int, stop: int, known: _Known) -> Span | None:
    """Return the tile that fills data[at:stop] if its length is damaged but was as long to write; None if it cannot."""
    for start in range(at + 2, at + 7):
        length = stop - start
        if length >= CHECK_BYTES and len(bitstream.varint(length)) == start - at - 1 and data[at] in known.tiles:
            return Span(data[at], at, start, stop)
    return None


def _is_repair(data: bytes, span: Span) -> bool:
    """Whether the CRC-32 matches once the chunk's length is what the span says."""
    view, end = memoryview(data), len(data) - CRC.size
    repaired = zlib.crc32(bitstream.varint(span.stop - span.start), zlib.crc32(view[: span.at + 1]))
    return bool(zlib.crc32(view[span.start : end], repaired) == CRC.unpack_from(data, end)[0])


def _left_over(data: bytes, gap: tuple[int, int], only_tiles: bool) -> list[str]:
    """Return a line if other chunks than tiles may be lost.

    Args:
        data: the file.
        gap: start and stop of the bytes that belong to no chunk; a start after the stop: there is no CRC-32.
        only_tiles: whether tiles follow behind the gap, so that nothing else was in it.
    """
    start, stop = gap
    if start < stop and not only_tiles:
        return [f"bytes {start}..{stop - 1} belong to no chunk: alpha, profile or metadata may be lost"]
    # Four bytes that look like the start of a chunk may be one, and the file be cut off within it.
    if start > stop or data[len(data) - CRC.size] in KINDS:
        return ["no CRC-32 behind the last chunk: alpha, profile or metadata may be lost"]
    return []
