"""The formats of a cache; those of plain tensors: safetensors of fp16, bf16, or int8 with a scale per channel.

    Moments of image and mirror -> {mean, std, mirror_mean, mirror_std} -> KEY.safetensors, which anybody can read

int8: mean = mean_low + mean_step * q, a float32 each per sample and channel, q 0..255 over the channel's range, so no
value is off by more than mean_step / 2; the posterior's deviation is stored like that too, as its natural logarithm.
Imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from codec.errors import FormatError, NonFiniteError
from train.cache.lcx import LcxFormat
from train.cache.moments import LatentFormat, Moments, MomentsFormat, Sides, Written
from train.cache.tokens import INDICES, TokenFormat

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TABLES = "tables"
"""Folder in a cache of the format lcx, with what its latents are read by."""

_PREFIXES = ("", "mirror_")  # of the tensors of the image and of its mirror
_LEAST_LOG = float(np.log(1e-30))  # a deviation of 0 has no logarithm


@dataclass(frozen=True)
class FloatFormat(MomentsFormat):
    """Moments as floating point numbers.

    Attributes:
        dtype: torch.float16 or torch.bfloat16.
    """

    dtype: torch.dtype
    extensions: ClassVar[tuple[str, ...]] = ("safetensors",)
    slow: ClassVar[bool] = False

    def write(self, sides: Sides) -> Written:
        """See `LatentFormat.write`."""
        tensors = {}
        for prefix, side in zip(_PREFIXES, sides, strict=True):
            for name, values in (("mean", side.mean), ("std", side.std)):
                if values is not None:
                    tensors[prefix + name] = torch.from_numpy(values).to(self.dtype).contiguous()
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise NonFiniteError(f"latents beyond {str(self.dtype).removeprefix('torch.')}")
        return Written((save(tensors),), {})

    def read(self, members: Sequence[bytes], mirrored: bool) -> Moments:
        """See `LatentFormat.read`."""
        tensors, prefix = _tensors(members[0]), _PREFIXES[mirrored]
        std = tensors.get(prefix + "std")
        mean = _named(tensors, prefix + "mean").float().numpy()
        return Moments(mean, None if std is None else std.float().numpy())


@dataclass(frozen=True)
class Int8Format(MomentsFormat):
    """Moments in 8 bits; see the module."""

    extensions: ClassVar[tuple[str, ...]] = ("safetensors",)
    slow: ClassVar[bool] = False

    def write(self, sides: Sides) -> Written:
        """See `LatentFormat.write`."""
        tensors: dict[str, torch.Tensor] = {}
        for prefix, side in zip(_PREFIXES, sides, strict=True):
            tensors |= _quantise(prefix + "mean", side.mean)
            if side.std is not None:
                with np.errstate(divide="ignore"):
                    tensors |= _quantise(prefix + "log_std", np.maximum(np.log(side.std), _LEAST_LOG))
        return Written((save(tensors),), {})

    def read(self, members: Sequence[bytes], mirrored: bool) -> Moments:
        """See `LatentFormat.read`."""
        tensors, prefix = _tensors(members[0]), _PREFIXES[mirrored]
        mean = _dequantise(prefix + "mean", tensors)
        if prefix + "log_std" not in tensors:
            return Moments(mean, None)
        return Moments(mean, np.exp(_dequantise(prefix + "log_std", tensors)))


def make_format(settings: Mapping[str, Any], out: Path) -> LatentFormat:
    """Return the format of the cache in a folder; `settings` are those of its header."""
    if settings["format"] in DTYPES:
        return FloatFormat(DTYPES[settings["format"]])
    if settings["format"] == "int8":
        return Int8Format()
    if settings["format"] == INDICES:
        return TokenFormat(settings["codebook"]["size"])
    coder = settings["tables"]
    return LcxFormat(
        tables=out / TABLES,
        decoder_id=coder["decoder_id"],
        contexts=settings["contexts"],
        quality=settings["quality"],
        psnr_db=settings["latent_psnr"],
        deviation=coder["deviation"],
        posterior_std=tuple(coder["posterior_std"]),
    )


def _quantise(name: str, values: np.ndarray) -> dict[str, torch.Tensor]:
    if not np.isfinite(values).all():
        raise NonFiniteError("the latents are not finite")
    low = values.min(axis=(1, 2)).astype(np.float32)  # (D,)
    step = ((values.max(axis=(1, 2)) - low) / 255).astype(np.float32)
    divisor = np.where(step > 0, step, 1)[:, None, None]
    q = np.clip(np.rint((values - low[:, None, None]) / divisor), 0, 255).astype(np.uint8)
    return {name: torch.from_numpy(q), f"{name}_low": torch.from_numpy(low), f"{name}_step": torch.from_numpy(step)}


def _dequantise(name: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    low, step, q = (_named(tensors, name + part).numpy() for part in ("_low", "_step", ""))
    values: np.ndarray = low[:, None, None] + step[:, None, None] * q
    return values


def _tensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load(data)
        return tensors
    except SafetensorError as exception:
        raise FormatError(f"damaged: {exception}") from exception


def _named(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise FormatError(f"damaged: no tensor {name}")
    return tensors[name]
