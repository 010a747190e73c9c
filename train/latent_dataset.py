"""Latents for diffusion training, out of a cache that `codec-train cache` made.

    LatentDataset("cache", model="runs/first/model")[n] -> {"latents": (D, h, w) normalized, "label": 3, "caption": ...}

A new sample of the posterior and a new choice between image and mirror each epoch, both a function of (seed, epoch,
number) alone: neither workers nor order change them. Imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.cache.dataset import CacheDataset
from train.cache.model import require_same_encoder


class LatentDataset(CacheDataset):
    """A map-style dataset for `torch.utils.data.DataLoader`, with its own collate function or any other.

    Attributes:
        reader: the cache.
        classes: see `CacheDataset`.
        shape: (D, h, w) of a sample.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | torch.nn.Module | None = None,
        *,
        seed: int = 0,
        sample: bool = True,
        mirror: bool = True,
        normalized: bool = True,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Open a cache.

        Args:
            folder: of the cache.
            model: the autoencoder whose latents are expected: a folder, a name, or a diffusers network; None = whatever
                the cache was made with.
            seed: of the draws.
            sample: draw from the posterior; else its mean.
            mirror: take the mirror's latents half of the time; else never.
            normalized: what a diffusion model sees; else raw latents.
            classes: names of the classes in the order of their labels, which a refresh of the cache cannot change;
                None = those of the cache.

        Raises:
            UsageError: no cache, an unfinished one, one of indices, a missing shard, or a class that is not among
                `classes`.
            ModelError: made with the encoder of another model.
        """
        super().__init__(folder, seed=seed, mirror=mirror, classes=classes)
        self.reader.require_latents()
        if model is not None:
            require_same_encoder(self.reader.folder, self.reader.model, model)
        self.shape: tuple[int, int, int] = tuple(self.reader.header["shape"])
        self._sample, self._normalized = sample, normalized

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return one sample.

        Returns:
            latents: (D, h, w) float32.
            label: int, -1 where the sources state no class.
            caption: str, "" where there is none; one of several at random.
            key: of the source image.
            crop_box: (4,) float32, left, top, right, bottom in pixels of the source image, not mirrored.
            original_size: (2,) int64, height and width of the source image.
            mirrored: bool.

        Raises:
            IndexError: there is no such sample.
            FormatError: the cache is damaged there, or was refreshed meanwhile.
        """
        number, rng, mirrored = self._draws(number)
        moments, facts = self.reader.read(number, mirrored)
        z = torch.from_numpy(moments.mean)
        if self._sample and moments.std is not None:
            noise = rng.standard_normal(moments.mean.shape, dtype=np.float32)
            z = z + torch.from_numpy(moments.std) * torch.from_numpy(noise)
        latents = self.normalize(z) if self._normalized else z
        return {"latents": latents, **self._about(number, facts, rng, mirrored)}

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return what a diffusion model sees of raw latents, (..., D, h, w)."""
        return self.reader.model.normalisation.normalize(z)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the raw latents, which the autoencoder decodes, of normalized ones, (..., D, h, w)."""
        return self.reader.model.normalisation.denormalize(z)
