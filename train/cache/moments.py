"""What a latent cache holds of a sample, and the one interface that its formats keep.

    image, mirror -> encoder -> Moments, Moments (raw) -> LatentFormat.write -> members of a tar -> .read -> Moments

Another format is one more class with these methods and a row in `train.cache.formats.make_format`; its sides may be
something else, as codebook indices are (`train.cache.tokens`).
Must not import torch: the processes that code and decode import this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

PSNR_PEAK = 6.0
"""Peak of the latent PSNR, in standard deviations of the latents: nearly all of them lie within 3 of their mean."""


@dataclass(frozen=True)
class Moments:
    """The posterior of one image, raw latents.

    Attributes:
        mean: (D, h, w) float32.
        std: (D, h, w) or (D, 1, 1) float32; None for a family without a variance.
    """

    mean: np.ndarray
    std: np.ndarray | None


Sides = tuple[Moments, Moments]
"""Of an image and of its mirror, left and right exchanged: a latent cannot be flipped."""


@dataclass(frozen=True)
class Written:
    """One sample in a format.

    Attributes:
        members: the bytes of each of the format's `extensions`.
        facts: what else is to stand in the sample's JSON.
    """

    members: tuple[bytes, ...]
    facts: dict[str, Any]


class AnySums(Protocol):
    """What the statistics of a cache come from: `Sums`, or what a format has in their place."""

    def empty(self) -> Any:
        """Return the sums of nothing."""
        ...

    def add(self, other: Any) -> None:
        """Add the sums of other samples to these."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Return what the header says."""
        ...


class LatentFormat(Protocol):
    """How moments become bytes, or what stands in their place for a format that is not of moments.

    Attributes:
        extensions: of the members that a sample has beside its JSON, in their order.
        slow: it works in Python for so long that it should have processes of its own.
    """

    extensions: ClassVar[tuple[str, ...]]
    slow: ClassVar[bool]

    def write(self, sides: Any) -> Written:
        """Return the bytes of an image and its mirror.

        Raises:
            NonFiniteError: the latents are beyond what the format can hold.
        """
        ...

    def read(self, members: Sequence[bytes], mirrored: bool) -> Any:
        """Return the moments of the image, or of its mirror.

        Raises:
            FormatError: the bytes are damaged.
        """
        ...

    def errors(self, stored: Any, exact: Any) -> dict[str, Any]:
        """Return what a sample's JSON says of the difference between its stored sides and the exact ones."""
        ...

    def sums_of(self, stored: Any, facts: Mapping[str, Any]) -> Any:
        """Return one sample's part of the statistics, of its stored sides and its JSON."""
        ...

    def sums_from(self, found: Mapping[str, Any]) -> Any:
        """Return the sums whose `to_json` this is."""
        ...

    def no_sums(self, channels: int) -> Any:
        """Return the sums of nothing, of latents with D = `channels`."""
        ...


@dataclass
class Sums:
    """Sums over latent positions, in float64, that the statistics of a cache come from; the order of adding matters.

    Attributes:
        n: positions per channel.
        total: (D,) of the mean.
        square: (D,) of its square.
        variance: (D,) of the posterior's variance.
        error: of squared errors of the stored mean, over channels and positions.
    """

    n: int
    total: np.ndarray
    square: np.ndarray
    variance: np.ndarray
    error: float

    @classmethod
    def none(cls, channels: int) -> "Sums":
        """Return the sums of nothing."""
        return cls(0, np.zeros(channels), np.zeros(channels), np.zeros(channels), 0.0)

    @classmethod
    def of(cls, sides: Sequence[Moments], mse: float) -> "Sums":
        """Return the sums of one sample as it is stored; `mse` is the mean squared error of its means."""
        sums = cls.none(sides[0].mean.shape[0])
        for side in sides:
            z = side.mean.reshape(side.mean.shape[0], -1).astype(np.float64)
            sums.n += z.shape[1]
            sums.total += z.sum(axis=1)
            sums.square += (z * z).sum(axis=1)
            if side.std is not None:
                std = np.broadcast_to(side.std, side.mean.shape).reshape(z.shape).astype(np.float64)
                sums.variance += (std * std).sum(axis=1)
        sums.error = mse * sums.n * sums.total.size
        return sums

    def empty(self) -> "Sums":
        """Return the sums of nothing, of as many channels."""
        return Sums.none(self.total.size)

    def add(self, other: "Sums") -> None:
        """Add other sums to these."""
        self.n += other.n
        self.total = self.total + other.total
        self.square = self.square + other.square
        self.variance = self.variance + other.variance
        self.error += other.error

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Sums":
        """Undo `to_json`."""
        arrays = {name: np.array(found[name], np.float64) for name in ("total", "square", "variance")}
        return cls(n=int(found["n"]), error=float(found["error"]), **arrays)

    def statistics(self) -> dict[str, Any]:
        """Return what the header says: moments of the raw latents as they are stored, and their error.

        `mean`, `std`, `posterior_std` (root mean square) have a number per channel; `global_mean`, `global_std` and
        `mse` are over all channels. `snr_db` is 10 log10(global_std^2 / mse), `psnr_db` the same with a peak of
        `PSNR_PEAK` standard deviations; None where nothing differs.
        """
        n = max(self.n, 1)
        mean = self.total / n
        variance = np.maximum(self.square / n - mean**2, 0.0)
        global_mean = float(mean.mean())
        global_variance = float((variance + (mean - global_mean) ** 2).mean())
        mse = self.error / (n * mean.size)
        snr_db = _decibel(global_variance, mse)
        return {
            "n_positions": self.n,
            "mean": mean.tolist(),
            "std": np.sqrt(variance).tolist(),
            "posterior_std": np.sqrt(self.variance / n).tolist(),
            "global_mean": global_mean,
            "global_std": float(np.sqrt(global_variance)),
            "mse": mse,
            "snr_db": snr_db,
            "psnr_db": None if snr_db is None else snr_db + 20 * float(np.log10(PSNR_PEAK)),
        }


def _decibel(signal: float, noise: float) -> float | None:
    return float(10 * np.log10(signal / noise)) if signal > 0 and noise > 0 else None


def mean_squared_error(stored: Sequence[Moments], exact: Sequence[Moments]) -> float:
    """Return the mean squared error of stored means, over sides, channels and positions, to six digits."""
    pairs = zip(stored, exact, strict=True)
    errors = [float(np.mean((one.mean.astype(np.float64) - other.mean) ** 2)) for one, other in pairs]
    return float(f"{np.mean(errors):.6g}")


class MomentsFormat:
    """What all formats of moments do alike; see `LatentFormat`."""

    def errors(self, stored: Sequence[Moments], exact: Sequence[Moments]) -> dict[str, Any]:
        """See `LatentFormat.errors`: `mse`, of the means."""
        return {"mse": mean_squared_error(stored, exact)}

    def sums_of(self, stored: Sequence[Moments], facts: Mapping[str, Any]) -> Sums:
        """See `LatentFormat.sums_of`."""
        return Sums.of(stored, facts["mse"])

    def sums_from(self, found: Mapping[str, Any]) -> Sums:
        """See `LatentFormat.sums_from`."""
        return Sums.from_json(found)

    def no_sums(self, channels: int) -> Sums:
        """See `LatentFormat.no_sums`."""
        return Sums.none(channels)
