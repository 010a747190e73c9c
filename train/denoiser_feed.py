"""Latents of an image set in memory, and the batches that a denoiser learns from.

    mean, std (N, M, D, h, w), M = 1 or 2 with the mirrored image -> position k -> z = mean + std * noise, label

What stands at position k is a function of (seed, k): neither ranks nor batches change it, and a run is resumed by its
position alone. A latent cannot be mirrored; the mirrored image has latents of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.draws import generator
from train import draws
from train.set_feed import MIRROR, SetFeed


@dataclass(frozen=True, kw_only=True)
class LatentSet:
    """The normalized latents of labelled images.

    Attributes:
        keys: names of the images.
        labels: (N,) int64 classes.
        mean: (N, M, D, h, w) float32, the posterior's mean of the image and, where M = 2, of its mirror image.
        std: the posterior's deviation, the same shape; None for a family without a variance.
    """

    keys: Sequence[str]
    labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w)."""
        return self.mean.shape[2], self.mean.shape[3], self.mean.shape[4]

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of each channel, (D,) float32 each, of samples of all posteriors."""
        mean = self.mean.double()
        variance = mean.var((0, 1, 3, 4), unbiased=False)
        if self.std is not None:
            variance = variance + self.std.double().square().mean((0, 1, 3, 4))
        return mean.mean((0, 1, 3, 4)).float(), variance.sqrt().float()

    def scaled(self, mean: torch.Tensor, std: torch.Tensor) -> "LatentSet":
        """Return (latents - mean) / std, with a mean and a deviation for each channel, (D,)."""
        offset, unit = mean[:, None, None], std[:, None, None]
        return LatentSet(
            keys=self.keys,
            labels=self.labels,
            mean=(self.mean - offset) / unit,
            std=None if self.std is None else self.std / unit,
        )

    def some(self, n: int) -> "LatentSet":
        """Return n at even distances, or all if there are fewer."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(n, len(self))).round().astype(int)).tolist()
        std = None if self.std is None else self.std[chosen]
        keys = [self.keys[index] for index in chosen]
        return LatentSet(keys=keys, labels=self.labels[chosen], mean=self.mean[chosen], std=std)

    def one(self, index: int, seed: int) -> torch.Tensor:
        """Return a sample of the posterior of image `index`, (D, h, w); its key and the seed decide the noise."""
        mean = self.mean[index, 0]
        if self.std is None:
            return mean
        noise = generator(seed, self.keys[index], "posterior").standard_normal(self.shape, dtype=np.float32)
        return mean + self.std[index, 0] * torch.from_numpy(noise)


class LatentFeed(SetFeed):
    """The batches of one rank out of a `LatentSet`; see `train.task.Source`."""

    def __init__(
        self, latents: LatentSet, out: Path, *, batch_size: int, seed: int, rank: int = 0, n_ranks: int = 1
    ) -> None:
        """Lay out the sequence.

        Args:
            latents: at least one.
            out: the run folder.
            batch_size: B of one rank.
            seed: of the order, the mirroring and the posteriors' noise.
            rank: this rank.
            n_ranks: how many there are.
        """
        super().__init__(len(latents), out, batch_size=batch_size, seed=seed, rank=rank, n_ranks=n_ranks)
        self._latents = latents

    def describe(self) -> str:
        """Return one line on the data."""
        channels, height, width = self._latents.shape
        mirrored = " and their mirror images" if self._latents.mean.shape[1] == 2 else ""
        return (
            f"latents of {len(self._latents)} images{mirrored}, {channels} x {height} x {width}, "
            f"{self.batches_per_epoch:.1f} batches per rank and epoch"
        )

    def _batch(self, positions: range) -> dict[str, Any]:
        """Return {"latents": (B, D, h, w), "label": (B,), "key": [...], "bad": []}."""
        latents = self._latents
        index = torch.tensor([self._index(position) for position in positions])
        mirror = (draws.uniform(self._seed, MIRROR, positions, ()) * latents.mean.shape[1]).long()
        z = latents.mean[index, mirror]
        if latents.std is not None:
            z = z + latents.std[index, mirror] * draws.normal(self._seed, draws.POSTERIOR, positions, latents.shape)
        keys = [latents.keys[int(n)] for n in index]
        return {"latents": z, "label": latents.labels[index], "key": keys, "bad": []}
