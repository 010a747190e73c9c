"""Indices of an image set in memory, held-out ones apart, and the batches that a prior learns from.

    caches -> TokenSet (N, M, n), M = 1 or 2 with the mirror -> position k -> indices, label

The mirror of an image has indices of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.errors import UsageError
from train import draws
from train.cache.codebook import Codebook
from train.cache.dataset import labels_of
from train.cache.reader import CacheReader
from train.prior.config import TokenDataConfig
from train.set_feed import MIRROR, SetFeed, hold_out

_SMOOTHING = 0.5  # added to each count (Krichevsky & Trofimov 1981): an index unseen in training may be met


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """The indices of labelled images.

    Attributes:
        keys: of the samples.
        sha256: of the source images; crops of one image share it.
        labels: (N,) int64 classes; the number of classes where there is none.
        indices: (N, M, n) int32, of the image and, where M = 2, of its mirror, in raster order.
    """

    keys: Sequence[str]
    sha256: Sequence[str]
    labels: torch.Tensor
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self) -> str:
        """Return 16 hex digits of keys, source images and indices: equal where a set is the same, in the same order."""
        sha = hashlib.sha256("\n".join([*self.keys, "", *self.sha256]).encode())
        sha.update(np.ascontiguousarray(self.indices.numpy(), dtype="<i4").tobytes())
        return sha.hexdigest()[:16]

    def label_digest(self) -> str:
        """Return 16 hex digits of the labels: equal where these are, in the same order."""
        return hashlib.sha256(np.ascontiguousarray(self.labels.numpy(), dtype="<i8").tobytes()).hexdigest()[:16]

    def some(self, chosen: Sequence[int]) -> "TokenSet":
        """Return a part."""
        where = torch.tensor(chosen, dtype=torch.int64)
        keys, hashes = ([names[n] for n in chosen] for names in (self.keys, self.sha256))
        return TokenSet(keys=keys, sha256=hashes, labels=self.labels[where], indices=self.indices[where])


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """What a prior is trained on, and measured on.

    Attributes:
        training: learned from.
        held_out: only measured on.
        classes: names of the labels 0, 1, ...
        codebook: whose indices these are.
        vectors: (K, d) float32, of the codebook.
        shape: (h, w).
        size: pixels a side of the images.
        n_dropped: training samples left out because their image is held out.
    """

    training: TokenSet
    held_out: TokenSet
    classes: Sequence[str]
    codebook: Codebook
    vectors: torch.Tensor
    shape: tuple[int, int]
    size: int
    n_dropped: int

    def counts(self) -> torch.Tensor:
        """Return how often each index occurs in the training, mirrors too, (K,) float64."""
        return torch.bincount(self.training.indices.flatten().long(), minlength=self.codebook.size).double()

    def frequencies(self) -> torch.Tensor:
        """Return the smoothed frequencies of the training indices, (K,) float64, none of them 0."""
        counts = self.counts() + _SMOOTHING
        return counts / counts.sum()

    def unigram_entropy(self) -> float:
        """Return the entropy of the training indices' frequencies, in bits an index."""
        shares = self.counts() / self.counts().sum()
        return float(-(shares * shares.clamp_min(1e-300).log2()).sum())


def load_data(config: TokenDataConfig) -> TokenData:
    """Read the caches of a recipe.

    Raises:
        UsageError: none is named, missing, unfinished, or of latents; nothing is left to train or to measure on; a
            held-out class or shape that the training has not.
        ModelError: the held-out indices are of another codebook or encoder.
        FormatError: a cache is damaged.
    """
    if not config.cache:
        raise UsageError("trained on what? Set data.cache=FOLDER (codec-train cache --format indices writes one)")
    reader = CacheReader(config.cache)
    codebook = reader.require_indices()
    classes = list(reader.header["classes"])
    training = _read(reader, classes, config.mirror)
    if config.validation_cache:
        other = CacheReader(config.validation_cache)
        codebook.require(other.require_indices(), config.cache)
        if other.header["shape"] != reader.header["shape"]:
            shapes = f"{other.header['shape']}, {config.cache} of {reader.header['shape']}"
            raise UsageError(f"{config.validation_cache}: indices of shape (h, w) {shapes}")
        held_out = _read(other, classes, mirror=False)
        hashes = set(held_out.sha256)
    else:
        hashes = hold_out(training.sha256, config.n_validation)
        held_out = training.some([n for n, sha256 in enumerate(training.sha256) if sha256 in hashes])
    kept = [n for n, sha256 in enumerate(training.sha256) if sha256 not in hashes]
    if not kept or not len(held_out):
        raise UsageError(f"{config.cache}: {len(kept)} samples to learn from, {len(held_out)} to measure on")
    return TokenData(
        training=training.some(kept),
        held_out=held_out,
        classes=classes,
        codebook=codebook,
        vectors=torch.from_numpy(reader.vectors()),
        shape=tuple(reader.header["shape"]),
        size=int(reader.header["settings"]["preprocessing"]["size"]),
        n_dropped=(len(training) - len(kept)) if config.validation_cache else 0,
    )


def _read(reader: CacheReader, classes: Sequence[str], mirror: bool) -> TokenSet:
    labels = labels_of(reader, classes, given=True)
    height, width = reader.header["shape"]
    indices = np.empty((len(reader), 1 + mirror, height * width), np.int32)
    keys, hashes = [], []
    for number in range(len(reader)):
        for side in range(1 + mirror):
            tokens, facts = reader.read_tokens(number, bool(side))
            indices[number, side] = tokens.indices.ravel()
        keys.append(f"{facts['key']}#{facts['crop']}")
        hashes.append(facts["sha256"])
    reader.close()
    hidden = np.where(labels < 0, len(classes), labels)
    return TokenSet(keys=keys, sha256=hashes, labels=torch.from_numpy(hidden), indices=torch.from_numpy(indices))


class TokenFeed(SetFeed):
    """The batches of one rank out of a `TokenSet`; see `train.task.Source`."""

    def __init__(
        self, tokens: TokenSet, out: Path, *, batch_size: int, seed: int, rank: int = 0, n_ranks: int = 1
    ) -> None:
        """Lay out the sequence; see `SetFeed`."""
        super().__init__(len(tokens), out, batch_size=batch_size, seed=seed, rank=rank, n_ranks=n_ranks)
        self._tokens = tokens

    def describe(self) -> str:
        """Return one line on the data."""
        n, sides, each = self._tokens.indices.shape
        mirrored = " and their mirrors" if sides == 2 else ""
        return f"{each} indices of {n} images{mirrored}, {self.batches_per_epoch:.1f} batches per rank and epoch"

    def _batch(self, positions: range) -> dict[str, Any]:
        """Return {"indices": (B, n) int64, "label": (B,), "key": [...], "bad": []}."""
        tokens = self._tokens
        index = torch.tensor([self._index(position) for position in positions])
        mirror = (draws.uniform(self._seed, MIRROR, positions, ()) * tokens.indices.shape[1]).long()
        keys = [tokens.keys[int(n)] for n in index]
        return {"indices": tokens.indices[index, mirror].long(), "label": tokens.labels[index], "key": keys, "bad": []}
