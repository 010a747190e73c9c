"""Integer tables for codebook indices: what a VQ model's stream needs to be coded and read.

    indices (1, h, w) -> FIXED | STATIC | ADAPTIVE | CONTEXT, whichever is smallest -> payload -> the same indices

FORMAT.md sections 4.4 and 5.5 are the law; `index_coder` has the arithmetic, `index_fitting` makes tables. The
counterpart of `codec.tables`, which is for integer latents. Must not import torch.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from codec import index_coder, index_fitting, packed
from codec.errors import FormatError, ModelError
from codec.index_coder import EXPONENT_LIMIT, N_NEIGHBOURS, PRIOR_TOTAL, Layout
from codec.index_maps import IndexMap
from codec.limits import MAX_CODES

__all__ = ["MAX_CODES", "IndexMode", "IndexTables", "fit"]

_MOST_SYMBOLS = 1 << 12  # groups, and codes of a group: what one row of frequencies holds


class IndexMode(IntEnum):
    """How the payload of a tile of codebook indices is coded; the number stands in the file."""

    FIXED = 4
    STATIC = 5
    ADAPTIVE = 6
    CONTEXT = 7


# The tensors of index tables in the order in which they are hashed, and their types on file.
_PARTS = {
    "codes": "<i4",
    "prior": "<i4",
    "group_context": "|i1",
    "member_context": "|i1",
    "repeats": "<i2",
    "units": "<i4",
    "powers": "<i4",
}


@dataclass(frozen=True)
class IndexTables:
    """All that a stream of codebook indices needs.

    The K codes stand in an order in which like ones are near each other: place p belongs to group p * G // K.

    Attributes:
        codes: (K,) int32, the code at each place: a permutation of 0..K-1.
        prior: (K,) int32 >= 1, by place, how often codes occur; all together at most 2^25.
        group_context: (6, C, G) int8, in 1/16 octave: what the class p * C // K of each neighbour says of the groups.
        member_context: (6, c, K) int8: what its class p * c // K says of the places within a group.
        repeats: (6,) int16: what a neighbour of the same group says of its own place.
        units: (2, 2) int32 >= 0, what each code seen in the tile adds to the prior: rows ADAPTIVE and CONTEXT, columns
            groups and places.
        powers: (321,) int32, 2^(10 + x / 16) for x = -160..160, rounded.
    """

    codes: np.ndarray
    prior: np.ndarray
    group_context: np.ndarray
    member_context: np.ndarray
    repeats: np.ndarray
    units: np.ndarray
    powers: np.ndarray

    def __post_init__(self) -> None:
        k = self.codes.size
        groups, members = self.group_context, self.member_context
        if (
            not 2 <= k <= MAX_CODES
            or not np.array_equal(np.sort(self.codes), np.arange(k))
            or self.prior.shape != (k,)
            or int(self.prior.min()) < 1
            or int(self.prior.sum(dtype=np.int64)) > 2 * PRIOR_TOTAL
            or groups.ndim != 3
            or members.ndim != 3
            or (groups.shape[0], members.shape[0], members.shape[2]) != (N_NEIGHBOURS, N_NEIGHBOURS, k)
            or not 1 <= groups.shape[1] <= k
            or not 1 <= members.shape[1] <= k
            or not 1 <= groups.shape[2] <= min(k, _MOST_SYMBOLS)
            or -(-k // groups.shape[2]) > _MOST_SYMBOLS
            or self.repeats.shape != (N_NEIGHBOURS,)
            or self.units.shape != (2, 2)
            or not 0 <= int(self.units.min()) <= int(self.units.max()) <= PRIOR_TOTAL
            or self.powers.shape != (2 * EXPONENT_LIMIT + 1,)
            or not 1 <= int(self.powers.min()) <= int(self.powers.max()) <= 1 << 20
        ):
            raise ModelError("index tables are damaged: shapes, codes, weights or powers are out of range")

    @property
    def codebook_size(self) -> int:
        """K, the number of codes."""
        return int(self.codes.size)

    @property
    def maps(self) -> tuple[IndexMap, ...]:
        """The one map of a model that these tables are a whole stream's of; see `codec.map_tables`."""
        return (IndexMap(self.codebook_size, 1),)

    @property
    def commonest(self) -> int:
        """The code that occurs most often."""
        return int(self.codes[int(self.prior.argmax())])

    @property
    def fill(self) -> np.ndarray:
        """What stands for lost indices, (1, 1, 1) int32."""
        return np.full((1, 1, 1), self.commonest, np.int32)

    @cached_property
    def layout(self) -> Layout:
        """The same arrays as the coder wants them."""
        return Layout.of(self.prior, self.group_context, self.member_context, self.repeats, self.powers)

    @cached_property
    def places(self) -> np.ndarray:
        """The place of each code, (K,) int64."""
        places = np.empty(self.codes.size, np.int64)
        places[self.codes] = np.arange(self.codes.size)
        return places

    def encode(self, indices: np.ndarray, modes: Sequence[IndexMode] = tuple(IndexMode)) -> tuple[IndexMode, bytes]:
        """Code indices in the mode that takes the fewest bytes.

        Args:
            indices: (1, h, w) int32 in [0, K), h, w >= 1.
            modes: those to choose from, at least one.

        Returns:
            The mode, the lowest of equals, and the payload.
        """
        coded = [(mode, self._encode(indices[0], mode)) for mode in sorted(modes)]
        return min(coded, key=lambda pair: len(pair[1]))

    def _encode(self, indices: np.ndarray, mode: IndexMode) -> bytes:
        if mode is IndexMode.FIXED:
            return packed.pack(indices.reshape(-1), self._width)
        return index_coder.encode(self.layout, self.places[indices], *self._how(mode))

    def decode(self, mode: int, payload: bytes, shape: tuple[int, int]) -> np.ndarray:
        """Read indices back.

        Args:
            mode: of `IndexMode`.
            payload: what `encode` returned.
            shape: (h, w) of the grid.

        Returns:
            (1, h, w) int32 in [0, K).

        Raises:
            FormatError: not a mode of indices, or the payload is damaged (a CRC over the file finds this first).
        """
        if mode not in set(IndexMode):
            raise FormatError(f"damaged: a tile of entropy mode {mode} in a file of codebook indices")
        if mode == IndexMode.FIXED:
            indices = packed.unpack(payload, shape[0] * shape[1], self._width)
            if int(indices.max()) >= self.codebook_size:
                raise FormatError(f"damaged payload: an index beyond a codebook of {self.codebook_size}")
            return indices.astype(np.int32).reshape(1, *shape)
        places = index_coder.decode(self.layout, payload, shape, *self._how(IndexMode(mode)))
        found: np.ndarray = self.codes[places].astype(np.int32)
        return found[None]

    def bits(self, indices: np.ndarray, mode: IndexMode) -> float:
        """Return the ideal code length of (1, h, w) indices in a mode, in bits."""
        if mode is IndexMode.FIXED:
            return float(indices.size * self._width)
        return sum(index_coder.lengths(self.layout, self.places[indices[0]], *self._how(mode)))

    @property
    def _width(self) -> int:
        return (self.codebook_size - 1).bit_length()

    def _how(self, mode: IndexMode) -> tuple[tuple[int, int], bool]:
        """Return the units of groups and places in a mode, and whether neighbours count."""
        if mode is IndexMode.STATIC:
            return (0, 0), False
        groups, members = self.units[mode - IndexMode.ADAPTIVE].tolist()
        return (groups, members), mode is IndexMode.CONTEXT

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, for `from_tensors` and the model folder."""
        return {name: getattr(self, name) for name in _PARTS}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> "IndexTables":
        """Make index tables of what `tensors` returned.

        Raises:
            KeyError: a part is missing.
            ModelError: the parts are damaged.
        """
        for name, dtype in _PARTS.items():
            if tensors[name].dtype != np.dtype(dtype):
                raise ModelError(f"index tables are damaged: {name} is {tensors[name].dtype}, expected {dtype}")
        return cls(**{name: tensors[name] for name in _PARTS})

    def digest(self) -> str:
        """Return the stream id (16 hex digits); FORMAT.md section 3.

        The codebook's vectors are no part of it: they belong to the decoder, which may be trained on alone.
        """
        sha = hashlib.sha256(b"latent-codec stream vq 1")
        for part in self.hashed():
            sha.update(part)
        return sha.hexdigest()[:16]

    def hashed(self) -> Iterator[bytes]:
        """Yield what a stream id is made of: shape and elements of each array."""
        for name, dtype in _PARTS.items():
            array = getattr(self, name)
            yield np.array([array.ndim, *array.shape], "<u4").tobytes()
            yield np.ascontiguousarray(array, dtype=dtype).tobytes()


def fit(grids: Sequence[np.ndarray], codebook: np.ndarray) -> IndexTables:
    """Fit index tables to training images; a refit of a model adds its result to the folder's tables.

    Args:
        grids: (h, w) integers in [0, K) each, at least one, of any size: parts of images, in random order.
        codebook: (K, D), the vectors; like ones share groups.

    Raises:
        ValueError: a codebook of fewer than two vectors or more than 2^20, an index beyond it, no index at all, or
            vectors that are not finite.
    """
    k = len(codebook)
    if not 2 <= k <= MAX_CODES:
        raise ValueError(f"a codebook of {k} vectors, expected 2..{MAX_CODES}")
    if not np.isfinite(codebook).all():
        raise ValueError("the codebook is not finite")
    if not sum(grid.size for grid in grids):
        raise ValueError("no codebook indices to fit tables to")
    if any(grid.size and not 0 <= int(grid.min()) <= int(grid.max()) < k for grid in grids):
        raise ValueError(f"an index beyond a codebook of {k} vectors")
    return IndexTables(**index_fitting.fit([grid for grid in grids if grid.size], codebook))
