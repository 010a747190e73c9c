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
from torch.utils.data import Dataset

from codec.errors import UsageError
from train.cache.index import sort_classes
from train.cache.model import require_same_encoder
from train.cache.reader import CacheReader


class LatentDataset(Dataset[dict[str, Any]]):
    """A map-style dataset for `torch.utils.data.DataLoader`, with its own collate function or any other.

    Attributes:
        reader: the cache.
        shape: (D, h, w) of a sample.
        classes: names of the classes; `label` is a position in it, or the number that is the name where all are whole
            numbers.
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
            UsageError: no cache, an unfinished one, a missing shard, or a class that is not among `classes`.
            ModelError: made with the encoder of another model.
        """
        self.reader = CacheReader(folder)
        if model is not None:
            require_same_encoder(self.reader.folder, self.reader.model, model)
        self.shape: tuple[int, int, int] = tuple(self.reader.header["shape"])
        self.classes = list(self.reader.header["classes"] if classes is None else classes)
        self._labels = _labels(self.reader, self.classes, given=classes is not None)
        self._seed, self._sample, self._mirror, self._normalized = seed, sample, mirror, normalized
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that live on see it change

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Choose other draws, >= 0; workers that are running see it too."""
        self._epoch.fill_(epoch)

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
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        number %= len(self)
        rng = np.random.default_rng((self._seed, int(self._epoch), number))
        mirrored = bool(rng.integers(2)) and self._mirror
        moments, facts = self.reader.read(number, mirrored)
        z = torch.from_numpy(moments.mean)
        if self._sample and moments.std is not None:
            noise = rng.standard_normal(moments.mean.shape, dtype=np.float32)
            z = z + torch.from_numpy(moments.std) * torch.from_numpy(noise)
        caption = facts["caption"]
        if isinstance(caption, list):
            caption = caption[int(rng.integers(len(caption)))]
        return {
            "latents": self.normalize(z) if self._normalized else z,
            "label": int(self._labels[number]),
            "caption": caption,
            "key": facts["key"],
            "crop_box": torch.tensor(facts["crop_box"], dtype=torch.float32),
            "original_size": torch.tensor(facts["original_size"]),
            "mirrored": mirrored,
        }

    def normalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return what a diffusion model sees of raw latents, (..., D, h, w)."""
        return self.reader.model.normalisation.normalize(z)

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """Return the raw latents, which the autoencoder decodes, of normalized ones, (..., D, h, w)."""
        return self.reader.model.normalisation.denormalize(z)


def _labels(reader: CacheReader, classes: Sequence[str], given: bool) -> np.ndarray:
    """Return the label of each sample, int64; -1 for none."""
    numbers = {name: n for n, name in enumerate(classes)}
    if not given and all(name.isdecimal() for name in classes):
        numbers = {name: int(name) for name in classes}
    if unknown := {name for name in reader.classes if name is not None and name not in numbers}:
        raise UsageError(f"{reader.folder}: class {sort_classes(unknown)[0]} is not among the {len(classes)} given")
    return np.array([-1 if name is None else numbers[name] for name in reader.classes], np.int64)
