"""Raw latents to the bytes of a file and back, one tile after another. No network and no torch: integers and tables.

    z -> indices -> tiles -> mode and payload of each -> container           code, code_within
    file -> tiles -> indices, every sum checked -> z_q                       read, rescue, dequantise

FORMAT.md is the law. Processes that share the work of a folder each hold a `Coder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from codec import bitstream, effort, salvage, tables
from codec.bitstream import Chunk, Contents, Header, Tile
from codec.errors import FormatError, ModelError
from codec.model_folder import ModelFolder
from codec.regions import lost_pixels
from codec.tables import Mode, TableSet

DEFAULT_EFFORT = 1  # a third of the coder's time again, for up to a sixth of the bytes
TILE = 64  # latents a side; tiles are coded apart, so damage stays in one and a region needs few (costs under 0.1 %)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How latents become a file.

    Attributes:
        quality: 0 (coarsest) .. 100 (finest).
        effort: 0 (rounding only) .. 9, how hard the encoder searches for cheaper integers, at qualities where that
            serves the model (`ModelFolder.search_below`).
        tile: side of a tile in latents, a power of two; 0 = one tile.
        modes: entropy coding modes to try; the smallest payload is kept, tile by tile.
    """

    quality: int = bitstream.DEFAULT_QUALITY
    effort: int = DEFAULT_EFFORT
    tile: int = TILE
    modes: tuple[Mode, ...] = tuple(Mode)

    def __post_init__(self) -> None:
        if self.quality not in range(101):
            raise ValueError(f"quality {self.quality}, expected 0..100")
        if self.effort not in range(10):
            raise ValueError(f"effort {self.effort}, expected 0..9")
        if self.tile and self.tile not in (2**k for k in range(11)):
            raise ValueError(f"tile {self.tile}, expected 0 or a power of two, at most 1024")
        if not self.modes or not all(isinstance(mode, Mode) for mode in self.modes):
            raise ValueError(f"modes {self.modes}, expected some of {[*Mode]}")


@dataclass(frozen=True)
class Coded:
    """A finished file.

    Attributes:
        data: its bytes.
        quality: the quality that it was coded at.
    """

    data: bytes
    quality: int


@dataclass(frozen=True)
class Rescued:
    """What could be read of a damaged file.

    Attributes:
        header: what the file says about itself.
        z: (D, h, w) float32 raw latents; lost ones are the channel means.
        lost: rows and columns of latents of each lost tile.
        chunks: what else was whole.
        damage: a sentence for each thing that is wrong.
    """

    header: Header
    z: np.ndarray
    lost: tuple[tuple[slice, slice], ...]
    chunks: tuple[Chunk, ...]
    damage: tuple[str, ...]

    @property
    def losses(self) -> list[str]:
        """Where the image is lost, in pixels, a line for each tile."""
        return [f"lost: {lost_pixels(self.header, place)}" for place in self.lost]


class Coder:
    """The tables of one model, and what its new files are to say."""

    def __init__(self, folder: ModelFolder, decoder_id: str) -> None:
        """Use a model folder's newest tables.

        Args:
            folder: its torch-free part.
            decoder_id: of the decoder that belongs to the latents to come, 16 hex digits.
        """
        self.folder = folder
        self._decoder_id = decoder_id

    def code(self, z: np.ndarray, width: int, height: int, settings: Settings, chunks: Sequence[Chunk] = ()) -> Coded:
        """Code the latents of one image.

        Args:
            z: (D, h, w) float32 raw latents, h = ceil(height / f), w = ceil(width / f).
            width: pixels of the image.
            height: pixels.
            settings: quality and the rest.
            chunks: what else belongs into the file.

        Raises:
            FormatError: larger than the format can hold.
            ValueError: the latents are not finite.
        """
        folder = self.folder
        header = Header(
            stream_id=folder.stream_id,
            decoder_id=self._decoder_id,
            quality=settings.quality,
            width=width,
            height=height,
            f=folder.f,
            tile=settings.tile if max(z.shape[1:]) > settings.tile else 0,
        )
        if z.shape != (folder.channels, *header.grid):
            raise ValueError(
                f"latents {z.shape}, expected {(folder.channels, *header.grid)} for {width} x {height} pixels"
            )
        table_set = folder.table_sets[folder.stream_id]
        level = settings.effort if settings.quality < folder.search_below else 0
        tiles = []
        for number, (rows, columns) in enumerate(header.tiles()):
            indices = effort.search(z[:, rows, columns], folder.mean, folder.step, table_set, settings.quality, level)
            mode, payload = table_set.encode(indices, settings.quality, settings.modes)
            tiles.append(Tile(int(mode), bitstream.tile_check(header, number, indices), payload))
        return Coded(bitstream.pack(header, tiles, chunks), settings.quality)

    def code_within(
        self,
        z: np.ndarray,
        width: int,
        height: int,
        settings: Settings,
        limit_bytes: int,
        chunks: Sequence[Chunk] = (),
    ) -> Coded:
        """Code at the highest quality whose whole file has at most `limit_bytes` bytes; see `code`.

        Only the coder repeats (bisection over q). Where even q = 0 is larger, that file is returned.
        """

        def at(quality: int) -> Coded:
            return self.code(z, width, height, replace(settings, quality=quality), chunks)

        best = at(0)
        low, high = 0, tables.QUALITIES  # low fits, or is all there is; high does not
        while len(best.data) <= limit_bytes and high - low > 1:
            middle = (low + high) // 2
            found = at(middle)
            if len(found.data) <= limit_bytes:
                low, best = middle, found
            else:
                high = middle
        return best

    def table_set(self, header: Header) -> TableSet:
        """Return the tables of a file.

        Raises:
            ModelError: this model does not know the file's stream.
            FormatError: the file says another downsampling factor than its stream's model has.
        """
        folder = self.folder
        found = folder.table_sets.get(header.stream_id)
        if found is None:
            raise ModelError(
                f"made with another model: it needs stream {header.stream_id}, {folder.name} has {folder.stream_id}"
            )
        if header.f != folder.f:
            raise FormatError(f"damaged: it says f {header.f}, its model has f {folder.f}")
        return found

    def read(self, contents: Contents, region: tuple[slice, slice] | None = None) -> np.ndarray:
        """Read the integer latents of a file and check the sum of every tile.

        Args:
            contents: of `bitstream.unpack`.
            region: rows and columns of latents that are wanted; tiles outside stay 0 and are not read.

        Returns:
            (D, h, w) int32.

        Raises:
            ModelError: this model does not know the file's stream.
            FormatError: a tile is damaged.
        """
        header, table_set = contents.header, self.table_set(contents.header)
        indices = np.zeros((self.folder.channels, *header.grid), np.int32)
        places = header.tiles()
        if len(places) != len(contents.tiles):
            raise FormatError(f"damaged: {len(contents.tiles)} tiles, expected {len(places)}")
        for number, ((rows, columns), tile) in enumerate(zip(places, contents.tiles, strict=True)):
            if region is None or (_overlap(rows, region[0]) and _overlap(columns, region[1])):
                indices[:, rows, columns] = _read_tile(table_set, header, number, (rows, columns), tile)
        return indices

    def dequantise(self, header: Header, indices: np.ndarray) -> np.ndarray:
        """Return the raw latents z_q, (D, h, w) float32, that a file's integers stand for."""
        return self.table_set(header).dequantise(indices, header.quality, self.folder.mean, self.folder.step)

    def rescue(self, data: bytes) -> Rescued:
        """Read what can be read of a damaged file.

        Raises:
            ModelError: this model does not know the file's stream.
            FormatError: not even the header can be believed, or no tile is whole.
        """
        found = salvage.salvage(data)
        header, table_set = found.header, self.table_set(found.header)
        places = header.tiles()
        z = np.empty((self.folder.channels, *header.grid), np.float32)
        z[:] = self.folder.mean[:, None, None]
        lost = []
        for number, (rows, columns) in enumerate(places):
            tile = found.tiles[number] if number < len(found.tiles) else None
            try:
                if tile is None:
                    raise FormatError("lost")
                indices = _read_tile(table_set, header, number, (rows, columns), tile)
            except FormatError:
                lost.append((rows, columns))
                continue
            z[:, rows, columns] = table_set.dequantise(indices, header.quality, self.folder.mean, self.folder.step)
        if len(lost) == len(places):
            raise FormatError("damaged beyond rescue: no part of the image is whole")
        return Rescued(header, z, tuple(lost), tuple(found.chunks), tuple(found.damage))


def _overlap(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)


def _read_tile(table_set: TableSet, header: Header, number: int, place: tuple[slice, slice], tile: Tile) -> np.ndarray:
    rows, columns = place
    try:
        mode = Mode(tile.mode)
    except ValueError as exception:
        raise FormatError(f"tile {number}: entropy mode {tile.mode} is unknown") from exception
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    indices = table_set.decode(mode, tile.payload, shape, header.quality)
    if bitstream.tile_check(header, number, indices) != tile.check:
        raise FormatError(f"damaged: the check of tile {number} does not match its latents")
    return indices
