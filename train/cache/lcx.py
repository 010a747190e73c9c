"""Latents coded by the project's own codec: the cache's format `lcx`, two whole compressed files for each sample.

    mean -> integers at one quality, or at the lowest that keeps a PSNR -> KEY.lcx, KEY.mirror.lcx

So `codec decode` turns a member of such a shard into a picture. The posterior's deviation is dropped: a reader gets one
constant per channel, the model's. Trainers read in a hurry, so the codec's integer contexts, for a tenth fewer bytes
and many times slower, are left out unless asked for. Must not import torch: the processes that code import this.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from codec import bitstream, model_folder
from codec.coding import Coded, Coder, Settings
from codec.errors import ModelError, NonFiniteError
from codec.tables import QUALITIES, Mode, to_indices
from train.cache.moments import PSNR_PEAK, Moments, MomentsFormat, Sides, Written


@dataclass(frozen=True, kw_only=True)
class LcxFormat(MomentsFormat):
    """See the module.

    Attributes:
        tables: folder with codec.json and codec.safetensors of the model.
        decoder_id: of the model, 16 hex digits.
        contexts: whether the coder may use integer contexts.
        quality: 0..100; None = by `psnr_db`.
        psnr_db: least latent PSNR of each image and each mirror, in dB.
        deviation: of the raw latents of the model, which the PSNR's peak is made of.
        posterior_std: per channel, what a reader gets in place of the posterior's; empty where there is none.
    """

    tables: Path
    decoder_id: str
    contexts: bool
    quality: int | None
    psnr_db: float | None
    deviation: float
    posterior_std: tuple[float, ...]
    extensions: ClassVar[tuple[str, ...]] = ("lcx", "mirror.lcx")
    slow: ClassVar[bool] = True

    def write(self, sides: Sides) -> Written:
        """See `LatentFormat.write`."""
        coded = [self._code(side.mean) for side in sides]
        qualities = [one.quality for one in coded]
        facts = {} if self.quality is not None else {"quality": qualities}
        return Written(tuple(one.data for one in coded), facts)

    def read(self, members: Sequence[bytes], mirrored: bool) -> Moments:
        """See `LatentFormat.read`."""
        std = np.array(self.posterior_std, np.float32)[:, None, None] if self.posterior_std else None
        try:
            return Moments(self._means(members[mirrored]), std)
        except ModelError as exception:
            raise ModelError(f"{self.tables}: not the tables of this cache: {exception}") from exception

    def _coder(self) -> Coder:
        return _coder(self.tables, self.decoder_id)

    def _means(self, data: bytes) -> np.ndarray:
        coder, contents = self._coder(), bitstream.unpack(data)
        return coder.dequantise(contents.header, coder.read(contents))

    def _code(self, z: np.ndarray) -> Coded:
        if not np.isfinite(z).all():
            raise NonFiniteError("the latents are not finite")
        coder = self._coder()
        height, width = (coder.folder.f * side for side in z.shape[1:])
        modes = tuple(Mode) if self.contexts else (Mode.RAW, Mode.STATIC)
        quality = self._lowest_quality(z) if self.quality is None else self.quality
        # Effort 0, nearest integers: a search saves hardly anything at the qualities that latents need.
        return coder.code(z, width, height, Settings(quality=quality, effort=0, modes=modes))

    def _lowest_quality(self, z: np.ndarray) -> int:
        """Return the lowest quality that keeps the PSNR, or the highest of all."""
        assert self.psnr_db is not None
        most = (PSNR_PEAK * self.deviation) ** 2 / 10 ** (self.psnr_db / 10)
        folder = self._coder().folder
        table_set = folder.table_sets[folder.stream_id]

        def is_enough(quality: int) -> bool:
            indices = to_indices(z, folder.mean, folder.step, quality)
            z_q = table_set.dequantise(indices, quality, folder.mean, folder.step)
            return float(np.mean((z_q.astype(np.float64) - z) ** 2)) <= most

        return min(bisect_left(range(QUALITIES), True, key=is_enough), QUALITIES - 1)


@lru_cache(maxsize=4)
def _coder(tables: Path, decoder_id: str) -> Coder:
    return Coder(model_folder.read(tables), decoder_id)


def check_target(psnr_db: float | None) -> None:
    """Raise ValueError for a PSNR that is no number above 0."""
    if psnr_db is not None and not (math.isfinite(psnr_db) and psnr_db > 0):
        raise ValueError(f"--latent-psnr {psnr_db}, expected dB above 0")
