"""What can still be read of a damaged or truncated file; FORMAT.md section 7 describes the method.

No tile is believed here: whoever can decode compares `bitstream.tile_check`, under the number that the tile has here.
"""

import re
from dataclasses import dataclass

from codec import bitstream
from codec.bitstream import CHECK_BYTES, CRC, KINDS, MODES, TILE, Chunk, Header, Span, Tile
from codec.errors import FormatError

_KNOWN = bytes([*KINDS, *range(TILE, TILE + MODES)])
_KNOWN_KIND = re.compile(b"[" + re.escape(_KNOWN) + b"]")


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


def salvage(data: bytes) -> Salvage:
    """Read what can be read of a damaged or truncated file; of a sound one, all.

    Chunks are followed from the start of the file, as far as they fit (the front). Behind damaged bytes they are found
    from the end: a chain of chunks which ends exactly where the CRC-32 starts (the tail) numbers its tiles backwards.
    Where one tile is missing between the two, its bytes are known, and only its length was damaged.

    Raises:
        FormatError: the header cannot be believed: not a compressed file, another version, or a field out of range.
    """
    try:
        contents = bitstream.unpack(data)
        return Salvage(contents.header, list(contents.tiles), contents.chunks, [])
    except FormatError as exception:
        damage = [str(exception)]
    header, first = bitstream.parse_header(data)
    front, tail = _front(data, first, _tail(data, first, header.n_tiles), header.n_tiles)
    without_tail, _ = _front(data, first, [], header.n_tiles)
    if sum(span.is_tile for span in without_tail) > sum(span.is_tile for span in front + tail):
        front, tail = without_tail, []  # the file is cut off, and its last bytes look like a chunk by chance
    tiles = _tiles(data, front)
    behind = _tiles(data, tail)
    n_missing = header.n_tiles - len(tiles) - len(behind)
    if n_missing == 1 and tail:
        gap = data[front[-1].stop if front else first : tail[0].at]
        tiles.append(_without_length(gap))
    else:
        tiles += [None] * n_missing
    tiles += behind
    chunks: dict[int, Chunk] = {}
    for span in front + tail:
        if not span.is_tile:
            chunks.setdefault(span.kind, Chunk(span.kind, data[span.start : span.stop]))
    lost = [number for number, tile in enumerate(tiles) if tile is None]
    if lost:
        damage.append(f"{len(lost)} of {len(tiles)} tiles not found, the first is number {lost[0]}")
    return Salvage(header, tiles, [chunks[kind] for kind in sorted(chunks)], damage)


def _tail(data: bytes, first: int, n_tiles: int) -> list[Span]:
    """Return the chain of known chunks that ends at the CRC-32 and has most tiles (at most n_tiles); [] if none."""
    end = len(data) - CRC.size
    chain: dict[int, Span] = {}  # start of a chunk that leads to the end -> the chunk
    counts = {end: 0}  # start of a chunk that leads to the end -> number of tiles from there on
    best = end
    for match in reversed(list(_KNOWN_KIND.finditer(data, first, max(first, end)))):
        try:
            length, start = bitstream.read_varint(data, match.start() + 1, "a length")
        except FormatError:
            continue
        span = Span(data[match.start()], match.start(), start, start + length)
        n_behind = counts.get(span.stop)
        if n_behind is None or (n_behind and not span.is_tile) or (span.is_tile and length < CHECK_BYTES):
            continue
        chain[span.at] = span
        counts[span.at] = n_behind + span.is_tile
        if counts[best] <= counts[span.at] <= n_tiles:
            best = span.at
    if best == first and counts[first] < n_tiles:
        return []  # a damaged length leads over some tiles, straight to a later chunk
    spans = []
    while best != end:
        spans.append(chain[best])
        best = spans[-1].stop
    return spans


def _front(data: bytes, first: int, tail: list[Span], n_tiles: int) -> tuple[list[Span], list[Span]]:
    """Follow the chunks from the first on as far as they fit; return them, and the tail that fits behind them."""
    n_front = n_tiles - sum(span.is_tile for span in tail)
    front: list[Span] = []
    n = 0  # tiles in it
    try:
        for span in bitstream.walk(data, first, tail[0].at if tail else len(data)):
            expected = n < n_front if span.is_tile else n == n_tiles
            if not expected or span.kind not in _KNOWN or (span.is_tile and span.stop - span.start < CHECK_BYTES):
                break
            front.append(span)
            n += span.is_tile
    except FormatError:  # where the front ends
        pass
    if not tail or n < n_front or not front or not front[-1].is_tile or front[-1].stop == tail[0].at:
        return front, tail
    # All tiles before the tail, and bytes left over: either the tail's first chunk is a chance find within a damaged
    # tile, or the front's last one has a damaged length.
    if TILE <= data[front[-1].stop] < TILE + MODES and tail[0].is_tile:
        return front, tail[1:]
    return front[:-1], tail


def _tiles(data: bytes, spans: list[Span]) -> list[Tile | None]:
    return [bitstream.parse_tile(span.kind, data[span.start : span.stop]) for span in spans if span.is_tile]


def _without_length(chunk: bytes) -> Tile | None:
    """Return the tile of a chunk whose length is damaged but was as long to write; None where its type is, too."""
    for length_bytes in range(1, 6):
        length = len(chunk) - 1 - length_bytes
        if length >= CHECK_BYTES and len(bitstream.varint(length)) == length_bytes and chunk[0] in _KNOWN[len(KINDS) :]:
            return bitstream.parse_tile(chunk[0], chunk[1 + length_bytes :])
    return None
