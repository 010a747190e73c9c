"""Integer tables of VQ models with several index maps, a coarse one and finer ones: one `IndexTables` for each map.

    indices (C, h, w) -> grid of each map (h*s, w*s) -> mode and payload of each -> one payload -> the same indices

FORMAT.md sections 1, 4 and 5.6 are the law. A model with one map has plain `IndexTables`, whose streams and tiles know
nothing of this. Must not import torch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from codec import index_tables
from codec.bitstream import MAPS, read_varint, varint
from codec.errors import FormatError, ModelError
from codec.index_maps import IndexMap, to_grids, to_planes
from codec.index_tables import IndexMode, IndexTables

MAX_MAPS = 8
MAX_SCALE = 16
MAX_POSITIONS = 1 << 20  # of a map in one tile: what reading it needs grows with them


@dataclass(frozen=True)
class MapTables:
    """All that a stream of several index maps needs; the counterpart of `IndexTables`, which is for one.

    Attributes:
        maps: at least two; scales are powers of two, the first is 1, and none is smaller than the one before.
        tables: one for each map.
    """

    maps: tuple[IndexMap, ...]
    tables: tuple[IndexTables, ...]

    def __post_init__(self) -> None:
        scales = [each.scale for each in self.maps]
        if (
            not 2 <= len(scales) <= MAX_MAPS
            or scales[0] != 1
            or scales != sorted(scales)
            or not set(scales) <= {1, 2, 4, 8, MAX_SCALE}
            or [each.codebook_size for each in self.maps] != [tables.codebook_size for tables in self.tables]
        ):
            raise ModelError(f"index tables of {describe(self.maps)}: damaged, or more than a file can hold")

    @property
    def fill(self) -> np.ndarray:
        """What stands for lost indices, (C, 1, 1) int32."""
        return to_planes(
            [
                np.full((each.scale, each.scale), tables.commonest, np.int32)
                for each, tables in zip(self.maps, self.tables, strict=True)
            ]
        )

    def encode(self, indices: np.ndarray, modes: Sequence[IndexMode] = tuple(IndexMode)) -> tuple[int, bytes]:
        """Code indices, each map in the mode that takes the fewest bytes.

        Args:
            indices: (C, h, w) int32, h, w >= 1, each in [0, K) of its map.
            modes: those to choose from for each map, at least one.

        Returns:
            MAPS, and the payload.

        Raises:
            FormatError: more indices of a map than a tile can hold.
        """
        self._check_size(indices.shape[1:])
        parts = []
        for tables, grid in zip(self.tables, to_grids(indices, self.maps), strict=True):
            mode, payload = tables.encode(grid[None], modes)
            parts.append(bytes([mode]) + varint(len(payload)) + payload)
        return MAPS, b"".join(parts)

    def decode(self, mode: int, payload: bytes, shape: tuple[int, int]) -> np.ndarray:
        """Read indices back.

        Args:
            mode: MAPS.
            payload: what `encode` returned.
            shape: (h, w) of the tile in latents.

        Returns:
            (C, h, w) int32, each in [0, K) of its map.

        Raises:
            FormatError: another mode, more indices of a map than a tile can hold, or the payload is damaged.
        """
        if mode != MAPS:
            raise FormatError(f"damaged: a tile of entropy mode {mode} in a file of {len(self.maps)} index maps")
        self._check_size(shape)
        parts = list(split(payload))
        if len(parts) != len(self.maps):
            raise FormatError(f"damaged payload: {len(parts)} index maps, expected {len(self.maps)}")
        h, w = shape
        return to_planes(
            [
                tables.decode(its_mode, part, (h * each.scale, w * each.scale))[0]
                for each, tables, (its_mode, part) in zip(self.maps, self.tables, parts, strict=True)
            ]
        )

    def _check_size(self, shape: Sequence[int]) -> None:
        n = int(shape[0]) * int(shape[1]) * self.maps[-1].scale ** 2
        if n > MAX_POSITIONS:
            raise FormatError(f"{n} indices of one map in a tile, expected at most {MAX_POSITIONS}: take smaller tiles")

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all arrays by number of the map and name, for `from_tensors` and the model folder."""
        return {
            f"{n}.{name}": tensor for n, tables in enumerate(self.tables) for name, tensor in tables.tensors().items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], maps: Sequence[IndexMap]) -> "MapTables":
        """Make map tables of what `tensors` returned.

        Raises:
            KeyError: a part is missing.
            ModelError: the parts are damaged, or do not fit the maps.
        """
        every = []
        for n in range(len(maps)):
            own = {name.removeprefix(f"{n}."): part for name, part in tensors.items() if name.startswith(f"{n}.")}
            every.append(IndexTables.from_tensors(own))
        return cls(tuple(maps), tuple(every))

    def digest(self) -> str:
        """Return the stream id (16 hex digits); FORMAT.md section 3."""
        sha = hashlib.sha256(b"latent-codec stream vq 2")
        sha.update(np.array([len(self.maps)], "<u4").tobytes())
        for each, tables in zip(self.maps, self.tables, strict=True):
            sha.update(np.array([each.scale], "<u4").tobytes())
            for part in tables.hashed():
                sha.update(part)
        return sha.hexdigest()[:16]


CodeTables = IndexTables | MapTables
"""The tables of one stream of codebook indices."""


def split(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield mode and payload of each map of a tile of mode MAPS; needs no tables.

    Raises:
        FormatError: a mode that indices do not have, or a length that does not fit.
    """
    at = n_maps = 0
    while at < len(payload):
        n_maps += 1
        if n_maps > MAX_MAPS:
            raise FormatError(f"damaged payload: more than {MAX_MAPS} index maps")
        if payload[at] not in set(IndexMode):
            raise FormatError(f"damaged payload: an index map of entropy mode {payload[at]}")
        length, start = read_varint(payload, at + 1, "the length of an index map")
        if start + length > len(payload):
            raise FormatError(f"damaged payload: an index map needs {start + length - len(payload)} bytes more")
        yield payload[at], payload[start : start + length]
        at = start + length


def fit(maps: Sequence[IndexMap], grids: Sequence[Sequence[np.ndarray]], codebooks: Sequence[np.ndarray]) -> CodeTables:
    """Fit the tables of a stream to training images; those of a single map are plain `IndexTables`.

    Args:
        maps: of the model.
        grids: of each map, see `codec.index_tables.fit`.
        codebooks: of each map, (K, D).

    Raises:
        ValueError: as `codec.index_tables.fit`.
    """
    tables = [index_tables.fit(*each) for each in zip(grids, codebooks, strict=True)]
    return tables[0] if len(maps) == 1 else MapTables(tuple(maps), tuple(tables))


def of_each_map(tables: CodeTables) -> tuple[IndexTables, ...]:
    """Return the tables of each map of a stream."""
    return tables.tables if isinstance(tables, MapTables) else (tables,)


def describe(maps: Sequence[IndexMap]) -> str:
    """Say what codebooks a model has, for messages."""
    if not maps:
        return "no codebook"
    if len(maps) == 1:
        return f"a codebook of {maps[0].codebook_size}"
    return "codebooks of " + ", ".join(f"{each.codebook_size} at scale {each.scale}" for each in maps)
