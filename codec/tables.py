"""Integer entropy tables and reconstruction points: stored in the model folder, never computed at run time.

    indices (D, h, w) -> RAW | STATIC | CONTEXT, whichever is smallest -> payload -> the same indices -> raw latents

FORMAT.md sections 4 and 5 are the law. Fitting uses floating point; coding and decoding use integers only. Must not
import torch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from codec import fitting, packed
from codec.context import ContextTables
from codec.errors import FormatError, ModelError
from codec.quantiser import (
    INDEX_LIMIT,
    QUALITIES,
    QUALITY_PER_OCTAVE,
    entropy_bits,
    from_steps,
    step_scale,
    to_indices,
)
from codec.static import StaticTables

__all__ = [
    "INDEX_LIMIT",
    "QUALITIES",
    "QUALITY_PER_OCTAVE",
    "Mode",
    "TableSet",
    "entropy_bits",
    "fit",
    "step_scale",
    "to_indices",
]


class Mode(IntEnum):
    """How a payload is coded; the number stands in the file."""

    RAW = 0
    STATIC = 1
    CONTEXT = 2


# The tensors of a table set in the order in which they are hashed, and their types on file.
_PARTS = {
    "first": "<i4",
    "offsets": "<i4",
    "frequencies": "<u2",
    "context_weights": "<i2",
    "context_thresholds": "<i4",
    "context_reach": "<i4",
    "context_frequencies": "<u2",
    "points": "|i1",
}


@dataclass(frozen=True)
class TableSet:
    """All that a stream needs besides mean and step.

    Attributes:
        static: one table per quality and channel.
        context: weights per quality and channel, and the tables that they choose from.
        points: (QUALITIES, D, 2 * POINT_REACH + 1) int8, how far above its index a reconstructed latent lies, in 1/128
            of a step, for the indices <= -3, -2, -1, 0, 1, 2, >= 3.
    """

    static: StaticTables
    context: ContextTables
    points: np.ndarray

    def __post_init__(self) -> None:
        channels = self.static.channels
        if self.context.channels != channels or self.points.shape != (
            QUALITIES,
            channels,
            2 * fitting.POINT_REACH + 1,
        ):
            raise ModelError("entropy tables are damaged: their parts are not of one number of channels")

    @property
    def channels(self) -> int:
        """D, the number of latent channels."""
        return self.static.channels

    def encode(self, indices: np.ndarray, quality: int, modes: Sequence[Mode] = tuple(Mode)) -> tuple[Mode, bytes]:
        """Code integer latents in the mode that takes the fewest bytes.

        Args:
            indices: (D, h, w) int32 within +-INDEX_LIMIT, h, w >= 1.
            quality: 0..100.
            modes: those to choose from, at least one.

        Returns:
            The mode, the lowest of equals, and the payload.
        """
        coders = {Mode.STATIC: self.static.encode, Mode.CONTEXT: self.context.encode}
        coded = [
            (mode, packed.encode(indices) if mode is Mode.RAW else coders[mode](indices, quality))
            for mode in sorted(modes)
        ]
        return min(coded, key=lambda pair: len(pair[1]))

    def decode(self, mode: int, payload: bytes, shape: tuple[int, int], quality: int) -> np.ndarray:
        """Read integer latents back.

        Args:
            mode: of `Mode`.
            payload: what `encode` returned.
            shape: (h, w) of the latent grid.
            quality: 0..100.

        Returns:
            (D, h, w) int32 within +-INDEX_LIMIT.

        Raises:
            FormatError: there is no such mode, or the payload is damaged (a CRC over the file finds this first).
        """
        if mode == Mode.RAW:
            return packed.decode(payload, self.channels, shape)
        if mode == Mode.STATIC:
            return self.static.decode(payload, shape, quality)
        if mode == Mode.CONTEXT:
            return self.context.decode(payload, shape, quality)
        raise FormatError(f"unknown coding mode {mode}, expected 0, 1 or 2")

    def bits(self, indices: np.ndarray, quality: int, mode: Mode) -> float:
        """Return the ideal code length of (D, h, w) integer latents in a mode, in bits, escapes included."""
        if mode is Mode.RAW:
            return float(packed.size_bits(indices))
        return float((self.static if mode is Mode.STATIC else self.context).bits(indices, quality).sum())

    def dequantise(self, indices: np.ndarray, quality: int, mean: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Return the raw latents that indices stand for: on the way to the centroid of what is rounded to each.

        Args:
            indices: (D, ...) int32.
            quality: 0..100.
            mean: (D,) float32.
            step: (D,) float32, the step at q = 0.

        Returns:
            (D, ...) float32.
        """
        return from_steps(self.centroids(indices, quality) / fitting.POINT_UNIT, mean, step, quality)

    def centroids(self, indices: np.ndarray, quality: int) -> np.ndarray:
        """Return what indices stand for, (D, ...) int64 in 1/128 of a step."""
        reach = fitting.POINT_REACH
        flat = indices.reshape(indices.shape[0], -1)
        offsets = np.take_along_axis(self.points[quality], np.clip(flat, -reach, reach) + reach, axis=1)
        centroids: np.ndarray = flat.astype(np.int64) * fitting.POINT_UNIT + offsets
        return centroids.reshape(indices.shape)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, for `from_tensors` and the model folder."""
        return {
            "first": self.static.first,
            "offsets": self.static.offsets,
            "frequencies": self.static.frequencies,
            "context_weights": self.context.weights,
            "context_thresholds": self.context.thresholds,
            "context_reach": self.context.reach,
            "context_frequencies": self.context.frequencies,
            "points": self.points,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> "TableSet":
        """Make a table set of what `tensors` returned.

        Raises:
            KeyError: a part is missing.
            ModelError: the parts are damaged.
        """
        parts = {name: tensors[name] for name in _PARTS}
        for name, dtype in _PARTS.items():
            if parts[name].dtype != np.dtype(dtype):
                raise ModelError(f"entropy tables are damaged: {name} is {parts[name].dtype}, expected {dtype}")
        return cls(
            StaticTables(*(parts[name] for name in ("first", "offsets", "frequencies"))),
            ContextTables(
                *(parts[f"context_{name}"] for name in ("weights", "thresholds", "reach", "frequencies")),
            ),
            parts["points"],
        )

    def digest(self, mean: np.ndarray, step: np.ndarray) -> str:
        """Return the stream id (16 hex digits) of this table set with a mean and step; FORMAT.md section 3."""
        sha = hashlib.sha256(b"latent-codec stream 1")
        parts = self.tensors()
        arrays = [(mean, "<f4"), (step, "<f4"), *((parts[name], dtype) for name, dtype in _PARTS.items())]
        for array, dtype in arrays:
            sha.update(np.uint32(array.size).astype("<u4").tobytes())
            sha.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return sha.hexdigest()[:16]


def fit(grids: Sequence[np.ndarray], mean: np.ndarray, step: np.ndarray) -> TableSet:
    """Fit a table set to latents of training images; a refit of a model adds its result to the folder's table sets.

    Args:
        grids: (D, h, w) float32 raw latents each, at least one, of any size: parts of images, in random order.
        mean: (D,) float32.
        step: (D,) float32, the step at q = 0.

    Raises:
        ValueError: a latent is not finite.
    """
    z = np.concatenate([grid.reshape(grid.shape[0], -1) for grid in grids], axis=1)
    if not np.isfinite(z).all():
        raise ValueError("latents are not finite")
    static, points = fitting.static_tables(z, mean, step)
    return TableSet(static, fitting.context_tables(grids, mean, step), points)
