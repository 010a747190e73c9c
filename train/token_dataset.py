"""Codebook indices for generators of tokens, out of a cache that `codec-train cache --format indices` made.

    TokenDataset("tokens", model="runs/vq/model")[n] -> {"indices": (h, w) int64, "label": 3, "caption": ...}

A new choice between image and mirror each epoch, a function of (seed, epoch, number) alone: neither workers nor order
change it. Imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train.cache.codebook import Codebook
from train.cache.dataset import CacheDataset


class TokenDataset(CacheDataset):
    """A map-style dataset for `torch.utils.data.DataLoader`, with its own collate function or any other.

    Attributes:
        reader: the cache.
        classes: see `CacheDataset`.
        codebook: whose indices these are.
        shape: (h, w) of a sample.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | torch.nn.Module | None = None,
        *,
        seed: int = 0,
        mirror: bool = True,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Open a cache.

        Args:
            folder: of the cache.
            model: the VQModel whose indices are expected: a folder, a name, or the network; None = whatever the cache
                was made with.
            seed: of the draws.
            mirror: take the mirror's indices half of the time; else never.
            classes: names of the classes in the order of their labels, which a refresh of the cache cannot change;
                None = those of the cache.

        Raises:
            UsageError: no cache, an unfinished one, one of latents, a missing shard, or a class that is not among
                `classes`.
            ModelError: made with another codebook or encoder.
        """
        super().__init__(folder, seed=seed, mirror=mirror, classes=classes)
        self.codebook = self.reader.require_indices()
        if model is not None:
            given = model if isinstance(model, torch.nn.Module) else str(model)
            self.codebook.require(Codebook.of(given, "these indices need"), str(self.reader.folder))
        self.shape: tuple[int, int] = tuple(self.reader.header["shape"])

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return one sample.

        Returns:
            indices: (h, w) int64 in [0, K).
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
        tokens, facts = self.reader.read_tokens(number, mirrored)
        return {"indices": torch.from_numpy(tokens.indices), **self._about(number, facts, rng, mirrored)}
