"""Codebook indices in a cache: the format `indices`, exact, for a generator of tokens.

    indices of image and mirror, (h, w) each -> (2, h, w) uint16, or uint32 where K > 65536 -> KEY.npy

Must not import torch: the processes that code and decode import this.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from codec.errors import FormatError
from train.cache.moments import Written

INDICES = "indices"
"""Name of the format."""
_MOST_UINT16 = 65536


@dataclass(frozen=True)
class Tokens:
    """What stands for one image.

    Attributes:
        indices: (h, w) int64 in [0, K).
    """

    indices: np.ndarray


def stored_type(codebook_size: int) -> str:
    """Return numpy's name of the type that K indices are stored in, little-endian."""
    return "<u2" if codebook_size <= _MOST_UINT16 else "<u4"


@dataclass
class TokenSums:
    """How often each index occurs, in images and mirrors.

    Attributes:
        codebook_size: K.
        counts: index -> how often; those that do not occur are not in it.
    """

    codebook_size: int
    counts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, sides: Sequence[Tokens], codebook_size: int) -> "TokenSums":
        """Return the counts of one sample."""
        found, counts = np.unique(np.stack([side.indices for side in sides]), return_counts=True)
        return cls(codebook_size, dict(zip(found.tolist(), counts.tolist(), strict=True)))

    def empty(self) -> "TokenSums":
        """Return the counts of nothing."""
        return TokenSums(self.codebook_size)

    def add(self, other: "TokenSums") -> None:
        """Add other counts to these."""
        for index, count in other.counts.items():
            self.counts[index] = self.counts.get(index, 0) + count

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        found = sorted(self.counts.items())
        return {
            "codebook_size": self.codebook_size,
            "indices": [index for index, _ in found],
            "counts": [count for _, count in found],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "TokenSums":
        """Undo `to_json`."""
        return cls(int(found["codebook_size"]), dict(zip(found["indices"], found["counts"], strict=True)))

    def statistics(self) -> dict[str, Any]:
        """Return what the header says: how many of the K vectors occur, and the entropy of one index by itself.

        `entropy_bits` is that of the frequencies, `perplexity` 2 to its power.
        """
        counts = np.array([count for _, count in sorted(self.counts.items())], np.float64)
        shares = counts / max(1.0, counts.sum())
        entropy = float(-(shares * np.log2(shares)).sum())
        return {
            "n_tokens": int(counts.sum()),
            "n_used": len(counts),
            "usage": len(counts) / self.codebook_size,
            "entropy_bits": entropy,
            "perplexity": 2.0**entropy,
        }


@dataclass(frozen=True)
class TokenFormat:
    """Indices as they are; see the module, and `LatentFormat`.

    Attributes:
        codebook_size: K.
    """

    codebook_size: int
    extensions: ClassVar[tuple[str, ...]] = ("npy",)
    slow: ClassVar[bool] = False

    def write(self, sides: Sequence[Tokens]) -> Written:
        """See `LatentFormat.write`."""
        array = np.stack([side.indices for side in sides])
        assert array.min() >= 0
        assert array.max() < self.codebook_size
        file = io.BytesIO()
        np.save(file, array.astype(stored_type(self.codebook_size)))
        return Written((file.getvalue(),), {})

    def read(self, members: Sequence[bytes], mirrored: bool) -> Tokens:
        """See `LatentFormat.read`."""
        try:
            array = np.load(io.BytesIO(members[0]), allow_pickle=False)
        except (ValueError, EOFError, OSError) as exception:
            raise FormatError(f"damaged: {exception}") from exception
        if array.ndim != 3 or len(array) != 2 or array.dtype != np.dtype(stored_type(self.codebook_size)):
            raise FormatError(f"damaged: {array.shape} {array.dtype}, expected the indices of an image and its mirror")
        indices = array[int(mirrored)].astype(np.int64)
        if indices.size and indices.max() >= self.codebook_size:
            raise FormatError(f"damaged: index {indices.max()}, expected less than {self.codebook_size}")
        return Tokens(indices)

    def errors(self, stored: Sequence[Tokens], exact: Sequence[Tokens]) -> dict[str, Any]:
        """See `LatentFormat.errors`: there is none."""
        return {}

    def sums_of(self, stored: Sequence[Tokens], facts: Mapping[str, Any]) -> TokenSums:
        """See `LatentFormat.sums_of`."""
        return TokenSums.of(stored, self.codebook_size)

    def sums_from(self, found: Mapping[str, Any]) -> TokenSums:
        """See `LatentFormat.sums_from`."""
        return TokenSums.from_json(found)

    def no_sums(self, channels: int) -> TokenSums:
        """See `LatentFormat.no_sums`."""
        return TokenSums(self.codebook_size)
