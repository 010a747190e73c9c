"""Raw latents to the bytes of a file and back, one tile after another. No network and no torch: integers and tables.

    z -> indices -> tiles -> mode and payload of each -> container           code, code_within
    file -> tiles -> indices, every sum checked -> z_q                       read, rescue, dequantise

The network of a VQ model gives and takes codebook indices, (C, h, w) int32: they stand for both z and z_q. C is 1, or
that of `codec.index_maps.planes` where a model has several index maps. FORMAT.md is the law. Processes that share the
work of a folder each hold a `Coder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from codec import bitstream, effort, index_maps, map_tables, salvage
from codec.bitstream import Chunk, Contents, Header, Tile
from codec.errors import FormatError, ModelError
from codec.index_tables import IndexMode
from codec.map_tables import CodeTables
from codec.model_folder import ModelFolder
from codec.regions import lost_pixels
from codec.tables import QUALITIES, Mode, TableSet

DEFAULT_EFFORT = 1  # a third of the coder's time again, for up to a sixth of the bytes
TILE = 64  # latents a side; tiles are coded apart, so damage stays in one and a region needs few (costs under 0.1 %)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How latents become a file.

    Attributes:
        quality: 0 (coarsest) .. 100 (finest); not for a VQ model, whose files have the model's own.
        effort: 0 (rounding only) .. 9, how hard the encoder searches for cheaper integers, at qualities where that
            serves the model (`ModelFolder.search_below`); not for a VQ model.
        tile: side of a tile in latents, a power of two; 0 = one tile.
        modes: entropy coding modes to try, those for the model's latents; the smallest payload is kept, tile by tile,
            and of several index maps map by map.
    """

    quality: int = bitstream.DEFAULT_QUALITY
    effort: int = DEFAULT_EFFORT
    tile: int = TILE
    modes: tuple[Mode | IndexMode, ...] = (*Mode, *IndexMode)

    def __post_init__(self) -> None:
        if self.quality not in range(101):
            raise ValueError(f"quality {self.quality}, expected 0..100")
        if self.effort not in range(10):
            raise ValueError(f"effort {self.effort}, expected 0..9")
        if self.tile and self.tile not in (2**k for k in range(11)):
            raise ValueError(f"tile {self.tile}, expected 0 or a power of two, at most 1024")
        if not self.modes or not all(isinstance(mode, Mode | IndexMode) for mode in self.modes):
            raise ValueError(f"modes {self.modes}, expected some of {[*Mode, *IndexMode]}")


@dataclass(frozen=True)
class Coded:
    """A finished file.

    Attributes:
        data: its bytes.
        quality: the quality that it was coded at; 0 for a VQ model.
    """

    data: bytes
    quality: int


@dataclass(frozen=True)
class Rescued:
    """What could be read of a damaged file.

    Attributes:
        header: what the file says about itself.
        z: (D, h, w) float32 raw latents; lost ones are the channel means. Of a VQ model (C, h, w) int32 codebook
            indices; lost ones are its commonest codes.
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
            z: (D, h, w) float32 raw latents, h = ceil(height / f), w = ceil(width / f); of a VQ model (C, h, w) int32
                codebook indices.
            width: pixels of the image.
            height: pixels.
            settings: quality and the rest.
            chunks: what else belongs into the file.

        Raises:
            FormatError: larger than the format can hold.
            ValueError: the latents are not finite, an index is beyond the codebook, or none of the modes is for them.
        """
        folder = self.folder
        header = Header(
            stream_id=folder.stream_id,
            decoder_id=self._decoder_id,
            quality=0 if folder.maps else settings.quality,
            width=width,
            height=height,
            f=folder.f,
            tile=settings.tile if max(z.shape[1:]) > settings.tile else 0,
        )
        expected = (self._n_planes, *header.grid)
        if z.shape != expected:
            raise ValueError(f"latents {z.shape}, expected {expected} for {width} x {height} pixels")
        encode = self._encode_indices if folder.maps else self._encode_latents
        tiles = []
        for number, (rows, columns) in enumerate(header.tiles()):
            mode, payload, indices = encode(z[:, rows, columns], settings)
            tiles.append(Tile(mode, bitstream.tile_check(header, number, indices), payload))
        return Coded(bitstream.pack(header, tiles, chunks), header.quality)

    @property
    def _modes(self) -> frozenset[int]:
        """Entropy modes that tiles of this model's files can have."""
        if not self.folder.maps:
            return bitstream.LATENT_MODES
        return bitstream.CODE_MODES if len(self.folder.maps) == 1 else frozenset({bitstream.MAPS})

    @property
    def _n_planes(self) -> int:
        return index_maps.planes(self.folder.maps) if self.folder.maps else self.folder.channels

    def _encode_latents(self, z: np.ndarray, settings: Settings) -> tuple[int, bytes, np.ndarray]:
        """Return mode, payload and indices of one tile."""
        folder = self.folder
        table_set = folder.table_sets[folder.stream_id]
        modes = [mode for mode in settings.modes if isinstance(mode, Mode)]
        if not modes:
            raise ValueError(f"modes {settings.modes}, expected some of {[*Mode]} for {folder.name}")
        level = settings.effort if settings.quality < folder.search_below else 0
        indices = effort.search(z, folder.mean, folder.step, table_set, settings.quality, level)
        mode, payload = table_set.encode(indices, settings.quality, modes)
        return int(mode), payload, indices

    def _encode_indices(self, indices: np.ndarray, settings: Settings) -> tuple[int, bytes, np.ndarray]:
        """Return the same of codebook indices, which are kept as they are."""
        folder = self.folder
        tables = folder.index_tables[folder.stream_id]
        modes = [mode for mode in settings.modes if isinstance(mode, IndexMode)]
        if not modes:
            raise ValueError(f"modes {settings.modes}, expected some of {[*IndexMode]} for {folder.name}")
        if not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"{indices.dtype} for {folder.name}, expected codebook indices")
        for each, grid in zip(folder.maps, index_maps.to_grids(indices, folder.maps), strict=True):
            if not 0 <= int(grid.min()) <= int(grid.max()) < each.codebook_size:
                raise ValueError(f"an index beyond the codebook of {each.codebook_size} vectors of {folder.name}")
        indices = indices.astype(np.int32)
        mode, payload = tables.encode(indices, modes)
        return int(mode), payload, indices

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

        Raises:
            ValueError: a VQ model, which has one quality.
        """
        if self.folder.maps:
            raise ValueError(f"{self.folder.name} is a VQ model: its quality is its own, no size can be asked for")

        def at(quality: int) -> Coded:
            return self.code(z, width, height, replace(settings, quality=quality), chunks)

        best = at(0)
        low, high = 0, QUALITIES  # low fits, or is all there is; high does not
        while len(best.data) <= limit_bytes and high - low > 1:
            middle = (low + high) // 2
            found = at(middle)
            if len(found.data) <= limit_bytes:
                low, best = middle, found
            else:
                high = middle
        return best

    def tables(self, header: Header) -> TableSet | CodeTables:
        """Return the tables of a file.

        Raises:
            ModelError: this model does not know the file's stream.
            FormatError: the file says another downsampling factor than its stream's model has.
        """
        folder = self.folder
        found = folder.streams.get(header.stream_id)
        if found is None:
            raise ModelError(
                f"made with another model: it needs stream {header.stream_id}, {folder.name} has {folder.stream_id}"
            )
        if header.f != folder.f:
            raise FormatError(f"damaged: it says f {header.f}, its model has f {folder.f}")
        if folder.maps and header.quality:
            raise FormatError(f"damaged: quality {header.quality} in a file of codebook indices, expected 0")
        return found

    def read(self, contents: Contents, region: tuple[slice, slice] | None = None) -> np.ndarray:
        """Read the integer latents of a file and check the sum of every tile.

        Args:
            contents: of `bitstream.unpack`.
            region: rows and columns of latents that are wanted; tiles outside stay 0 and are not read.

        Returns:
            (D, h, w) int32; of a VQ model (C, h, w).

        Raises:
            ModelError: this model does not know the file's stream.
            FormatError: a tile is damaged.
        """
        header, tables = contents.header, self.tables(contents.header)
        indices = np.zeros((self._n_planes, *header.grid), np.int32)
        places = header.tiles()
        if len(places) != len(contents.tiles):
            raise FormatError(f"damaged: {len(contents.tiles)} tiles, expected {len(places)}")
        for number, ((rows, columns), tile) in enumerate(zip(places, contents.tiles, strict=True)):
            if region is None or (_overlap(rows, region[0]) and _overlap(columns, region[1])):
                indices[:, rows, columns] = _read_tile(tables, header, number, (rows, columns), tile)
        return indices

    def dequantise(self, header: Header, indices: np.ndarray) -> np.ndarray:
        """Return what the network decodes: the raw latents z_q, (D, h, w) float32, that a file's integers stand for.

        Codebook indices are returned as they are: their vectors belong to the network.
        """
        found = self.tables(header)
        if isinstance(found, TableSet):
            return found.dequantise(indices, header.quality, self.folder.mean, self.folder.step)
        return indices

    def rescue(self, data: bytes) -> Rescued:
        """Read what can be read of a damaged file.

        Raises:
            ModelError: this model does not know the file's stream.
            FormatError: not even the header can be believed, or no tile is whole.
        """
        found = salvage.salvage(data, self._modes)
        header, tables = found.header, self.tables(found.header)
        places, damage = header.tiles(), list(found.damage)
        fill = self.folder.mean[:, None, None] if isinstance(tables, TableSet) else tables.fill
        z = np.empty((len(fill), *header.grid), fill.dtype)
        z[:] = fill
        lost = []
        for number, (rows, columns) in enumerate(places):
            tile = found.tiles[number] if number < len(found.tiles) else None
            try:
                if tile is None:
                    raise FormatError("lost")
                indices = _read_tile(tables, header, number, (rows, columns), tile)
            except FormatError:
                lost.append((rows, columns))
                continue
            z[:, rows, columns] = self.dequantise(header, indices)
        if len(lost) == len(places):
            raise FormatError("damaged beyond rescue: no part of the image is whole")
        if lost and not isinstance(tables, TableSet):
            codes = [str(each.commonest) for each in map_tables.of_each_map(tables)]
            which = "the commonest code of the model" if len(codes) == 1 else "the commonest code of each map"
            damage.append(f"lost parts are filled with {which}, {' and '.join(codes)}")
        return Rescued(header, z, tuple(lost), tuple(found.chunks), tuple(damage))


def _overlap(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)


def _read_tile(
    tables: TableSet | CodeTables, header: Header, number: int, place: tuple[slice, slice], tile: Tile
) -> np.ndarray:
    rows, columns = place
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    if isinstance(tables, TableSet):
        indices = tables.decode(tile.mode, tile.payload, shape, header.quality)
    else:
        indices = tables.decode(tile.mode, tile.payload, shape)
    if bitstream.tile_check(header, number, indices) != tile.check:
        raise FormatError(f"damaged: the check of tile {number} does not match its latents")
    return indices
